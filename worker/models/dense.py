"""Attention over plain contiguous caches: the yardstick that load-time probes and tests hold models against."""

from __future__ import annotations

import torch

from kernels import reference


class DenseCache:
    """Keys and values of sequences as plain tensors, one per sequence and layer."""

    def __init__(self) -> None:
        self._cached: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def batch(self, parts: list[tuple[int, int]]) -> DenseBatch:
        """One step over `parts`: (sequence, number of its next tokens), in the order of the flat tokens."""
        return DenseBatch(self, parts)

    def append(self, sequence: int, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds [T, num_kv_heads, head_dim] behind what the sequence has in this layer."""
        if (sequence, layer) in self._cached:
            earlier_key, earlier_value = self._cached[sequence, layer]
            key, value = torch.cat((earlier_key, key)), torch.cat((earlier_value, value))
        self._cached[sequence, layer] = (key, value)

    def read(self, sequence: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole context, each [context, num_kv_heads, head_dim]."""
        return self._cached[sequence, layer]


class DenseBatch:
    """One step's attention over a DenseCache; a PagedAttention."""

    def __init__(self, cache: DenseCache, parts: list[tuple[int, int]]) -> None:
        self._cache = cache
        self._parts = parts

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """As in PagedAttention, one sequence after the other."""
        sizes = [size for _, size in self._parts]
        outputs = []
        for (sequence, _), queries, keys, values in zip(
            self._parts, torch.split(query, sizes), torch.split(key, sizes), torch.split(value, sizes), strict=True
        ):
            self._cache.append(sequence, layer, keys, values)
            context = self._cache.read(sequence, layer)
            outputs.append(causal_attention(queries, *context, scale, sliding_window, soft_cap))
        return torch.cat(outputs)

    def rotate_and_attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """As in PagedAttention."""
        query, key = reference.rope(query, key, positions, cos_sin)
        return self.attend(layer, query, key, value, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)

    def project_and_attend(
        self,
        layer: int,
        hidden: torch.Tensor,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """As in PagedAttention: not here."""
        return None


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attention of a context's last T tokens: query [T, Hq, D], key and value [context, Hkv, D], to [T, Hq, D]."""
    shared = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float().repeat_interleave(shared, dim=1)) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    keys = torch.arange(len(key), device=key.device)
    distance = keys[-len(query) :, None] - keys[None, :]
    hidden = distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float().repeat_interleave(shared, dim=1)).to(query.dtype)
