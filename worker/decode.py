"""The decode step: a function of static buffers, so that a CUDA graph can replay it.

Everything that a step without changes needs is on the device: which rows decode, their lengths, their last tokens,
their block tables, their sampling parameters. The step reads the lengths, computes the model over one token per row,
samples, and moves lengths and last tokens on; replaying it is one launch. It is captured for a few sizes of the decode
set; a set in between is padded with rows of length 0, which write to no slot and attend to nothing.
"""

from __future__ import annotations

import enum
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.backend import Kernels, StepKernels
from kernels.compile import KernelError
from kernels.reference import DecodeInputs, SharedPrefix
from pagewire.runtime.logs import get_logger
from worker.attention_batch import AttentionBatch
from worker.batch import Batch
from worker.models.base import PagedModel
from worker.sampler import SamplePlan, Sampler

log = get_logger("worker.decode")


class Mode(enum.Enum):
    """How far a decode step goes."""

    GREEDY = "greedy"
    """To tokens: every row takes its likeliest."""
    RANDOM = "random"
    """To tokens: rows draw by temperature, top-k, top-p, min-p; those of temperature 0 take their likeliest."""
    LOGITS = "logits"
    """To logits: some row has penalties or a bias, or wants log-probabilities, and sampling goes on eagerly."""


def decode_rows(kernels: StepKernels, batch: Batch, count: int, columns: int) -> DecodeInputs:
    """Of the first `count` rows of the decode set and its padding; block tables of `columns` blocks."""
    slots = batch.decode_rows[:count]
    return kernels.decode_inputs(slots, batch.tokens, batch.block_tables, columns, batch.layout.block_size)


def shared_prefix(batch: Batch, slots: torch.Tensor, columns: int) -> SharedPrefix:
    """What rows `slots`, int64 [B], have in common, as the batch was last told."""
    return SharedPrefix(
        block_table=batch.block_tables[:, :columns].index_select(0, batch.shared_slot),
        length=batch.shared_lens.index_select(0, batch.shared_slot),
        row_lens=batch.shared_lens.index_select(0, slots),
        query_start=torch.arange(0, slots.shape[0] + 1, slots.shape[0], dtype=torch.int32, device=slots.device),
    )


class DecodeStep:
    """One token for every row of the decode set."""

    def __init__(
        self,
        model: PagedModel,
        pool: torch.Tensor,
        kernels: Kernels,
        batch: Batch,
        sampler: Sampler,
        on_progress: Callable[[], None],
    ) -> None:
        self.model = model
        self.pool = pool
        self.kernels = kernels
        self.batch = batch
        self.sampler = sampler
        self.on_progress = on_progress
        device = batch.tokens.device
        self.encoded = torch.zeros(batch.decode_rows.shape[0], dtype=torch.int64, device=device)
        """What the rows sampled, as in `Sampled.encoded`."""
        self.logits: torch.Tensor | None = None
        """float32 [B, vocab]: where graphs leave logits; None as long as there are none."""
        self._nothing = torch.zeros(0, dtype=torch.int32, device=device)
        self._query_start = torch.zeros(1, dtype=torch.int32, device=device)

    def run(self, count: int, columns: int, mode: Mode, *, shared: bool = False) -> torch.Tensor:
        """Computes `count` rows. Returns encoded tokens int64 [count]; in mode LOGITS logits float32 [count, vocab].

        In mode LOGITS nothing moves on: the caller samples. `shared`: rows have something in common.
        """
        slots = self.batch.decode_rows[:count]
        rows = decode_rows(self.kernels, self.batch, count, columns)
        attention = AttentionBatch(
            layout=self.batch.layout,
            pool=self.pool,
            kernels=self.kernels,
            slot_mapping=rows.slot_mapping,
            num_decode=count,
            decode_block_tables=rows.block_tables,
            decode_context_lens=rows.context_lens,
            chunk_block_tables=self._nothing.view(0, 0),
            chunk_context_lens=self._nothing,
            chunk_query_start=self._query_start,
            chunks_from=count,
            on_progress=self.on_progress,
            decode_shared=shared_prefix(self.batch, slots, columns) if shared else None,
        )
        logits = self.model.logits(self.model.forward(rows.token_ids, rows.positions, attention))
        if mode is Mode.LOGITS:
            return logits if self.logits is None else self.logits[:count].copy_(logits)
        sampled = self.sampler.sample(logits, slots, rows.output_lens, SamplePlan(random=mode is Mode.RANDOM))
        self.kernels.move_on(self.batch.tokens, slots, rows.known, sampled.encoded, self.encoded[:count])
        return self.encoded[:count]

    def output(self, count: int, mode: Mode) -> torch.Tensor:
        """What the last run of this size and mode returned."""
        if mode is not Mode.LOGITS:
            return self.encoded[:count]
        assert self.logits is not None
        return self.logits[:count]


def bucket_sizes(max_slots: int) -> tuple[int, ...]:
    """Sizes of the decode set that graphs are captured for: close together where a row more costs most."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_slots + 64, 64)]
    cut = next((at for at, size in enumerate(sizes) if size >= max_slots), len(sizes) - 1)
    return tuple(sizes[: cut + 1])


def capture_graph(
    run: Callable[[], torch.Tensor], device: torch.device, stream: torch.cuda.Stream, memory: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
    """A graph of `run` and the tensor that replays write. None: it cannot be captured, because it waits for the device;
    the log says why. Raises OutOfMemoryError and KernelError."""
    try:
        # Once for real first: kernels are compiled and loaded, cuBLAS takes its workspace, outside the capture.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph, which collects garbage each time: a tenth of a second a graph.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=memory)
            try:
                output = run()
            finally:
                graph.capture_end()
    except (torch.OutOfMemoryError, KernelError):
        raise
    except RuntimeError as error:
        log.warning("a step cannot be captured as a graph", why=str(error).splitlines()[0])
        torch.cuda.synchronize(device)
        return None
    return graph, output


class DecodeGraphs:
    """Runs the decode step: as a replayed graph where one was captured, else by calling it."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self._graphs: dict[tuple[int, Mode, bool], torch.cuda.CUDAGraph] = {}
        self.memory: Any = None
        """What all graphs take their memory from, once one is captured."""

    def run(self, count: int, columns: int, mode: Mode) -> torch.Tensor:
        """As DecodeStep.run, for a padded `count`."""
        shared = self.step.batch.shared is not None
        graph = self._graphs.get((count, mode, shared))
        if graph is None:
            return self.step.run(count, columns, mode, shared=shared)
        graph.replay()
        return self.step.output(count, mode)

    @torch.inference_mode()
    def capture(self) -> Iterator[tuple[int, int]]:
        """Captures a graph per bucket and mode, largest first, so that all share one memory. Yields (done, of all).

        All rows are padding meanwhile. A model that cannot be captured, because it waits for the device, runs eagerly.
        """
        batch, step = self.step.batch, self.step
        device = batch.tokens.device
        buckets = sorted(batch.buckets, reverse=True)
        vocab_size = batch.vocab_size
        step.logits = torch.empty((buckets[0], vocab_size), dtype=torch.float32, device=device)
        jobs = [(bucket, mode, False) for bucket in buckets for mode in Mode]
        jobs += [(bucket, mode, True) for bucket in reversed(batch.sharing_buckets) for mode in Mode]
        self.memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        gc.collect()
        torch.cuda.empty_cache()
        for done, (bucket, mode, shared) in enumerate(jobs):
            captured = capture_graph(
                lambda job=(bucket, mode, shared): step.run(job[0], batch.columns, job[1], shared=job[2]),  # type: ignore[misc]
                device,
                stream,
                self.memory,
            )
            if captured is None:
                self._graphs.clear()
                step.logits = None
                return
            self._graphs[bucket, mode, shared] = captured[0]
            yield done + 1, len(jobs)
