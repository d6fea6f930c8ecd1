"""The small operations that models share, apart from matrix products and attention, by device.

One seam: a model takes its operations from here once, so that fused kernels can take over without a model knowing.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kernels import reference


class LayerOps(Protocol):
    """Operations between matrix products. `kernels.reference.layers` documents each."""

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension, computed in float32."""
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the residual stream, then normalises: (normed sum, sum)."""
        ...

    def rope(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates the heads of queries and keys by position."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """SwiGLU's gate: silu(gate) * up of [T, 2 * I], gate first."""
        ...


def ops_for(device: torch.device) -> LayerOps:
    """The operations for tensors on `device`."""
    del device  # every device runs the torch twins as long as there are no others
    return reference
