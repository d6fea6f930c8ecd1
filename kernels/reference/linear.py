"""Matrix products of a few tokens with the small operations around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from kernels.reference.layers import silu_and_mul

SQUARES_COLUMNS = 16
"""Columns whose squares one entry of `Normed.squares` sums."""


Product = Literal["linear", "linear_parts", "linear_gated"]
"""The products of many tokens, by function."""


@dataclass(frozen=True)
class Normed:
    """A residual stream that a product normalises (RMSNorm) while it reads it."""

    hidden: torch.Tensor
    """[B, K]: the residual stream."""
    squares: torch.Tensor
    """float32 [B, K / 16]: sums of its squares by 16 columns, as `linear_add` returns them."""
    weight: torch.Tensor
    """[K]"""
    eps: float

    def values(self) -> torch.Tensor:
        """The normalised values, [B, K] of hidden's dtype."""
        mean = self.squares.sum(-1, keepdim=True) / self.hidden.shape[1]
        return (self.hidden.float() * torch.rsqrt(mean + self.eps) * self.weight.float()).to(self.hidden.dtype)


def takes_few_tokens(num_tokens: int, *weights: torch.Tensor) -> bool:
    """Whether `linear`, `linear_gated` and `linear_add` are the better way to multiply so many rows: not here."""
    return False


def takes_many_tokens(num_tokens: int, weight: torch.Tensor, *, by: Product) -> bool:
    """Whether the function of this name is the better way to multiply more rows than a few: not here."""
    return False


def _values(x: torch.Tensor | Normed) -> torch.Tensor:
    return x.values() if isinstance(x, Normed) else x


def linear(x: torch.Tensor | Normed, weight: torch.Tensor, *, floating: bool = False) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype, or float32 if `floating`, without a rounding."""
    x = _values(x)
    wide = functional.linear(x.float(), weight.float())
    return wide if floating else wide.to(x.dtype)


def linear_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed in parts of K: float32 [parts, B, N], whose sum it is."""
    return linear(x, weight, floating=True)[None]


def linear_gated(x: torch.Tensor | Normed, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x times gate_up [2 * I, K] transposed, gate rows first: [B, I] of x's dtype."""
    x = _values(x)
    return silu_and_mul(functional.linear(x.float(), gate_up.float())).to(x.dtype)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Adds x times weight [N, K] transposed to residual [B, N], in place and rounded once.

    Returns float32 [B, N / 16]: sums of the new residual's squares by 16 columns.
    """
    residual.copy_(residual.float() + functional.linear(x.float(), weight.float()))
    return residual.float().square().view(len(residual), -1, SQUARES_COLUMNS).sum(-1)
