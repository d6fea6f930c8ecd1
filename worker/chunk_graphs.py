"""Steps with chunks as CUDA graphs: the forward pass over static buffers, padded to a few sizes.

Launching a forward pass kernel by kernel takes the host longer than small chunks take the device. Rows are the decode
set's, then the chunks', then padding, which belongs to no sequence: it is stored nowhere and attends to nothing, and
nobody reads its hidden states. Where decode rows end is known on the device only; graphs differ in how many there may
be. Sampling stays outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from kernels.backend import Kernels
from worker.attention_batch import AttentionBatch
from worker.batch import Batch, StepLayout
from worker.decode import capture_graph, decode_rows
from worker.device import DeviceRuntime
from worker.models.base import PagedModel
from worker.upload import Upload

ROWS = range(32, 1024 + 1, 32)
"""Sizes that a step's rows are padded to, all of them together. Longer steps last longer than launching them does."""
MOST_CHUNKS = 16
"""Chunks of a step that a graph takes."""
DECODE_ROWS = (16, 64, 256)
"""Of how many rows at most the decode set beside chunks is, as far as it can grow; and 0."""


@dataclass(frozen=True)
class Size:
    """What a graph takes."""

    more_decode_than: int
    """Rows that the decode set has more than."""
    decode: int
    """Rows that the decode set has at most."""
    rows: int
    """Of all kinds."""

    @property
    def chunks_from(self) -> int:
        """The first row that may be a chunk's."""
        return self.more_decode_than + 1

    def holds(self, num_decode: int, num_rows: int) -> bool:
        """Whether a step of so many decode rows and rows of all kinds fits."""
        return self.more_decode_than < num_decode <= self.decode and num_rows <= self.rows


class ChunkStep:
    """The forward pass over one decode row per sequence and up to MOST_CHUNKS chunks, from static buffers."""

    def __init__(
        self,
        model: PagedModel,
        pool: torch.Tensor,
        kernels: Kernels,
        batch: Batch,
        on_progress: Callable[[], None],
        most_rows: int,
    ) -> None:
        self.model, self.pool, self.kernels, self.batch = model, pool, kernels, batch
        self.on_progress = on_progress
        device = batch.tokens.device
        self.rows = torch.zeros((3, most_rows), dtype=torch.int64, device=device)
        """Token ids, positions and slot mapping of all rows; of decode rows once they have been computed."""
        self.slots = torch.full((MOST_CHUNKS,), batch.padding_slot, dtype=torch.int64, device=device)
        self.lens = torch.zeros(MOST_CHUNKS, dtype=torch.int32, device=device)
        self.query_start = torch.zeros(MOST_CHUNKS + 1, dtype=torch.int32, device=device)

    def stage(self, layout: StepLayout, size: Size, upload: Upload) -> None:
        """Puts a step's inputs into the upload, padded."""
        first, chunks = layout.num_decode, layout.chunk_slots.size
        rows = np.zeros((3, size.rows), dtype=np.int64)
        rows[2] = -1
        rows[:, first : layout.num_tokens] = layout.token_ids, layout.positions, layout.slot_mapping
        slots = np.full(MOST_CHUNKS, self.batch.padding_slot, dtype=np.int64)
        slots[:chunks] = layout.chunk_slots
        lens = np.zeros(MOST_CHUNKS, dtype=np.int32)
        lens[:chunks] = layout.chunk_lens
        query_start = np.full(MOST_CHUNKS + 1, layout.query_start[-1], dtype=np.int32)
        query_start[: chunks + 1] = layout.query_start
        query_start += first - size.chunks_from
        decode = np.full(size.decode, self.batch.padding_slot, dtype=np.int64)
        decode[:first] = layout.decode_slots
        placed = [upload.put(numbers, numbers.dtype) for numbers in (rows, slots, lens, query_start, decode)]

        def fill() -> None:
            self.rows[:, : size.rows].copy_(placed[0].tensor.view(3, -1))
            self.slots.copy_(placed[1].tensor)
            self.lens.copy_(placed[2].tensor)
            self.query_start.copy_(placed[3].tensor)
            if size.decode:
                self.batch.decode_rows[: size.decode].copy_(placed[4].tensor)

        upload.then(fill)

    def run(self, size: Size) -> torch.Tensor:
        """Hidden states of all rows: [size.rows, hidden_size]."""
        batch = self.batch
        token_ids, positions, slot_mapping = self.rows[:, : size.rows]
        decode = decode_rows(self.kernels, batch, size.decode, batch.columns)
        if size.decode:
            is_decode = decode.context_lens > 0
            for rows, computed in (
                (token_ids, decode.token_ids),
                (positions, decode.positions),
                (slot_mapping, decode.slot_mapping),
            ):
                torch.where(is_decode, computed, rows[: size.decode], out=rows[: size.decode])
        attention = AttentionBatch(
            layout=batch.layout,
            pool=self.pool,
            kernels=self.kernels,
            slot_mapping=slot_mapping,
            num_decode=size.decode,
            decode_block_tables=decode.block_tables,
            decode_context_lens=decode.context_lens,
            chunk_block_tables=batch.block_tables.index_select(0, self.slots),
            chunk_context_lens=self.lens,
            chunk_query_start=self.query_start,
            chunks_from=size.chunks_from,
            on_progress=self.on_progress,
        )
        return self.model.forward(token_ids, positions, attention)


class ChunkGraphs:
    """Which steps with chunks have a graph, and the graphs."""

    def __init__(self, step: ChunkStep) -> None:
        self.step = step
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._ns: dict[int, int] = {}
        """What so many rows take, once measured."""

    def size(self, layout: StepLayout) -> Size | None:
        """The captured size that a step fits: the fastest, or the smallest as long as none has been measured. None: it
        runs kernel by kernel."""
        if not self._graphs or not layout.chunks or len(layout.chunks) > MOST_CHUNKS:
            return None
        if self.step.batch.shared is not None:  # reading a prefix once gains more than launching costs
            return None
        fitting = (size for size in self._graphs if size.holds(layout.num_decode, layout.num_tokens))
        return min(fitting, key=lambda size: self._ns.get(size.rows, size.rows), default=None)

    def run(self, size: Size) -> torch.Tensor:
        """As ChunkStep.run; the tensor is written over by the next run."""
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden

    @torch.inference_mode()
    def capture(self, memory: object, most_decode: int) -> Iterator[tuple[int, int]]:
        """Captures a graph per size, largest first, in the memory of other graphs. Yields (done, of all).

        A model that cannot be captured keeps running its chunks kernel by kernel.
        """
        sizes = self._sizes(most_decode)
        device = self.step.batch.tokens.device
        stream = torch.cuda.Stream(device)
        for done, size in enumerate(sizes):
            self.step.rows[2].fill_(-1)
            captured = capture_graph(lambda size=size: self.step.run(size), device, stream, memory)  # type: ignore[misc]
            if captured is None:
                self._graphs.clear()
                return
            self._graphs[size] = captured
            yield done + 1, len(sizes)

    @torch.inference_mode()
    def measure(self, runtime: DeviceRuntime) -> Mapping[int, int]:
        """What the forward pass over each number of rows takes, in nanoseconds: the best of a few. All are padding, so
        that it makes no difference how many may decode."""
        self.step.rows[2].fill_(-1)
        for rows, graph in {size.rows: graph for size, (graph, _) in self._graphs.items()}.items():
            times = []
            for _ in range(5):
                start = runtime.mark()
                graph.replay()
                end = runtime.mark()
                runtime.wait(end)
                times.append(runtime.elapsed_ns(start, end))
            self._ns[rows] = min(times)
        return self._ns

    def _sizes(self, most_decode: int) -> Sequence[Size]:
        most_rows = self.step.rows.shape[1]
        decode = [-1, 0, *(rows for rows in DECODE_ROWS if rows < most_decode), most_decode]
        rows = [*(count for count in ROWS if count < most_rows), most_rows]
        return [
            Size(fewer, min(most, count), count)
            for count in reversed(rows)
            for fewer, most in pairwise(decode)
            if fewer + 1 < count
        ]
