"""GPU, driver, CuPy, NVRTC, torch: what is there, or why workers will compute on the CPU."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pagewire.doctor.check import Check
from pagewire.doctor.installation import version

GIB = 1 << 30
OLDEST_CAPABILITY = (8, 0)
"""As kernels.compile, which imports torch."""
LEAST_FREE_GIB = 2
LEAST_LOCKED_BYTES = 1 << 30
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Attributes of a device in CUDA's driver API."""
CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver tells."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Driver:
    """The CUDA driver of this machine."""

    cuda: tuple[int, int]
    """Newest CUDA that it supports."""
    gpus: tuple[Gpu, ...]

    @property
    def extra(self) -> str:
        """The extra of this distribution that fits."""
        return "cuda13" if self.cuda >= (13, 0) else "cuda12"


class DriverError(Exception):
    """There is no driver, or it finds no GPU. Has the line for `found` and the mend."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found = found
        self.mend = mend


def ask_driver() -> Driver:
    """Asks the driver directly: neither torch nor CuPy need be there. Raises DriverError."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        mend = "to use a GPU, install NVIDIA's driver; in a container, start it with --gpus all"
        raise DriverError("no CUDA driver (libcuda.so.1): workers compute on the CPU", mend) from None
    status = cuda.cuInit(0)
    if status != 0:
        raise DriverError(
            f"the driver found no usable GPU (cuInit: {status})", "see nvidia-smi, and CUDA_VISIBLE_DEVICES"
        )
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    newest = (number.value // 1000, number.value % 1000 // 10)
    return Driver(newest, tuple(_gpu(cuda, place) for place in range(count.value)))


def _gpu(cuda: Any, place: int) -> Gpu:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDeviceGet(ctypes.byref(device), place)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    parts = [ctypes.c_int(), ctypes.c_int()]
    for part, attribute in zip(parts, (CAPABILITY_MAJOR, CAPABILITY_MINOR), strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # Free memory can only be asked for inside a context.
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0:
        cuda.cuCtxPushCurrent_v2(context)
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        cuda.cuDevicePrimaryCtxRelease_v2(device)
    return Gpu(name.value.decode(errors="replace"), (parts[0].value, parts[1].value), total.value, free.value)


def free_bytes() -> int | None:
    """Free memory of the first GPU; None: there is none."""
    try:
        gpus = ask_driver().gpus
    except DriverError:
        return None
    return gpus[0].free_bytes if gpus else None


def check_gpu(ask: Callable[[], Driver] = ask_driver) -> Iterator[Check]:
    """Everything about GPUs; one note where there is none."""
    try:
        driver = ask()
    except DriverError as error:
        yield Check("GPU", "note", error.found, error.mend)
        return
    for gpu in driver.gpus:
        yield check_capability(gpu)
        yield check_free_memory(gpu)
    yield Check("CUDA driver", "ok", "supports CUDA {}.{}".format(*driver.cuda))
    cupy = check_cupy(driver)
    yield cupy
    if cupy.state != "bad":
        yield check_nvrtc()
    yield check_torch(driver)
    yield check_locked_memory()


def check_capability(gpu: Gpu) -> Check:
    """Whether the kernels run on a GPU of that age."""
    found = "{}, compute capability {}.{}".format(gpu.name, *gpu.capability)
    if gpu.capability < OLDEST_CAPABILITY:
        needed = "{}.{} (Ampere)".format(*OLDEST_CAPABILITY)
        return Check("GPU", "bad", found, f"too old: the kernels need {needed} or newer; use --device cpu")
    return Check("GPU", "ok", found)


def check_free_memory(gpu: Gpu) -> Check:
    """Whether somebody else has filled the GPU."""
    free, total = gpu.free_bytes / GIB, gpu.total_bytes / GIB
    found = f"{free:.1f} GiB free of {total:.1f} GiB"
    if free < LEAST_FREE_GIB:
        return Check(
            "GPU memory", "bad", found, "nvidia-smi shows which processes hold it: end them, or use another GPU"
        )
    if free < total / 2:
        return Check(
            "GPU memory", "note", found, "the KV pool is made of what is free: nvidia-smi shows who holds the rest"
        )
    return Check("GPU memory", "ok", found)


def check_cupy(driver: Driver) -> Check:
    """CuPy: there once, and for a CUDA that the driver supports."""
    present = [name for name in CUPY_PACKAGES if version(name) is not None]
    told = ", ".join(f"{name} {version(name)}" for name in present)
    right = f"cupy-{driver.extra}x"
    if not present:
        if importlib.util.find_spec("cupy") is not None:
            return Check("CuPy", "ok", "present")
        return Check("CuPy", "bad", "missing: the GPU kernels need it", f"pip install 'pagewire[{driver.extra}]'")
    mend = f"pip uninstall {' '.join(present)}; pip install 'pagewire[{driver.extra}]'"
    if len(present) > 1:
        return Check("CuPy", "bad", f"{told}: several at once overwrite each other's files", mend)
    if present[0] == "cupy-cuda13x" and driver.cuda < (13, 0):
        supports = "{}.{}".format(*driver.cuda)
        return Check("CuPy", "bad", f"{told}, but the driver supports CUDA {supports} only: {right} fits", mend)
    return Check("CuPy", "ok", told)


def check_nvrtc() -> Check:
    """CUDA's run-time compiler, which makes the kernels."""
    try:
        nvrtc = importlib.import_module("cupy.cuda.nvrtc")
        numbers = ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # the library is opened at the first call
        line = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "pip install nvidia-cuda-nvrtc-cu12 (or nvidia-cuda-nvrtc for CUDA 13), to match CuPy"
        return Check("NVRTC", "bad", f"cannot be loaded: {line}", mend)
    return Check("NVRTC", "ok", numbers)


def check_torch(driver: Driver) -> Check:
    """Whether torch was built for CUDA, and for one that the driver supports. Told by its version alone."""
    found = version("torch")
    if found is None:
        return Check("torch with CUDA", "note", "torch is missing", "pip install 'pagewire[worker]' (for workers only)")
    local = found.partition("+")[2]
    if local == "cpu":
        mend = "install a torch build with CUDA; see pytorch.org for the line"
        return Check("torch with CUDA", "bad", f"torch {found} has no CUDA", mend)
    digits = local.removeprefix("cu")
    if local.startswith("cu") and digits.isdecimal() and int(digits[:-1]) > driver.cuda[0]:
        supports = "{}.{}".format(*driver.cuda)
        mend = f"update the driver, or install torch for CUDA {driver.cuda[0]}; see pytorch.org for the line"
        return Check("torch with CUDA", "bad", f"torch {found}, but the driver supports CUDA {supports} only", mend)
    return Check("torch with CUDA", "ok", f"torch {found}")


def check_locked_memory() -> Check:
    """The limit on locked memory: the swap arena is pinned, so that copies run beside computation."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if 0 <= soft < LEAST_LOCKED_BYTES:
        mend = "if the arena cannot be pinned: ulimit -l unlimited (docker: --ulimit memlock=-1), --host-blocks 0"
        return Check("locked memory", "note", f"limit {soft / 2**20:.0f} MiB", mend)
    return Check("locked memory", "ok", "unlimited" if soft < 0 else f"limit {soft / 2**30:.1f} GiB")
