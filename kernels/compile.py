"""From `csrc/*.cu` to something that can be launched: source text, cubin, loaded kernel.

`source(file, defines)` is the whole text: headers are written into it (a cache key made of the text is then complete)
and tile sizes, element type and layout stand in front as defines. `compile_to_cubin` turns it into machine code with
NVRTC and needs no GPU. `kernel(...)` loads it for a tensor's device, once per process, and returns a `Kernel`: its
arguments are packed into one prepared buffer and handed to the driver on torch's current stream, without CuPy's object
per argument; a launch inside `torch.cuda.graph` is captured like any of torch's own.

Who runs a kernel is a `Backend`, chosen by the type of the tensors' device. CUDA devices get CuPy. Tests register an
emulator for CPU tensors, and so run the very wrappers and kernels without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

CSRC = Path(__file__).parent / "csrc"
OLDEST_CAPABILITY = (8, 0)
"""cp.async, bfloat16 mma and movmatrix: Ampere and newer."""
OPTIONS = ("-std=c++17", "--ptxas-options=-v", "-lineinfo")
CUDA_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""DTYPE of the kernels for each torch dtype."""

Grid = tuple[int, int, int]
Defines = tuple[tuple[str, str], ...]


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched; one line with the mend."""


@dataclass(frozen=True)
class Resources:
    """What one kernel of a cubin needs, as ptxas reports it."""

    registers: int
    """Registers of a thread."""
    stack_bytes: int
    """Local memory of a thread; arrays the compiler could not keep in registers end here."""
    spill_bytes: int
    """Bytes stored to and loaded from local memory because registers ran out."""
    static_shared_bytes: int
    """Shared memory the kernel declares itself; the dynamic part comes with the launch."""


@dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture."""

    image: bytes
    resources: Mapping[str, Resources]
    """By kernel name."""


@dataclass(frozen=True)
class DeviceLimits:
    """What grids and pipelines are sized by."""

    processors: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Most shared memory of one CTA."""
    processor_shared_bytes: int
    """Shared memory of one multiprocessor; every resident CTA takes 1 KiB more than it asks for."""
    wgmma: bool = False
    """Whether there are Hopper's warpgroup matrix products."""


@dataclass(frozen=True)
class TensorMap:
    """A view of a tensor of 2-byte elements from which kernels copy boxes (Hopper's tensor memory accelerator)."""

    address: int
    """Of the first element, a multiple of 16."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    """Elements of each dimension, the contiguous one first."""
    strides: tuple[int, ...]
    """Bytes from element to element of the second dimension and further ones, multiples of 16."""
    box: tuple[int, ...]
    """Elements of a box in each dimension; 128 bytes in the first, at most 256 in others."""


class Loaded(Protocol):
    """A kernel that a backend has made ready."""

    def launch(self, grid: Grid, threads: int, shared_bytes: int, arguments: int) -> None:
        """Starts it; `arguments` is the address of an array of pointers to the arguments, read before it returns."""


class Backend(Protocol):
    """Where kernels run."""

    def load(self, text: str, name: str, device: torch.device) -> Loaded:
        """Raises KernelError."""

    def limits(self, device: torch.device) -> DeviceLimits:
        """What launches on `device` must fit."""

    def tensor_map(self, matrix: TensorMap) -> bytes:
        """`matrix` as a kernel's argument of type TensorMap."""


class Kernel:
    """One kernel, ready for one device. Call it with a grid, a block size, dynamic shared bytes and its arguments.

    Arguments are Python numbers, `tensor.data_ptr()` for pointers, and `tensor_map(...)`. Their count and range are
    checked against the parameter list in the source (struct.error); what the pointers point to is the wrapper's to
    check.
    """

    def __init__(self, loaded: Loaded, parameters: Sequence[str]) -> None:
        self._loaded = loaded
        formats = [PARAMETER_FORMATS[p] for p in parameters]
        self._struct = struct.Struct("<" + "".join(formats))
        self._buffer = ctypes.create_string_buffer(max(self._struct.size, 1))
        base = ctypes.addressof(self._buffer)
        places = (base + struct.calcsize("<" + "".join(formats[:i])) for i in range(len(formats)))
        self._pointers = (ctypes.c_void_p * max(len(parameters), 1))(*places)
        self._arguments = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()

    def __call__(self, grid: Grid, threads: int, shared_bytes: int, *arguments: float | bytes) -> None:
        """Raises KernelError when the launch is refused. A grid with a zero in it launches nothing."""
        if 0 in grid:
            return
        with self._lock:
            self._struct.pack_into(self._buffer, 0, *arguments)
            self._loaded.launch(grid, threads, shared_bytes, self._arguments)


PARAMETER_FORMATS = {
    "pointer": "Q",
    "int": "i4x",
    "u32": "I4x",
    "float": "f4x",
    "i64": "q",
    "u64": "Q",
    "TensorMap": "128s",
}


def parameters(text: str, name: str) -> tuple[str, ...]:
    """The kinds of a kernel's parameters, in order, read from its source. Raises KernelError if it is not there."""
    match = re.search(rf'extern "C" __global__ [^;{{}}]*?\b{name}\(([^)]*)\)\s*{{', text)
    if match is None:
        raise KernelError(f"no kernel {name} in the source")
    kinds = []
    for declaration in match.group(1).split(","):
        words = [word for word in declaration.split() if word not in ("const", "__grid_constant__")]
        kind = "pointer" if "*" in declaration else words[0]
        if kind not in PARAMETER_FORMATS:
            raise KernelError(f"{name}: parameter `{declaration.strip()}` is of no known type")
        kinds.append(kind)
    return tuple(kinds)


def waits_for_previous(text: str, name: str) -> bool:
    """Whether the kernel itself waits for those before it, so that it may be launched early (device.cuh)."""
    kernels = text.split('extern "C" __global__')[1:]
    return any(re.search(rf"\b{name}\(", kernel) and "wait_for_previous();" in kernel for kernel in kernels)


@functools.cache
def _read(file: str) -> str:
    return (CSRC / file).read_text()


def source(file: str, defines: Mapping[str, object]) -> str:
    """The text of `csrc/<file>`, or of another file by its whole path, with `defines` in front and its headers written
    in place, each once.

    Raises KernelError for a header that is not in csrc.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        lines = []
        for line in _read(name).splitlines():
            header = re.match(r'#include "([\w.]+)"', line)
            if header is None or not (CSRC / header.group(1)).exists():
                lines.append(line)  # the emulator's header is under an #ifdef and not ours
            elif header.group(1) not in seen:
                seen.add(header.group(1))
                lines.append(expand(header.group(1)))
        return "\n".join(line for line in lines if line != "#pragma once")

    head = "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items()))
    return f"{head}{expand(file)}\n"


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability; 9.0 with its `a`, which wgmma needs. Raises KernelError if too old."""
    if capability < OLDEST_CAPABILITY:
        raise KernelError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}; Pagewire's kernels need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer, use --device cpu"
        )
    return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise KernelError(
            f"CuPy is not usable ({_first_line(error)}); install pagewire[cuda12] or pagewire[cuda13], "
            "whichever `nvidia-smi` says"
        ) from error
    try:
        nvrtc.getVersion()
    except Exception as error:  # the library is opened at the first call
        raise KernelError(
            f"NVRTC, CUDA's run-time compiler, cannot be loaded ({_first_line(error)}); "
            "install nvidia-cuda-nvrtc-cu12 or nvidia-cuda-nvrtc to match CuPy"
        ) from error
    return nvrtc


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def compile_to_cubin(text: str, arch: str) -> Cubin:
    """Machine code for `arch` ("sm_80", "sm_90a", ...), without a GPU. Raises KernelError with the first error."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, [*OPTIONS, f"-arch={arch}"])
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            line = next((line for line in log.splitlines() if "error" in line), _first_line(error))
            raise KernelError(
                f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} refuses a kernel for {arch}: {line}"
            ) from error
        return Cubin(nvrtc.getCUBIN(program), _resources(nvrtc.getProgramLog(program)))
    finally:
        nvrtc.destroyProgram(program)


def _resources(log: str) -> dict[str, Resources]:
    """Reads the report of `--ptxas-options=-v`."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]

        def number(pattern: str, part: str = part) -> int:
            return sum(map(int, re.findall(pattern, part)))

        found[name] = Resources(
            registers=number(r"Used (\d+) registers"),
            stack_bytes=number(r"(\d+) bytes stack frame"),
            spill_bytes=number(r"(\d+) bytes spill"),
            static_shared_bytes=number(r"(\d+) bytes smem"),
        )
    return found


def _cache_folder() -> Path:
    configured = os.environ.get("PAGEWIRE_KERNEL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "pagewire" / "kernels"


def _cubin_file(text: str, arch: str) -> Path:
    """The cubin of `text` on disk, compiled if it is not there yet; safe among processes."""
    key = hashlib.sha256("\0".join((text, arch, *OPTIONS, str(_nvrtc().getVersion()))).encode()).hexdigest()
    path = _cache_folder() / f"{key}.cubin"
    if not path.exists():
        image = compile_to_cubin(text, arch).image
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(image)
            Path(file.name).replace(path)
        except OSError as error:
            raise KernelError(
                f"cannot keep compiled kernels in {path.parent} ({error}); set PAGEWIRE_KERNEL_CACHE"
            ) from error
    return path


class CupyBackend:
    """CUDA devices, through CuPy's RawModule."""

    def load(self, text: str, name: str, device: torch.device) -> Loaded:
        """Compiles (or finds) and loads. Raises KernelError."""
        path = _cubin_file(text, architecture(torch.cuda.get_device_capability(device)))
        import cupy

        starts_early = waits_for_previous(text, name) and torch.cuda.get_device_capability(device) >= (9, 0)
        try:
            with cupy.cuda.Device(device.index):
                function = cupy.RawModule(path=str(path)).get_function(name)
                return _CupyKernel(function, name, device.index or 0, starts_early)
        except cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(
                f"the driver refuses kernel {name}: {_first_line(error)}; is CuPy for another CUDA?"
            ) from error

    def limits(self, device: torch.device) -> DeviceLimits:
        """As the driver reports them."""
        _nvrtc()  # says what is wrong if CuPy is
        from cupy.cuda import runtime

        index = torch.cuda.current_device() if device.index is None else device.index
        return DeviceLimits(
            processors=runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index),
            shared_bytes=runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
            processor_shared_bytes=runtime.deviceGetAttribute(
                runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor, index
            ),
            wgmma=torch.cuda.get_device_capability(index) == (9, 0),
        )

    def tensor_map(self, matrix: TensorMap) -> bytes:
        """As the driver encodes it. Raises KernelError."""
        rank = len(matrix.sizes)
        room = ctypes.create_string_buffer(128 + 64)
        encoded = ctypes.addressof(room) + -ctypes.addressof(room) % 64
        status = _encode_tiled()(
            encoded,
            _TENSOR_MAP_TYPES[matrix.dtype],
            rank,
            matrix.address,
            (ctypes.c_uint64 * rank)(*matrix.sizes),
            (ctypes.c_uint64 * (rank - 1))(*matrix.strides),
            (ctypes.c_uint32 * rank)(*matrix.box),
            (ctypes.c_uint32 * rank)(*([1] * rank)),
            0,  # not interleaved
            3,  # CU_TENSOR_MAP_SWIZZLE_128B
            2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
            0,  # zeros outside
        )
        if status:
            raise KernelError(f"the driver refuses a tensor map of {matrix}: CUDA error {status}")
        return ctypes.string_at(encoded, 128)


_TENSOR_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""CUtensorMapDataType."""


@functools.cache
def _encode_tiled() -> Any:
    """cuTensorMapEncodeTiled."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    pointer, word = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = (pointer, word, word, pointer, pointer, pointer, pointer, pointer, word, word, word, word)
    function.restype = ctypes.c_int
    return function


_thread = threading.local()


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a value of 64 bytes at offset 8."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


@functools.cache
def _launch_ex() -> Any:
    """cuLaunchKernelEx, which CuPy does not offer; None where the driver has none (before CUDA 11.8)."""
    function = getattr(ctypes.CDLL("libcuda.so.1"), "cuLaunchKernelEx", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        function.restype = ctypes.c_int
    return function


class _CupyKernel:
    """A cupy.RawKernel, launched by the driver call that it would make itself, without its per-argument objects.

    starts_early: by programmatic dependent launch; the kernel itself waits for those before it (device.cuh).
    """

    DEFAULT_SHARED_BYTES = 48 * 1024
    """More dynamic shared memory than this must be asked for once."""

    def __init__(self, function: Any, name: str, device_index: int, starts_early: bool) -> None:
        import cupy

        self._function = function  # keeps the module loaded
        self._handle = int(function.kernel.ptr)
        self._driver, self._runtime = cupy.cuda.driver, cupy.cuda.runtime
        self._name = name
        self._device_index = device_index
        self._shared_bytes = self.DEFAULT_SHARED_BYTES
        self._launch_ex = _launch_ex() if starts_early else None
        self._attribute = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _LaunchConfig(attributes=ctypes.pointer(self._attribute), num_attributes=1)
        self._config.block[1] = self._config.block[2] = 1
        self._config_address = ctypes.addressof(self._config)

    def launch(self, grid: Grid, threads: int, shared_bytes: int, arguments: int) -> None:
        if shared_bytes > self._shared_bytes:
            self._allow(shared_bytes)
        if not getattr(_thread, "has_context", False):
            # The driver, unlike the runtime, does not make the device's context current by itself.
            self._runtime.setDevice(self._device_index)
            _thread.has_context = True
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        if self._launch_ex is not None:
            config = self._config
            config.grid[0], config.grid[1], config.grid[2] = grid
            config.block[0], config.shared_bytes, config.stream = threads, shared_bytes, stream
            status = self._launch_ex(self._config_address, self._handle, arguments, None)
            if status:
                raise KernelError(f"launch of {self._name} {grid} x {threads} failed: CUDA error {status}")
            return
        try:
            self._driver.launchKernel(
                self._handle, grid[0], grid[1], grid[2], threads, 1, 1, shared_bytes, stream, arguments, 0
            )
        except self._driver.CUDADriverError as error:
            raise KernelError(f"launch of {self._name} {grid} x {threads} failed: {_first_line(error)}") from error

    def _allow(self, shared_bytes: int) -> None:
        try:
            self._function.max_dynamic_shared_size_bytes = shared_bytes
            self._function.preferred_shared_memory_carveout = 100  # or fewer CTAs may be resident than fit
        except self._driver.CUDADriverError as error:
            raise KernelError(
                f"{self._name} needs {shared_bytes} bytes of shared memory, more than this GPU has"
            ) from error
        self._shared_bytes = shared_bytes


_backends: dict[str, Backend] = {"cuda": CupyBackend()}


def register_backend(device_type: str, backend: Backend | None) -> None:
    """Runs kernels on tensors of `device_type` through `backend` from now on; None takes it away. For tests."""
    if backend is None:
        _backends.pop(device_type, None)
    else:
        _backends[device_type] = backend
    _load.cache_clear()
    limits.cache_clear()


def _backend(device: torch.device) -> Backend:
    backend = _backends.get(device.type)
    if backend is None:
        raise KernelError(f"no CUDA kernels for tensors on {device}; use kernels.reference there")
    return backend


@functools.cache
def limits(device: torch.device) -> DeviceLimits:
    """What launches on `device` must fit. Raises KernelError."""
    return _backend(device).limits(device)


def tensor_map(device: torch.device, matrix: TensorMap) -> bytes:
    """`matrix` as an argument of kernels on `device`, of type TensorMap. Raises KernelError."""
    return _backend(device).tensor_map(matrix)


@functools.cache
def _load(file: str, name: str, device: torch.device, defines: Defines) -> Kernel:
    text = source(file, dict(defines))
    return Kernel(_backend(device).load(text, name, device), parameters(text, name))


def kernel(file: str, name: str, device: torch.device, **defines: object) -> Kernel:
    """The kernel `name` of `csrc/<file>` for `device`, compiled with `defines`; kept for the life of the process.

    Raises KernelError.
    """
    return _load(file, name, device, tuple((key, str(value)) for key, value in defines.items()))
