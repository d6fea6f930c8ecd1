"""The small operations between matrix products."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`hidden / sqrt(mean(hidden^2) + eps) * weight` over the last dimension, computed in float32.

    hidden is [..., H], weight [H]; returns hidden's shape and dtype. Also used per head, with H = head_dim.
    """
    wide = hidden.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(hidden.dtype)


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual stream, then normalises: returns (rms_norm(hidden + residual), hidden + residual).

    hidden and residual are [T, H] of one dtype; the sum is rounded to that dtype before it is normalised. hidden may
    also be float32 [parts, T, H], what `linear_parts` returns: its parts are added without a rounding before.
    """
    total = hidden + residual if hidden.dim() == 2 else (hidden.sum(0) + residual.float()).to(residual.dtype)
    return rms_norm(total, weight, eps), total


def rope(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys by their position (Su et al. 2021, RoFormer).

    query is [T, Hq, D], key [T, Hkv, D], positions int64 [T]; cos_sin is float32 [max_positions, rotary_dim]: the
    first half of a row are cosines, the second half sines, any scaling already in them. The first rotary_dim elements
    of each head turn, the others stay. Pairs are (i, i + rotary_dim/2), or (2i, 2i+1) when interleaved. Computed in
    float32; returns new tensors of the inputs' dtypes.
    """
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    return _rotate(query, cos, sin, rotary_dim, interleaved), _rotate(key, cos, sin, rotary_dim, interleaved)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dim: int, interleaved: bool) -> torch.Tensor:
    turned = heads[..., :dim].float()
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        pairs = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    pairs = pairs.to(heads.dtype)
    return pairs if dim == heads.shape[-1] else torch.cat((pairs, heads[..., dim:]), dim=-1)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [T, 2 * I], gate first: returns [T, I] of the same dtype, computed in float32."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate_up.dtype == torch.float32:
        return functional.silu(gate) * up
    return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)
