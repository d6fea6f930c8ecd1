"""Matrix products with the small operations around them."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from kernels.reference.cache import rope_and_cache
from kernels.reference.layers import silu_and_mul

Product = Literal["linear", "linear_parts", "linear_gated", "linear_rotated"]
"""The products, by function."""


def takes_tokens(num_tokens: int, weight: torch.Tensor, *, by: Product) -> bool:
    """Whether the function of this name is the better way to multiply num_tokens rows: not here."""
    return False


def takes_rotation(num_tokens: int, qkv: torch.Tensor, cos_sin: torch.Tensor, kv_layer: torch.Tensor) -> bool:
    """Whether `linear_rotated` is the better way for num_tokens rows: not here."""
    return False


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype."""
    return functional.linear(x.float(), weight.float()).to(x.dtype)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed in parts of K: float32 [parts, B, N], whose sum it is."""
    return functional.linear(x.float(), weight.float())[None]


def linear_gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x times gate_up [2 * I, K] transposed, gate rows first: [B, I] of x's dtype."""
    return silu_and_mul(functional.linear(x.float(), gate_up.float())).to(x.dtype)


def linear_rotated(
    x: torch.Tensor,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    settled: bool = False,
) -> torch.Tensor:
    """`rope_and_cache` of x [T, K] times qkv [(Hq + 2 Hkv) D, K], query rows, key rows, value rows: stores the rotated
    keys and the values, returns the rotated query [T, Hq, D]. cos_sin is as wide as a head: all of it turns."""
    num_kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
    heads = linear(x, qkv).view(len(x), -1, head_dim)
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return rope_and_cache(query, key, value, positions, cos_sin, kv_layer, slot_mapping)
