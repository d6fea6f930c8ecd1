"""A KV layer with sequences at random places, and the dense float64 attention that paged attention must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

GARBAGE_BLOCK = 2**31 - 1
"""What stands in block tables behind the last block: reading it would raise."""


@dataclass
class PagedLayer:
    """One layer of a pool. Slots that hold no token are NaN. keys and values have each sequence's own, dense."""

    kv_layer: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slots: list[torch.Tensor]


def make_layer(
    lengths: list[int],
    *,
    block_size: int,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedLayer:
    """Sequences of the given lengths in random blocks of the middle layer of a three-layer pool."""
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [-(-length // block_size) for length in lengths]
    num_blocks = sum(blocks_of) + 3
    pool = torch.full((num_blocks, 3, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    layer = pool[:, 1]
    free = torch.randperm(num_blocks, generator=generator)
    tables = torch.full((len(lengths), max(blocks_of) + 2), GARBAGE_BLOCK, dtype=torch.int32)
    paged = PagedLayer(layer, tables, torch.tensor(lengths, dtype=torch.int32), [], [], [])
    for row, length in enumerate(lengths):
        blocks, free = free[: blocks_of[row]], free[blocks_of[row] :]
        tables[row, : blocks_of[row]] = blocks.int()
        key, value = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        for position in range(length):
            block, offset = int(blocks[position // block_size]), position % block_size
            layer[block, 0, :, offset] = key[position]
            layer[block, 1, :, offset] = value[position]
        positions = torch.arange(length)
        paged.keys.append(key)
        paged.values.append(value)
        paged.slots.append(blocks[positions // block_size] * block_size + positions % block_size)
    return paged


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """float64 attention of one sequence, one query and one head at a time: query [Tq, Hq, D] are its last tokens."""
    query, key, value = query.double(), key.double(), value.double()
    num_tokens, num_heads, _ = query.shape
    context, num_kv_heads, _ = key.shape
    output = torch.empty_like(query)
    for token in range(num_tokens):
        position = context - num_tokens + token
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = key[first : position + 1, kv_head] @ query[token, head] * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            output[token, head] = torch.softmax(scores, 0) @ value[first : position + 1, kv_head]
    return output


def scale_of(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim)
