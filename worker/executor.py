"""Executes step plans, in the documented order, on whatever device the model and the pool are.

A launch works through a plan on the host first: checks it, moves the host's copy of the batch on, and gathers all that
the device has to be told into one upload. Then it hands the device its work and returns; it waits for nothing. What the
step answers is copied to the host behind it, and `LaunchedStep.result` waits for that copy on another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kernels.backend import Kernels, kernels_for, shares_prefixes
from kernels.reference import TokenLogprobRows
from kernels.reference.step import KNOWN, PROMPT
from pagewire.runtime.fault_points import fault_point
from pagewire.runtime.logs import get_logger
from worker.attention_batch import AttentionBatch
from worker.batch import NO_PROMPT_LOGPROBS, Batch, StepLayout
from worker.chunk_graphs import ROWS, ChunkGraphs, ChunkStep, Size
from worker.decode import DecodeGraphs, DecodeStep, Mode, decode_rows, shared_prefix
from worker.device import DeviceRuntime, runtime_for
from worker.kv_pool import KvPool
from worker.models.base import PagedModel
from worker.sampler import SamplePlan, Sampler, describe_logprobs
from worker.sampling_state import Slots
from worker.step import Fork, PlanError, PromptLogprobs, StepPlan, StepResult, StepTimings, TokenLogprobs
from worker.swapper import Moves, SwapMarks, Swapper
from worker.upload import Placed, Upload

_LOGIT_ELEMENTS = 1 << 24
"""Most logits computed at once for prompt log-probabilities (64 MiB): their memory does not grow with the chunk."""

log = get_logger("worker.executor")


@dataclass
class Progress:
    """How far the worker is. Written by executing and sending threads, read by the heartbeat's."""

    last_step: int = 0
    """Number of the last finished step of this epoch."""
    count: int = 0
    """Pieces of work done, ever: layers and steps."""
    session: int = 0
    """Counts epochs, so that a step that ends after its epoch is not taken for one of the next."""

    def advance(self) -> None:
        """One piece more."""
        self.count += 1

    def finish(self, session: int, step: int) -> None:
        """A step of that session is over."""
        self.count += 1
        if session == self.session:
            self.last_step = step


@dataclass(frozen=True)
class _PromptPiece:
    """Log-probabilities of consecutive prompt tokens, on their way to the host."""

    slot: int
    first_token: int
    num_top: int
    rows: TokenLogprobRows


@dataclass(frozen=True)
class _StepMarks:
    """Points in the device's work on one step."""

    before: _End | None
    """Of the step before; None: there was none."""
    start: Any
    before_forward: Any
    after_forward: Any
    """With a replayed graph the end of sampling."""
    end: _End
    launched_ns: int
    """When the host had handed over all work, by its clock."""


@dataclass
class _End:
    """The end of a step."""

    mark: Any
    seen_ns: int = 0
    """When the host saw it, by its clock; 0: not yet."""


@dataclass
class LaunchedStep:
    """A step whose work has been handed to the device. `result` waits for it and may run on another thread."""

    plan: StepPlan
    runtime: DeviceRuntime
    marks: _StepMarks
    timings: Callable[[], StepTimings]
    """To be called when the last mark has passed."""
    encoded: torch.Tensor | None
    """On the host, complete with the last mark: sampled tokens as in `Sampled.encoded`. None: nothing samples."""
    logprob_rows: Sequence[int]
    num_top: Sequence[int]
    logprobs: TokenLogprobRows | None
    prompt_pieces: Sequence[_PromptPiece]
    out_of_memory_slots: Sequence[int]
    on_finish: Callable[[], None]
    _result: StepResult | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def result(self) -> StepResult:
        """The answer to the plan; computed once, then remembered."""
        with self._lock:
            if self._result is None:
                self.runtime.wait(self.marks.end.mark)
                self.marks.end.seen_ns = time.perf_counter_ns()
                self._result = self._read()
                self.on_finish()
            return self._result

    def _read(self) -> StepResult:
        answer = StepResult(
            epoch=self.plan.epoch,
            step=self.plan.step,
            prompt_logprobs=_join(self.prompt_pieces),
            timings=self.timings(),
            out_of_memory_slots=self.out_of_memory_slots,
        )
        if self.encoded is None:
            return answer
        encoded = self.encoded.numpy()
        nonfinite = np.flatnonzero(encoded < 0)
        return replace(
            answer,
            token_ids=np.where(encoded < 0, ~encoded, encoded).tolist(),
            nonfinite_rows=nonfinite.tolist(),
            logprob_rows=self.logprob_rows,
            logprobs=[] if self.logprobs is None else describe_logprobs(self.logprobs, self.num_top),
        )


def _join(pieces: Sequence[_PromptPiece]) -> list[PromptLogprobs]:
    """One entry per slot, of its pieces in order."""
    entries: dict[int, tuple[int, list[TokenLogprobs]]] = {}
    for piece in pieces:
        _, logprobs = entries.setdefault(piece.slot, (piece.first_token, []))
        logprobs += describe_logprobs(piece.rows, [piece.num_top] * piece.rows.ranks.numel())
    return [PromptLogprobs(slot, first_token, logprobs) for slot, (first_token, logprobs) in entries.items()]


@dataclass(frozen=True)
class _PromptWant:
    """Prompt tokens whose log-probabilities this step gives: of rows first_row.. of its hidden states."""

    slot: int
    first_token: int
    num_top: int
    first_row: int
    tokens: Placed


@dataclass(frozen=True)
class _StepWork:
    """A plan, worked through on the host: what is left for the device."""

    layout: StepLayout
    moves: Moves
    chunk_inputs: dict[str, Placed]
    """The layout's arrays of the same names, in the upload."""
    num_rows: int
    """R, the rows that sample."""
    other_slots: Placed | None
    """Slots of the rows that sample behind the decode set."""
    logit_rows: Placed | None
    """Rows of the hidden states that logits are computed of, where it is not all of them."""
    fork_rows: Placed | None
    """Rows of the logits that forks sample from."""
    output_lens: Slots
    """[R]: how many output tokens each row has so far."""
    sampling: SamplePlan
    prompt_wants: Sequence[_PromptWant]
    chunk_size: Size | None
    """What the rows of a step with chunks are padded to, where its forward pass is a graph."""
    held_blocks: tuple[Slots, Slots] | None
    """Blocks that the rows hold, and those that the step writes to; None: nobody has to know."""


class Executor:
    """Owns the persistent batch and applies plans to it, each exactly once; the gate in front sees to that.

    After any exception the rows and the KV pool may be half changed: the process must not execute another plan.
    """

    def __init__(
        self,
        model: PagedModel,
        pool: KvPool,
        *,
        max_slots: int,
        max_step_tokens: int,
        max_model_len: int,
        buckets: Sequence[int] = (),
        kernels: Kernels | None = None,
        runtime: DeviceRuntime | None = None,
    ) -> None:
        """buckets: sizes that decode sets are padded to, ascending, the last at least max_slots. kernels and runtime:
        what the pool's device gets, unless given."""
        self.model = model
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        device = pool.device_blocks.device
        self.kernels: Kernels = kernels or kernels_for(device, pool.layout)
        self.batch = Batch(
            pool.layout,
            num_blocks=pool.num_blocks,
            max_slots=max_slots,
            max_model_len=max_model_len,
            vocab_size=model.spec.vocab_size,
            device=device,
            buckets=buckets,
            shares_prefixes=shares_prefixes(self.kernels, pool.layout, device),
        )
        self.runtime = runtime or runtime_for(device)
        self.swapper = Swapper(pool, self.kernels, self.runtime)
        self.swap_rates = (0, 0)
        """Bytes per second out and in, once measured."""
        self.sampler = Sampler(self.batch.sampling, self.kernels)
        self.progress = Progress()
        self.decode = DecodeGraphs(
            DecodeStep(model, pool.device_blocks, self.kernels, self.batch, self.sampler, self.progress.advance)
        )
        self.chunk_graphs = ChunkGraphs(
            ChunkStep(
                model,
                pool.device_blocks,
                self.kernels,
                self.batch,
                self.progress.advance,
                min(max_step_tokens, ROWS[-1]),
            )
        )
        self._last_end: _End | None = None

    def reset(self) -> None:
        """Drops every sequence: a new epoch begins with an empty batch."""
        self.batch.clear()
        self.progress.session += 1
        self.progress.last_step = 0
        self._last_end = None

    def measure_swaps(self) -> tuple[int, int]:
        """Bytes per second out and in. Overwrites KV blocks, so it comes before the first plan."""
        self.swap_rates = self.swapper.measure()
        return self.swap_rates

    def execute(self, plan: StepPlan) -> StepResult:
        """`launch`, then wait for the result."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, waited_ns: int = 0) -> LaunchedStep:
        """Applies a plan in the order of `worker.proto`. PlanError: the plan contradicts the batch. `waited_ns`: for so
        long it has been there."""
        upload = Upload(self.runtime)
        work = self._work_through(plan, upload)
        upload.send()
        start = self.runtime.mark()
        copies_follow = work.held_blocks is not None and self.swapper.may_follow(work.moves, work.held_blocks[1])
        swaps = SwapMarks() if copies_follow else self.swapper.move(work.moves)
        upload.apply()
        if work.held_blocks is not None:
            self.swapper.before_compute(*work.held_blocks)
        fault_point("worker.step.before_forward")
        before_forward = self.runtime.mark()
        step = _Outcome(work.sampling)
        if work.layout.num_tokens:
            self._compute(work, step)
        logprobs = None if step.logprobs is None else self._read_back(step.logprobs)
        pieces = [replace(piece, rows=self._read_back(piece.rows)) for piece in step.prompt_pieces]
        encoded = None if step.encoded is None else self.runtime.read_back(step.encoded)
        end = _End(self.runtime.mark())
        if copies_follow:
            swaps = self.swapper.move(work.moves, behind=start)
        after_forward = step.after_forward or end.mark
        marks = _StepMarks(self._last_end, start, before_forward, after_forward, end, time.perf_counter_ns())
        self._last_end = end
        session = self.progress.session
        return LaunchedStep(
            plan=plan,
            runtime=self.runtime,
            marks=marks,
            timings=lambda: self._timings(marks, swaps, work, waited_ns),
            encoded=encoded,
            logprob_rows=step.sampling.logprob_rows,
            num_top=step.sampling.num_top,
            logprobs=logprobs,
            prompt_pieces=pieces,
            out_of_memory_slots=step.out_of_memory_slots,
            on_finish=lambda: self.progress.finish(session, plan.step),
        )

    def _work_through(self, plan: StepPlan, upload: Upload) -> _StepWork:
        """Everything about a plan that the host knows by itself."""
        batch = self.batch
        batch.release(plan.release_slots)
        moves = self.swapper.stage(plan.swap_out, plan.swap_in, plan.copies, upload)
        batch.add(plan.new_sequences, upload)
        batch.continue_beams(plan.beam_slots, plan.beam_parents, plan.beam_tokens, upload)
        batch.append_blocks(plan.append_slots, plan.append_blocks)
        batch.replace_blocks(plan.replace_slots, plan.replace_indices, plan.replace_blocks)
        batch.change_decode_set(plan.decode_remove, plan.decode_add)
        layout = batch.lay_out(plan.chunk_slots, plan.chunk_tokens, self.max_step_tokens)
        if plan.forks and not layout.num_tokens:
            raise PlanError("forks in a plan without chunks")
        batch.stage(upload)
        chunk_size = self.chunk_graphs.size(layout)
        prompt_wants = self._prompt_wants(layout, upload)
        # A copy of this very plan counts, too: it is enqueued before the forward pass.
        is_settled = self.swapper.is_settled and not (plan.swap_out.sources or plan.swap_in.sources)
        held_blocks = None if is_settled else batch.touched_blocks(layout)
        slots, output_lens = batch.advance(layout, plan.forks, upload)
        if chunk_size is not None:
            self.chunk_graphs.step.stage(layout, chunk_size, upload)
        chunk_inputs = _place_chunks(layout, upload) if chunk_size is None else {}
        logit_rows = _place_logit_rows(layout, upload)
        num_decode = layout.num_decode
        return _StepWork(
            layout=layout,
            moves=moves,
            chunk_inputs=chunk_inputs,
            num_rows=slots.size,
            other_slots=upload.put(slots[num_decode:]) if slots.size > num_decode else None,
            logit_rows=logit_rows,
            fork_rows=_place_forks(layout, plan.forks, upload),
            output_lens=output_lens,
            sampling=self.sampler.plan(slots, output_lens, upload),
            prompt_wants=prompt_wants,
            chunk_size=chunk_size,
            held_blocks=held_blocks,
        )

    def _compute(self, work: _StepWork, step: _Outcome) -> None:
        """Forward pass and sampling."""
        if not work.layout.chunks:
            self._decode(work, step)
            return
        try:
            self._mixed(work, step)
            return
        except torch.OutOfMemoryError as error:
            why = str(error).splitlines()[0]
        # Out here nothing holds what the attempt had allocated. What the decode set needs is allocated for good. Chunks
        # are given up; their rows go on with a token that nobody reads, because plans that count on them are under way.
        log.error("no memory for chunks", error=why, tokens=work.layout.num_tokens)
        torch.cuda.empty_cache()
        self._without_chunks(work, step)

    def _decode(self, work: _StepWork, step: _Outcome) -> None:
        """A step of the decode set alone."""
        layout, sampling = work.layout, work.sampling
        count = self.batch.padded(layout.num_decode)
        mode = Mode.LOGITS if not sampling.is_plain else Mode.RANDOM if sampling.random else Mode.GREEDY
        output = self.decode.run(count, layout.decode_columns, mode)
        fault_point("worker.step.after_forward")
        if mode is not Mode.LOGITS:
            step.encoded = output[: layout.num_decode]
            return
        step.after_forward = self.runtime.mark()
        slots = self.batch.decode_rows[: layout.num_decode]
        self._sample(output[: layout.num_decode], slots, sampling, step)

    def _mixed(self, work: _StepWork, step: _Outcome) -> None:
        """Chunks, with or without a decode set."""
        layout = work.layout
        size = work.chunk_size
        hidden = self._forward(work) if size is None else self.chunk_graphs.run(size)
        step.after_forward = self.runtime.mark()
        fault_point("worker.step.after_forward")
        step.prompt_pieces = self._prompt_logprobs(work.prompt_wants, hidden)
        if not work.num_rows:
            return
        slots = self.batch.decode_rows[: layout.num_decode]
        if work.other_slots is not None:
            slots = torch.cat((slots, work.other_slots.tensor))
        assert work.logit_rows is not None
        logits = self.model.logits(hidden.index_select(0, work.logit_rows.tensor))
        if work.fork_rows is not None:
            logits = torch.cat((logits, logits.index_select(0, work.fork_rows.tensor)))
        self._sample(logits, slots, work.sampling, step)

    def _forward(self, work: _StepWork) -> torch.Tensor:
        """Hidden states of the decode rows and of the chunks' tokens, [T, hidden_size]."""
        layout, batch = work.layout, self.batch
        inputs = {name: placed.tensor for name, placed in work.chunk_inputs.items()}
        token_ids, positions, slot_mapping = inputs["token_ids"], inputs["positions"], inputs["slot_mapping"]
        decode = decode_rows(self.kernels, batch, layout.num_decode, layout.decode_columns)
        shared = None
        if batch.shared is not None:
            shared = shared_prefix(batch, batch.decode_rows[: layout.num_decode], layout.decode_columns)
        if layout.num_decode:
            token_ids = torch.cat((decode.token_ids, token_ids))
            positions = torch.cat((decode.positions, positions))
            slot_mapping = torch.cat((decode.slot_mapping, slot_mapping))
        attention = AttentionBatch(
            layout=self.pool.layout,
            pool=self.pool.device_blocks,
            kernels=self.kernels,
            slot_mapping=slot_mapping,
            num_decode=layout.num_decode,
            decode_block_tables=decode.block_tables,
            decode_context_lens=decode.context_lens,
            chunk_block_tables=batch.block_tables[:, : layout.chunk_columns].index_select(0, inputs["chunk_slots"]),
            chunk_context_lens=inputs["chunk_lens"],
            chunk_query_start=inputs["query_start"],
            chunks_from=layout.num_decode,
            on_progress=self.progress.advance,
            decode_shared=shared,
        )
        return self.model.forward(token_ids, positions, attention)

    def _without_chunks(self, work: _StepWork, step: _Outcome) -> None:
        """The same step when there was no memory for its chunks."""
        layout = work.layout
        step.prompt_pieces, step.encoded, step.logprobs = (), None, None
        step.out_of_memory_slots = layout.chunk_slots.tolist()
        upload = Upload(self.runtime)
        step.sampling = self.sampler.plan(layout.decode_slots, work.output_lens[: layout.num_decode], upload)
        upload.send()
        parts = []
        if layout.num_decode:
            self._decode(replace(work, sampling=step.sampling), step)
            assert step.encoded is not None
            parts.append(step.encoded)
        if work.other_slots is not None:
            slots = work.other_slots.tensor
            known = self.batch.tokens.index_select(1, slots)[KNOWN]
            parts.append(torch.zeros_like(slots))
            self.kernels.move_on(self.batch.tokens, slots, known, parts[-1], parts[-1])
        step.encoded = torch.cat(parts) if parts else None

    def _sample(self, logits: torch.Tensor, slots: torch.Tensor, plan: SamplePlan, step: _Outcome) -> None:
        """Samples rows of these slots, int64 [R], and moves them on."""
        tokens = self.batch.tokens.index_select(1, slots)
        sampled = self.sampler.sample(logits, slots, tokens[KNOWN] - tokens[PROMPT], plan)
        step.encoded, step.logprobs = sampled.encoded, sampled.logprobs
        self.kernels.move_on(self.batch.tokens, slots, tokens[KNOWN], step.encoded, step.encoded)

    def _prompt_wants(self, layout: StepLayout, upload: Upload) -> list[_PromptWant]:
        """Which prompt tokens' log-probabilities this step's chunks give.

        The hidden state at position p predicts the token at p + 1, so a chunk start..end gives prompt tokens
        start + 1..end, as far as the prompt goes. A long stretch comes in pieces.
        """
        wants = []
        piece = max(1, _LOGIT_ELEMENTS // self.model.spec.vocab_size)
        for chunk in layout.chunks:
            num_top = int(self.batch.prompt_logprobs[chunk.slot])
            last = min(chunk.start + chunk.num_tokens, int(self.batch.prompt_tokens[chunk.slot]) - 1)
            if num_top == NO_PROMPT_LOGPROBS:
                continue
            tokens = self.batch.given_tokens(chunk.slot)
            for first in range(chunk.start + 1, last + 1, piece):
                part = upload.put(tokens[first : min(first + piece, last + 1)])
                row = chunk.first_row + first - 1 - chunk.start
                wants.append(_PromptWant(chunk.slot, first, num_top, row, part))
        return wants

    def _prompt_logprobs(self, wants: Sequence[_PromptWant], hidden: torch.Tensor) -> list[_PromptPiece]:
        pieces = []
        for want in wants:
            logits = self.model.logits(hidden[want.first_row : want.first_row + want.tokens.count])
            rows = self.kernels.token_logprobs(logits, want.tokens.tensor, want.num_top)
            pieces.append(_PromptPiece(want.slot, want.first_token, want.num_top, rows))
            self.progress.advance()
        return pieces

    def _read_back(self, rows: TokenLogprobRows) -> TokenLogprobRows:
        copy = self.runtime.read_back
        return TokenLogprobRows(copy(rows.logprobs), copy(rows.ranks), copy(rows.top_ids), copy(rows.top_logprobs))

    def _timings(self, marks: _StepMarks, swaps: SwapMarks, work: _StepWork, waited_ns: int) -> StepTimings:
        elapsed, before, early_ns = self.runtime.elapsed_ns, marks.before, waited_ns
        if self.runtime.runs_ahead:
            early_ns = 0 if before is None else max(0, before.seen_ns - marks.launched_ns)
        moved = self.swapper.times(swaps, work.moves, self.swap_rates)
        return StepTimings(
            idle_ns=0 if before is None else elapsed(before.mark, marks.start),
            swap_out_ns=moved.swap_out_ns,
            swap_in_ns=moved.swap_in_ns,
            copy_ns=moved.copy_ns,
            forward_ns=elapsed(marks.before_forward, marks.after_forward),
            sample_ns=elapsed(marks.after_forward, marks.end.mark),
            chunk_tokens=work.layout.num_tokens - work.layout.num_decode,
            decode_tokens=work.layout.num_decode,
            early_ns=early_ns,
        )


@dataclass
class _Outcome:
    """What a step's computation leaves, on the device."""

    sampling: SamplePlan
    """What was asked of the sampler."""
    encoded: torch.Tensor | None = None
    logprobs: TokenLogprobRows | None = None
    prompt_pieces: Sequence[_PromptPiece] = ()
    after_forward: Any = None
    out_of_memory_slots: Sequence[int] = ()


def _place_chunks(layout: StepLayout, upload: Upload) -> dict[str, Placed]:
    """The chunks' inputs in the upload."""
    if not layout.chunks:
        return {}
    return {
        "token_ids": upload.put(layout.token_ids),
        "positions": upload.put(layout.positions),
        "slot_mapping": upload.put(layout.slot_mapping),
        "chunk_slots": upload.put(layout.chunk_slots),
        "chunk_lens": upload.put(layout.chunk_lens, np.int32),
        "query_start": upload.put(layout.query_start, np.int32),
    }


def _place_logit_rows(layout: StepLayout, upload: Upload) -> Placed | None:
    """The rows of the hidden states that sample: decode rows, then the last tokens of the finishing chunks."""
    if not layout.chunks:
        return None
    last_rows = [chunk.first_row + chunk.num_tokens - 1 for chunk in layout.finishing]
    return upload.put(np.concatenate((np.arange(layout.num_decode), np.array(last_rows, dtype=np.int64))))


def _place_forks(layout: StepLayout, forks: Sequence[Fork], upload: Upload) -> Placed | None:
    """The rows of the logits that forks sample from: their parents'."""
    if not forks:
        return None
    rows = {chunk.slot: layout.num_decode + row for row, chunk in enumerate(layout.finishing)}
    return upload.put([rows[fork.parent_slot] for fork in forks])
