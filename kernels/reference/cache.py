"""Writing and moving KV blocks. The layout is `kernels.kv_layout`'s."""

from __future__ import annotations

import torch

from kernels.reference.layers import rope

_PIECE_BYTES = 64 << 20
"""Most bytes a block copy holds in a temporary: copies of any number of blocks need bounded memory."""


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Stores the keys and values of T tokens in their cache slots, in place.

    key and value are [T, num_kv_heads, head_dim] of the cache's dtype; kv_layer is a layer view
    [num_blocks, 2, num_kv_heads, block_size, head_dim]; slot_mapping is int64 [T], `block * block_size + offset`, no
    value twice. A negative slot is not written (padding of a captured graph).
    """
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    block_size = kv_layer.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_layer[:, 0][blocks, :, offsets] = key
    kv_layer[:, 1][blocks, :, offsets] = value


def rope_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool = False,
    settled: bool = False,
) -> torch.Tensor:
    """`rope` and `write_kv` in one: stores the rotated keys and the values, returns the rotated query [T, Hq, D].

    `settled` changes nothing here.
    """
    query, key = rope(query, key, positions, cos_sin, interleaved=interleaved)
    write_kv(key, value, kv_layer, slot_mapping)
    return query


def copy_blocks(pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copies whole blocks within a pool, in place: `pool[destinations[i]] = pool[sources[i]]`.

    pool is [num_blocks, ...], contiguous; sources and destinations are int64 [K]. No destination appears twice and no
    block is both a source and a destination: the copies may run in any order.
    """
    swap_blocks(pool, pool, sources, destinations)


def swap_blocks(
    source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
) -> None:
    """Copies whole blocks from one pool to another (KV pool to host arena or back).

    source and destination are [num_blocks, ...] of one block shape and dtype, contiguous, on any devices; the ids are
    int64 [K] on the device of the pool they index. No destination appears twice.
    """
    block_bytes = max(1, source[0].numel() * source.element_size())
    piece = max(1, _PIECE_BYTES // block_bytes)
    for start in range(0, source_ids.numel(), piece):
        blocks = source.index_select(0, source_ids[start : start + piece]).to(destination.device)
        destination.index_copy_(0, destination_ids[start : start + piece], blocks)
