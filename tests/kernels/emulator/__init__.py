"""Runs the CUDA kernels on CPU tensors: their source compiled as C++ with `emulator.h`, a fiber per CUDA thread."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from kernels import compile as kernel_compile

HERE = Path(__file__).parent

OPTIONS = "-std=c++17 -O1 -g1 -shared -fPIC -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off -w"
"""Unique symbols would share the emulator's state among kernels."""

ENTRY = """
extern "C" int emulated_launch(unsigned x, unsigned y, unsigned z, int threads, size_t shared, void** arguments,
                               unsigned seed) {{
  return emulator::run({name}, {{x, y, z}}, threads, shared, {cluster}, arguments, seed);
}}
extern "C" void emulated_late(unsigned char* place, size_t bytes) {{
  if (place) emulator::late.push_back({{place, {{place, place + bytes}}}});
  else emulator::arrive(), emulator::late.clear();
}}
extern "C" const char* emulated_failure() {{ return emulator::failure; }}
extern "C" long emulated_bank_conflicts() {{ return emulator::bank_conflicts; }}
"""

_TENSOR_MAP = struct.Struct("<QQII5Q4Q5I12x")
"""EncodedMap of hopper.h: magic number, address, bytes of an element, rank, sizes, strides, box."""
_TENSOR_MAP_MAGIC = 0x70616D20726F736E


class EmulatorBackend:
    """A device of `num_processors` multiprocessors that runs threads in an order drawn from `seed`."""

    def __init__(self, folder: Path, num_processors: int = 3, seed: int = 0, *, wgmma: bool = True) -> None:
        self._folder = folder
        self.wgmma = wgmma
        self.num_processors = num_processors
        self._random = random.Random(seed)
        self.libraries: list[ctypes.CDLL] = []
        self.late: list[torch.Tensor] = []
        """Contiguous inputs that the kernel before has yet to write when one that waits for it is launched: NaN until a
        thread waits. Copying them before that fails."""

    @staticmethod
    def missing() -> str | None:
        """Why it cannot run here, if it cannot."""
        return None if shutil.which("g++") else "the kernel emulator needs g++"

    def limits(self, device: torch.device) -> kernel_compile.DeviceLimits:
        return kernel_compile.DeviceLimits(self.num_processors, 227 * 1024, 228 * 1024, self.wgmma)

    def load(self, text: str, name: str, device: torch.device) -> EmulatedKernel:
        cluster = re.search(rf"__cluster_dims__\((\w+), 1, 1\)[^;{{}}]*?\b{name}\(", text)
        entry = ENTRY.format(name=name, cluster=cluster.group(1) if cluster else 1)
        text = f"#define PAGEWIRE_EMULATED\n{text}\n{entry}"
        headers = "".join(header.read_text() for header in sorted(HERE.glob("*.h")))
        key = hashlib.sha256((text + headers + OPTIONS).encode()).hexdigest()[:24]
        library = self._folder / f"{name}-{key}.so"
        # Test processes side by side share the folder: one builds, and the others wait for it.
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _build(text, name, library)
        loaded = ctypes.CDLL(str(library))
        loaded.emulated_failure.restype = ctypes.c_char_p
        loaded.emulated_bank_conflicts.restype = ctypes.c_long
        self.libraries.append(loaded)
        late = self.late if kernel_compile.waits_for_previous(text, name) else []
        return EmulatedKernel(loaded, name, self._random, late)

    def tensor_map(self, matrix: kernel_compile.TensorMap) -> bytes:
        """Raises KernelError for what the driver refuses: see cuTensorMapEncodeTiled."""
        rank, element = len(matrix.sizes), matrix.dtype.itemsize
        complaints = {
            "elements are not of two bytes": element != 2,
            "the numbers of sizes, strides and a box do not agree": not (
                1 <= rank <= 5 and len(matrix.strides) == rank - 1 and len(matrix.box) == rank
            ),
            "an address that is not a multiple of 16": matrix.address % 16 != 0,
            "a size out of range": not all(1 <= size <= 1 << 32 for size in matrix.sizes),
            "a stride out of range": not all(0 <= stride < 1 << 40 and stride % 16 == 0 for stride in matrix.strides),
            "a box out of range": not all(1 <= size <= 256 for size in matrix.box),
            "a box that is not 128 bytes wide, as its swizzle": matrix.box[0] * element != 128,
        }
        for complaint, applies in complaints.items():
            if applies:
                raise kernel_compile.KernelError(f"the emulator refuses a tensor map of {matrix}: {complaint}")
        sizes, strides, box = (
            (*values, *(0,) * (count - len(values)))
            for values, count in ((matrix.sizes, 5), (matrix.strides, 4), (matrix.box, 5))
        )
        return _TENSOR_MAP.pack(_TENSOR_MAP_MAGIC, matrix.address, element, rank, *sizes, *strides, *box)

    def bank_conflicts(self) -> int:
        """Extra cycles that ldmatrix needed so far, over all kernels loaded."""
        return sum(library.emulated_bank_conflicts() for library in self.libraries)


def _build(text: str, name: str, library: Path) -> None:
    """Compiles a kernel's text to a library, which appears whole or not at all."""
    source, unfinished = library.with_suffix(".cpp"), library.with_suffix(".unfinished")
    source.write_text(text)
    built = subprocess.run(
        ["g++", *OPTIONS.split(), f"-I{HERE}", "-o", str(unfinished), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0:
        raise kernel_compile.KernelError(f"g++ refuses {name}: {built.stderr[:2000]}")
    unfinished.rename(library)


class EmulatedKernel:
    """One kernel in one shared library."""

    def __init__(self, library: ctypes.CDLL, name: str, randomness: random.Random, late: list[torch.Tensor]) -> None:
        self._library = library
        self._name = name
        self._random = randomness
        self._late = late

    def launch(self, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: int) -> None:
        for tensor in self._late:
            assert tensor.is_contiguous()
            self._library.emulated_late(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
        status = self._library.emulated_launch(
            *(ctypes.c_uint(n) for n in grid),
            ctypes.c_int(threads),
            ctypes.c_size_t(shared_bytes),
            ctypes.c_void_p(arguments),
            ctypes.c_uint(self._random.getrandbits(32)),
        )
        if self._late:
            self._library.emulated_late(None, ctypes.c_size_t(0))
        if status != 0:
            raise kernel_compile.KernelError(f"{self._name}: {self._library.emulated_failure().decode()}")
