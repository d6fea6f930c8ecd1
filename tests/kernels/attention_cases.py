"""Paged caches with traps, and attention in float64 to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.reference import SharedPrefix

UNUSED_BLOCK = 2**30
"""What block tables hold behind a sequence's last block: dereferencing it would be far outside any pool."""


@dataclass(frozen=True)
class Case:
    """One attention problem: S sequences with context_lens[s] tokens in the cache; the last new_lens[s] of them ask."""

    query: torch.Tensor
    """[sum of new_lens, heads, head_dim]."""
    kv_layer: torch.Tensor
    """A layer of a pool of three, its unused slots and the other layers NaN."""
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    scale: float
    keys: Sequence[torch.Tensor]
    """Per sequence [context, kv_heads, head_dim], what the cache should hold."""
    values: Sequence[torch.Tensor]


def make_case(
    context_lens: Sequence[int],
    *,
    new_lens: Sequence[int] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Random keys, values and queries in randomly placed blocks."""
    generator = torch.Generator().manual_seed(seed)
    new_lens = [min(1, n) for n in context_lens] if new_lens is None else new_lens
    num_blocks = [-(-n // block_size) for n in context_lens]
    total_blocks = sum(num_blocks) + 3
    free = torch.randperm(total_blocks, generator=generator).tolist()
    pool = torch.full((total_blocks, 3, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    tables = torch.full((len(context_lens), max([1, *num_blocks]) + 1), UNUSED_BLOCK, dtype=torch.int32)
    keys, values = [], []
    for row, length in enumerate(context_lens):
        key, value = (torch.randn(length, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        for column in range(num_blocks[row]):
            block = free.pop()
            tables[row, column] = block
            part = slice(column * block_size, min((column + 1) * block_size, length))
            pool[block, 1, 0, :, : part.stop - part.start] = key[part].transpose(0, 1)
            pool[block, 1, 1, :, : part.stop - part.start] = value[part].transpose(0, 1)
        keys.append(key)
        values.append(value)
    starts = torch.tensor([0, *new_lens]).cumsum(0).to(torch.int32)
    query = torch.randn(int(starts[-1]), heads, head_dim, generator=generator).to(dtype)
    return Case(
        query=query.to(device),
        kv_layer=pool.to(device)[:, 1],
        block_tables=tables.to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_start=starts.to(device),
        scale=head_dim**-0.5,
        keys=keys,
        values=values,
    )


def share_prefix(case: Case, rows: Sequence[int], num_tokens: int) -> tuple[Case, SharedPrefix]:
    """The case with `num_tokens` tokens, whole blocks, of rows[0] at the beginning of all `rows`; one query each."""
    tables, keys, values = case.block_tables.clone(), list(case.keys), list(case.values)
    columns = num_tokens // case.kv_layer.shape[3]
    for row in rows[1:]:
        tables[row, :columns] = tables[rows[0], :columns]
        keys[row] = torch.cat((keys[rows[0]][:num_tokens], keys[row][num_tokens:]))
        values[row] = torch.cat((values[rows[0]][:num_tokens], values[row][num_tokens:]))
    row_lens = torch.zeros_like(case.context_lens)
    row_lens[list(rows)] = num_tokens
    shared = SharedPrefix(
        block_table=tables[rows[0] : rows[0] + 1],
        length=row_lens[rows[0] : rows[0] + 1],
        row_lens=row_lens,
        query_start=torch.tensor([0, len(tables)], dtype=torch.int32, device=tables.device),
    )
    return replace(case, block_tables=tables, keys=keys, values=values), shared


def expected(case: Case, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
    """Attention of every query token in float64 on the CPU, [tokens, heads, head_dim]; rows of no context are zero."""
    query = case.query.cpu().double()
    starts = case.query_start.tolist()
    output = torch.zeros_like(query)
    for row, (key, value) in enumerate(zip(case.keys, case.values, strict=True)):
        group = query.shape[1] // key.shape[1]
        wide_key, wide_value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
        for token in range(starts[row], starts[row + 1]):
            end = key.shape[0] - (starts[row + 1] - token) + 1
            first = 0 if sliding_window is None else max(0, end - sliding_window)
            if end <= 0:
                continue
            scores = torch.einsum("hd,thd->ht", query[token], wide_key[first:end]) * case.scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            output[token] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=-1), wide_value[first:end])
    return output


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN if anything is."""
    return float((actual.cpu().double() - reference).norm() / reference.norm())
