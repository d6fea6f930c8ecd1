"""The worker's KV memory: the pool on the device and the swap arena on the host, one allocation each."""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernels.kv_layout import KvLayout
from pagewire.runtime.errors import StartError

GIB = 1 << 30
PAGE_BYTES = mmap.PAGESIZE
CPU_POOL_SHARE = 0.25
"""Share of the available RAM that the pool takes on the CPU backend: the machine has other work to do."""
CPU_POOL_CAP_BYTES = 16 * GIB
ARENA_SHARE = 0.1
"""Share of the available RAM that the swap arena takes at most by default."""


@dataclass(frozen=True)
class KvPool:
    """KV blocks on the device and host blocks that they can be swapped out to. Contents start undefined."""

    layout: KvLayout
    device_blocks: torch.Tensor
    """[num_blocks, *block_shape] on the device."""
    host_blocks: torch.Tensor
    """[host_blocks, *block_shape] in RAM, pinned where there is a GPU."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.device_blocks.shape[0]

    @property
    def num_host_blocks(self) -> int:
        """Blocks in the swap arena."""
        return self.host_blocks.shape[0]


def allocate(layout: KvLayout, *, num_blocks: int, host_blocks: int, device: torch.device) -> KvPool:
    """Allocates pool and arena. StartError if the memory cannot be had."""
    try:
        pool = torch.empty(layout.pool_shape(num_blocks), dtype=layout.dtype, device=device)
    except RuntimeError:
        raise StartError(_too_little("KV pool", num_blocks * layout.block_bytes, free_bytes(device))) from None
    try:
        if device.type == "cuda" and host_blocks:
            arena = pinned(layout, host_blocks)
        else:
            arena = torch.empty(layout.pool_shape(host_blocks), dtype=layout.dtype)
    except (MemoryError, RuntimeError):  # numpy's and torch's
        needed = host_blocks * layout.block_bytes
        raise StartError(_too_little("swap arena", needed, free_bytes(torch.device("cpu")), "--host-blocks")) from None
    return KvPool(layout, pool, arena)


def pinned(layout: KvLayout, host_blocks: int) -> torch.Tensor:
    """[host_blocks, *block_shape] in RAM, locked until it is freed, so that copies run beside computation.

    It has its pages for itself. Raises StartError with the system's reason if they cannot be locked, MemoryError if
    there is no such memory.
    """
    # torch's own pinned memory would round the size up to a power of two, gigabytes of it.
    size = host_blocks * layout.block_bytes
    memory = np.empty(size + 2 * PAGE_BYTES, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    address, cudart = memory.ctypes.data + start, torch.cuda.cudart()
    status = cudart.cudaHostRegister(address, -(-size // PAGE_BYTES) * PAGE_BYTES, 0)
    if int(status) != 0:
        reason = cudart.cudaGetErrorString(status)
        raise StartError(f"cannot lock the swap arena's {_gib(size)}: {reason}; lower --host-blocks, 0 does without it")
    # Tensors keep the array that their memory is from, and a finalizer runs before its array gives its memory back.
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False  # the end of a process does it itself
    return torch.from_numpy(memory[start : start + size]).view(layout.dtype).view(layout.pool_shape(host_blocks))


def pool_size(
    layout: KvLayout,
    *,
    wanted_blocks: int,
    max_num_seqs: int,
    max_model_len: int,
    free: int,
    device: torch.device,
    utilization: float = 0.9,
    reserved: int = 0,
) -> int:
    """Number of blocks for the pool.

    wanted_blocks is the setting; 0: as many as all `max_num_seqs` sequences of `max_model_len` tokens could use, within
    a share of the `free` bytes: on a GPU `utilization` of them, less the `reserved` bytes that steps need. Raises
    StartError when what is wanted, or by default one sequence, does not fit.
    """
    if wanted_blocks:
        if wanted_blocks * layout.block_bytes + reserved > free:
            raise StartError(_too_little("KV pool", wanted_blocks * layout.block_bytes + reserved, free))
        return wanted_blocks
    if device.type == "cpu":
        allowed = min(free * CPU_POOL_SHARE, CPU_POOL_CAP_BYTES)
    else:
        allowed = max(0, free * utilization - reserved)
    one_sequence = layout.blocks_for(max_model_len)
    num_blocks = min(int(allowed) // layout.block_bytes, one_sequence * max_num_seqs)
    if num_blocks < one_sequence:
        needed = one_sequence * layout.block_bytes
        raise StartError(
            f"too little memory for one sequence of {max_model_len} tokens: the KV pool needs {_gib(needed)}, of "
            f"{_gib(free)} free it may take {_gib(int(allowed))}; lower --max-model-len or give --num-blocks"
        )
    return num_blocks


def arena_size(layout: KvLayout, *, wanted_blocks: int | None, num_blocks: int, free_ram: int) -> int:
    """Number of host blocks: the setting, or half the pool's size within a share of the free RAM in bytes."""
    if wanted_blocks is None:
        return min(num_blocks // 2, int(free_ram * ARENA_SHARE) // layout.block_bytes)
    if wanted_blocks * layout.block_bytes > free_ram:
        needed = wanted_blocks * layout.block_bytes
        raise StartError(_too_little("swap arena", needed, free_ram, "--host-blocks"))
    return wanted_blocks


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device; on the CPU within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available_ram()
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _available_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _too_little(what: str, needed: int, free: int, setting: str = "--num-blocks") -> str:
    return f"too little memory for the {what}: {_gib(needed)} needed, {_gib(free)} free; lower {setting}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
