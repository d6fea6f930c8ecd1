"""Which implementation of the paged operations a device gets."""

from __future__ import annotations

from typing import Protocol

import torch

from kernels import reference


class PagedKernels(Protocol):
    """The operations on KV blocks. `kernels.reference` documents each: shapes, dtypes and meaning are the same."""

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Stores keys and values of T tokens in their cache slots."""

    def paged_attention_decode(
        self,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Attention of one new token per sequence."""
        ...

    def paged_attention_prefill(
        self,
        query: torch.Tensor,
        kv_layer: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        query_start: torch.Tensor,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Causal attention of chunks."""
        ...

    def copy_blocks(self, pool: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copies blocks within a pool."""

    def swap_blocks(
        self, source: torch.Tensor, destination: torch.Tensor, source_ids: torch.Tensor, destination_ids: torch.Tensor
    ) -> None:
        """Copies blocks between two pools."""


def kernels_for(device: torch.device) -> PagedKernels:
    """The paged operations for tensors on `device`."""
    del device  # every device runs the torch twins as long as there are no others
    return reference
