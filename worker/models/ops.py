"""The small operations that models share, apart from matrix products and attention, by device.

One seam: a model takes its operations from here once, so that fused kernels can take over without a model knowing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kernels import activation, cache, linear_wgmma, norm, reference
from kernels.reference import Product

_WIDEST_NORM = 32 * 1024
"""Elements of the widest row that the norm kernel takes."""


class LayerOps(Protocol):
    """Operations between matrix products. `kernels.reference.layers` documents each."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension, computed in float32."""
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream, then normalises: (normed sum, sum). `residual` must not be read afterwards;
        hidden may be in parts."""
        ...

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates the heads of queries and keys by position."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU's gate: silu(gate) * up of [T, 2 * I], gate first."""
        ...

    def takes_tokens(self, num_tokens: int, weight: torch.Tensor, *, by: Product) -> bool:
        """Whether the product of this name takes num_tokens rows times this matrix, and is better than the library."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A product."""
        ...

    def linear_parts(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A product in parts that `add_rms_norm` adds up."""
        ...

    def linear_gated(self, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """A product, then SwiGLU's gate."""
        ...


class CudaOps:
    """The kernels of `csrc/`; torch twins for rows that do not come in steps of 16 bytes."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As in LayerOps."""
        rms_norm = norm.rms_norm if _fits_norm(hidden) else reference.rms_norm
        return rms_norm(hidden, weight, eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in LayerOps; the sum replaces `residual`."""
        add_rms_norm = norm.add_rms_norm if _fits_norm(residual) else reference.add_rms_norm
        return add_rms_norm(hidden, residual, weight, eps)

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in LayerOps."""
        return cache.rope(query, key, positions, cos_sin)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As in LayerOps."""
        fits = gate_up.shape[-1] // 2 % (16 // gate_up.element_size()) == 0
        silu_and_mul = activation.silu_and_mul if fits else reference.silu_and_mul
        return silu_and_mul(gate_up)

    takes_tokens = staticmethod(linear_wgmma.takes_tokens)
    linear = staticmethod(linear_wgmma.linear)
    linear_parts = staticmethod(linear_wgmma.linear_parts)
    linear_gated = staticmethod(linear_wgmma.linear_gated)


def _fits_norm(hidden: torch.Tensor) -> bool:
    width = hidden.shape[-1]
    return width % (16 // hidden.element_size()) == 0 and width <= _WIDEST_NORM


_CUDA_OPS = CudaOps()


def ops_for(device: torch.device) -> LayerOps:
    """The operations for tensors on `device`."""
    return _CUDA_OPS if device.type == "cuda" else reference
