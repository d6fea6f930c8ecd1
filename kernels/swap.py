"""Blocks between the KV pool and a pinned host arena. Twin: `kernels.reference.cache.swap_blocks`.

A block-major pool makes a block one contiguous piece, so the copy engines do it: one copy per run of neighbouring
blocks. Only pieces too small for them (tiny models) go through a kernel that reads and writes mapped host memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kernels import cache

SMALL_BLOCK_BYTES = 64 * 1024
"""Below this a copy's fixed cost, a few microseconds of host time, outweighs what the engines move meanwhile."""


def runs(sources: list[int], destinations: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first source, first destination, length) of stretches in which both advance by one."""
    start = 0
    for end in range(1, len(sources) + 1):
        broken = end == len(sources) or (
            sources[end] != sources[end - 1] + 1 or destinations[end] != destinations[end - 1] + 1
        )
        if broken and end > start:
            yield sources[start], destinations[start], end - start
            start = end


def swap_blocks(
    source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
) -> None:
    """As the twin, on torch's current stream; a host tensor must be pinned. Ids on the host avoid a synchronisation.

    Returns before the copies end: neither side may be reused until the stream has passed them.
    Raises ValueError, KernelError.
    """
    if source.shape[1:] != destination.shape[1:] or source.dtype != destination.dtype:
        raise ValueError(f"blocks differ: {source.shape} {source.dtype}, {destination.shape} {destination.dtype}")
    device = cache.copying_device(source, destination)
    block_bytes = source[0].numel() * source.element_size()
    if block_bytes < SMALL_BLOCK_BYTES and block_bytes % 16 == 0 and device.type == "cuda":
        ids = (ids.to(device, non_blocking=True) for ids in (source_ids, destination_ids))
        cache.launch_copies(source, destination, *ids)
        return
    pieces = runs(source_ids.tolist(), destination_ids.tolist())
    if device.type != "cuda":
        for first_source, first_destination, length in pieces:
            destination[first_destination : first_destination + length].copy_(
                source[first_source : first_source + length]
            )
        return
    if not (source.is_contiguous() and destination.is_contiguous()):
        raise ValueError("blocks must be contiguous")
    # Not torch's copies: those of a group or of the host tier are hundreds, at ten times the host's time each.
    from cupy.cuda import runtime

    stream = torch.cuda.current_stream(device).cuda_stream
    for first_source, first_destination, length in pieces:
        runtime.memcpyAsync(
            destination.data_ptr() + first_destination * block_bytes,
            source.data_ptr() + first_source * block_bytes,
            length * block_bytes,
            runtime.memcpyDefault,
            stream,
        )
