"""The layout of KV blocks in memory, said once. Pool, host arena, kernels and torch twins all take it from here.

Block-major: all layers of one block lie together, so that a swap is one large copy per block.

    pool[block, layer, 0 = key | 1 = value, kv_head, offset in block, element]

One layer of the pool, `layer_view(pool, layer)`, is a view `[num_blocks, 2, num_kv_heads, block_size, head_dim]`:
contiguous inside a block, `block_elements` apart from block to block. Kernels must take that stride from the tensor and
index with 64-bit offsets.

Token `position` of a sequence lies in block `block_table[position // block_size]` at offset `position % block_size`.
Its slot mapping, the one number that names the place, is `block * block_size + offset`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_BLOCK_SIZE = 256


@dataclass(frozen=True)
class KvLayout:
    """Shape and type of a KV block."""

    num_layers: int
    """Layers that keep keys and values."""
    num_kv_heads: int
    """Key and value heads (of this rank)."""
    block_size: int
    """Tokens in a block, a power of two in 1..256."""
    head_dim: int
    """Elements of one head."""
    dtype: torch.dtype
    """Element type of keys and values."""

    def __post_init__(self) -> None:
        size = self.block_size
        if not (1 <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0):
            raise ValueError(f"block_size must be a power of two in 1..{MAX_BLOCK_SIZE}, not {size}")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) < 1:
            raise ValueError(f"num_layers, num_kv_heads and head_dim must be positive: {self}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[num_layers, 2, num_kv_heads, block_size, head_dim]."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_elements(self) -> int:
        """Elements of one block over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.block_elements * self.dtype.itemsize

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Shape of a pool or arena of `num_blocks` blocks."""
        return (num_blocks, *self.block_shape)

    def check_pool(self, pool: torch.Tensor) -> None:
        """Raises ValueError unless `pool` is a contiguous pool of this layout."""
        if tuple(pool.shape[1:]) != self.block_shape or pool.dtype != self.dtype or not pool.is_contiguous():
            raise ValueError(f"not a pool of {self}: {tuple(pool.shape)} {pool.dtype}")

    @staticmethod
    def layer_view(pool: torch.Tensor, layer: int) -> torch.Tensor:
        """One layer of a pool: a view [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
        return pool[:, layer]
