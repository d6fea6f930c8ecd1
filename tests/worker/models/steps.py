"""Runs a model over sequences in steps, with plain contiguous caches or with the real paged pool."""

from __future__ import annotations

import random

import torch

from kernels.backend import kernels_for
from kernels.kv_layout import KvLayout
from worker.attention_batch import AttentionBatch
from worker.models.base import PagedAttention, PagedModel
from worker.models.dense import DenseCache

CPU = torch.device("cpu")


class PagedCache:
    """A KV pool of NaN, with blocks handed out in random order; makes the batch of a step as the executor would."""

    def __init__(self, model: PagedModel, block_size: int, num_blocks: int = 96, device: torch.device = CPU) -> None:
        spec = model.spec
        self.layout = KvLayout(spec.num_layers, spec.num_kv_heads, block_size, spec.head_dim, spec.dtype)
        self.pool = torch.full(self.layout.pool_shape(num_blocks), float("nan"), dtype=spec.dtype, device=device)
        self.free = random.Random(0).sample(range(num_blocks), num_blocks)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def batch(self, parts: list[tuple[int, int]]) -> PagedAttention:
        """One step over (sequence, number of its next tokens); single tokens are decode rows and come first."""
        slots: list[int] = []
        for sequence, count in parts:
            table = self.tables.setdefault(sequence, [])
            start = self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + count
            while len(table) < self.layout.blocks_for(start + count):
                table.append(self.free.pop())
            size = self.layout.block_size
            slots += [table[at // size] * size + at % size for at in range(start, start + count)]
        num_decode = next((at for at, (_, count) in enumerate(parts) if count > 1), len(parts))
        decodes, chunks = parts[:num_decode], parts[num_decode:]
        starts = [0]
        for _, count in chunks:
            starts.append(starts[-1] + count)
        return AttentionBatch(
            layout=self.layout,
            pool=self.pool,
            kernels=kernels_for(self.pool.device, self.layout),
            slot_mapping=torch.tensor(slots, device=self.pool.device),
            num_decode=num_decode,
            decode_block_tables=self._tables(decodes),
            decode_context_lens=self._lengths(decodes),
            chunk_block_tables=self._tables(chunks),
            chunk_context_lens=self._lengths(chunks),
            chunk_query_start=torch.tensor(starts, dtype=torch.int32, device=self.pool.device),
            chunks_from=num_decode,
            on_progress=lambda: None,
        )

    def _tables(self, parts: list[tuple[int, int]]) -> torch.Tensor:
        rows = [self.tables[sequence] for sequence, _ in parts]
        width = max((len(row) for row in rows), default=0)
        padded = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.pool.device).view(len(rows), width)

    def _lengths(self, parts: list[tuple[int, int]]) -> torch.Tensor:
        lengths = [self.lengths[sequence] for sequence, _ in parts]
        return torch.tensor(lengths, dtype=torch.int32, device=self.pool.device)


def run_steps(
    model: PagedModel,
    cache: DenseCache | PagedCache,
    sequences: list[list[int]],
    steps: list[list[tuple[int, int]]],
    device: torch.device = CPU,
) -> list[torch.Tensor]:
    """Logits of every token, float32 [T, vocab_size] per sequence, on the CPU; a step lists (sequence, number of next
    tokens). `device` is the model's."""
    done = [0] * len(sequences)
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    for parts in steps:
        spans = [(sequence, done[sequence], done[sequence] + count) for sequence, count in parts]
        token_ids = torch.tensor([token for at, start, end in spans for token in sequences[at][start:end]])
        positions = torch.tensor([position for _, start, end in spans for position in range(start, end)])
        logits = model.logits(model.forward(token_ids.to(device), positions.to(device), cache.batch(parts))).cpu()
        for (sequence, _, end), part in zip(spans, logits.split([count for _, count in parts]), strict=True):
            rows[sequence].append(part)
            done[sequence] = end
    return [torch.cat(parts) for parts in rows]


def greedy(
    model: PagedModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    chunk: int,
    block_size: int,
    device: torch.device = CPU,
) -> list[int]:
    """Greedy decoding through the paged pool, the prompt in chunks: the tokens, as many as asked for."""
    cache = PagedCache(model, block_size, device=device)
    output: list[int] = []
    pending, position = list(prompt), 0
    while len(output) < max_new_tokens:
        step, pending = pending[:chunk], pending[chunk:]
        positions = torch.arange(position, position + len(step), device=device)
        hidden = model.forward(torch.tensor(step, device=device), positions, cache.batch([(0, len(step))]))
        position += len(step)
        if not pending:
            output.append(int(model.logits(hidden[-1:]).argmax()))
            pending = [output[-1]]
    return output
