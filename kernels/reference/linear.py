"""Matrix products with the small operations around them."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from kernels.reference.layers import silu_and_mul

Product = Literal["linear", "linear_parts", "linear_gated"]
"""The products, by function."""


def takes_tokens(num_tokens: int, weight: torch.Tensor, *, by: Product) -> bool:
    """Whether the function of this name is the better way to multiply num_tokens rows: not here."""
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
