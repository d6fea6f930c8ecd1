"""Steps with chunks as CUDA graphs: the forward pass over static buffers, padded to a few sizes.

Launching a forward pass kernel by kernel takes the host longer than small chunks take the device. Padding rows belong
to no sequence: they are stored nowhere and attend to nothing, and nobody reads their hidden states. Sampling stays
outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.backend import Kernels
from worker.attention_batch import AttentionBatch
from worker.batch import Batch, StepLayout
from worker.decode import capture_graph, decode_rows
from worker.device import DeviceRuntime
from worker.models.base import PagedModel
from worker.upload import Upload

CHUNK_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Sizes that the tokens of all chunks together are padded to. Longer steps last longer than launching them does."""
MOST_CHUNKS = 16
"""Chunks of a step that a graph takes."""
DECODE_ROWS = (8, 16, 32, 64, 128, 256, 512)
"""Sizes that the decode set beside chunks is padded to, as far as it can grow; and 0."""


@dataclass(frozen=True)
class Size:
    """A step's rows with their padding."""

    decode: int
    """Decode rows, the first ones."""
    tokens: int
    """Rows of the chunks."""


class ChunkStep:
    """The forward pass over one decode row per sequence and up to MOST_CHUNKS chunks, from static buffers."""

    def __init__(
        self,
        model: PagedModel,
        pool: torch.Tensor,
        kernels: Kernels,
        batch: Batch,
        on_progress: Callable[[], None],
        most_tokens: int,
    ) -> None:
        self.model, self.pool, self.kernels, self.batch = model, pool, kernels, batch
        self.on_progress = on_progress
        device = batch.tokens.device
        self.rows = torch.zeros((3, most_tokens), dtype=torch.int64, device=device)
        """Token ids, positions and slot mapping of the chunks' rows."""
        self.slots = torch.full((MOST_CHUNKS,), batch.padding_slot, dtype=torch.int64, device=device)
        self.lens = torch.zeros(MOST_CHUNKS, dtype=torch.int32, device=device)
        self.query_start = torch.zeros(MOST_CHUNKS + 1, dtype=torch.int32, device=device)

    def stage(self, layout: StepLayout, size: Size, upload: Upload) -> None:
        """Puts a step's inputs into the upload, padded."""
        count, chunks = layout.token_ids.size, layout.chunk_slots.size
        rows = np.zeros((3, size.tokens), dtype=np.int64)
        rows[2] = -1
        rows[:, :count] = layout.token_ids, layout.positions, layout.slot_mapping
        slots = np.full(MOST_CHUNKS, self.batch.padding_slot, dtype=np.int64)
        slots[:chunks] = layout.chunk_slots
        lens = np.zeros(MOST_CHUNKS, dtype=np.int32)
        lens[:chunks] = layout.chunk_lens
        query_start = np.full(MOST_CHUNKS + 1, count, dtype=np.int32)
        query_start[: chunks + 1] = layout.query_start
        decode = np.full(size.decode, self.batch.padding_slot, dtype=np.int64)
        decode[: layout.num_decode] = layout.decode_slots
        placed = [upload.put(numbers, numbers.dtype) for numbers in (rows, slots, lens, query_start, decode)]

        def fill() -> None:
            self.rows[:, : size.tokens].copy_(placed[0].tensor.view(3, -1))
            self.slots.copy_(placed[1].tensor)
            self.lens.copy_(placed[2].tensor)
            self.query_start.copy_(placed[3].tensor)
            if size.decode:
                self.batch.decode_rows[: size.decode].copy_(placed[4].tensor)

        upload.then(fill)

    def run(self, size: Size) -> torch.Tensor:
        """Hidden states of the decode rows and of the chunks' rows: [size.decode + size.tokens, hidden_size]."""
        batch = self.batch
        token_ids, positions, slot_mapping = self.rows[:, : size.tokens]
        decode = decode_rows(self.kernels, batch, size.decode, batch.columns)
        if size.decode:
            token_ids = torch.cat((decode.token_ids, token_ids))
            positions = torch.cat((decode.positions, positions))
            slot_mapping = torch.cat((decode.slot_mapping, slot_mapping))
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
            on_progress=self.on_progress,
        )
        return self.model.forward(token_ids, positions, attention)


class ChunkGraphs:
    """Which steps with chunks have a graph, and the graphs."""

    def __init__(self, step: ChunkStep) -> None:
        self.step = step
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def size(self, layout: StepLayout) -> Size | None:
        """The captured size that a step fits; None: it runs kernel by kernel."""
        if not self._graphs or not layout.chunks or len(layout.chunks) > MOST_CHUNKS:
            return None
        if self.step.batch.shared is not None:  # reading a prefix once gains more than launching costs
            return None
        fitting = (
            size
            for size in self._graphs
            if size.tokens >= layout.token_ids.size
            and size.decode >= layout.num_decode
            and (size.decode == 0) == (layout.num_decode == 0)
        )
        return min(fitting, key=lambda size: size.decode + size.tokens, default=None)

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
    def measure(self, runtime: DeviceRuntime) -> Iterator[tuple[Size, int]]:
        """Each size and what its forward pass takes, in nanoseconds: the best of a few. All rows are padding."""
        self.step.rows[2].fill_(-1)
        for size, (graph, _) in self._graphs.items():
            times = []
            for _ in range(5):
                start = runtime.mark()
                graph.replay()
                end = runtime.mark()
                runtime.wait(end)
                times.append(runtime.elapsed_ns(start, end))
            yield size, min(times)

    def _sizes(self, most_decode: int) -> Sequence[Size]:
        most_tokens = self.step.rows.shape[1]
        decode = [0, *(rows for rows in DECODE_ROWS if rows < most_decode), most_decode]
        tokens = [*(count for count in CHUNK_TOKENS if count < most_tokens), most_tokens]
        return sorted((Size(d, t) for d in decode for t in tokens), key=lambda s: s.decode + s.tokens, reverse=True)
