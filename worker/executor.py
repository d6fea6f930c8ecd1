"""Executes step plans, in the documented order, on whatever device the model and the pool are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.backend import kernels_for
from pagewire.runtime.fault_points import fault_point
from worker.attention_batch import AttentionBatch
from worker.batch import NO_PROMPT_LOGPROBS, Batch, Chunk, StepInputs
from worker.kv_pool import KvPool
from worker.models.base import PagedModel
from worker.sampler import Sampled, Sampler, describe_logprobs
from worker.sampling_state import Slots
from worker.step import PlanError, PromptLogprobs, StepPlan, StepResult, StepTimings, TokenLogprobs
from worker.swapper import Swapper

_LOGIT_ELEMENTS = 1 << 24
"""Most logits computed at once for prompt log-probabilities (64 MiB): their memory does not grow with the chunk."""


@dataclass
class Progress:
    """How far the worker is. Written by the executing thread, read by the heartbeat's."""

    last_step: int = 0
    """Number of the last finished step of this epoch."""
    count: int = 0
    """Pieces of work done, ever: layers and steps."""

    def advance(self) -> None:
        """One piece more."""
        self.count += 1


@dataclass
class LaunchedStep:
    """A step whose work has been handed to the device. `result` waits for it and may run on another thread."""

    plan: StepPlan
    sampled: Sampled | None
    """None: the plan computed nothing that samples."""
    prompt_logprobs: Sequence[PromptLogprobs]
    timings: StepTimings
    _result: StepResult | None = field(default=None, repr=False)

    def result(self) -> StepResult:
        """The answer to the plan; computed once, then remembered."""
        if self._result is None:
            answer = StepResult(
                epoch=self.plan.epoch,
                step=self.plan.step,
                prompt_logprobs=self.prompt_logprobs,
                timings=self.timings,
            )
            if (sampled := self.sampled) is not None:
                answer = replace(
                    answer,
                    token_ids=sampled.token_ids.tolist(),
                    nonfinite_rows=sampled.nonfinite.nonzero().squeeze(1).tolist(),
                    logprob_rows=sampled.logprob_rows,
                    logprobs=sampled.logprobs,
                )
            self._result = answer
        return self._result


class Executor:
    """Owns the persistent batch and applies plans to it, each exactly once; the gate in front sees to that.

    After any exception the rows and the KV pool may be half changed: the process must not execute another plan.
    """

    def __init__(
        self, model: PagedModel, pool: KvPool, *, max_slots: int, max_step_tokens: int, max_model_len: int
    ) -> None:
        self.model = model
        self.pool = pool
        self.max_step_tokens = max_step_tokens
        device = pool.device_blocks.device
        self.batch = Batch(
            pool.layout,
            num_blocks=pool.num_blocks,
            max_slots=max_slots,
            max_model_len=max_model_len,
            vocab_size=model.spec.vocab_size,
            device=device,
        )
        self.kernels = kernels_for(device)
        self.swapper = Swapper(pool, self.kernels)
        self.sampler = Sampler(self.batch.sampling)
        self.progress = Progress()
        self._idle_since = time.perf_counter_ns()

    def reset(self) -> None:
        """Drops every sequence: a new epoch begins with an empty batch."""
        self.batch.clear()
        self.progress.last_step = 0
        self._idle_since = time.perf_counter_ns()

    def execute(self, plan: StepPlan) -> StepResult:
        """`launch`, then wait for the result."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Applies a plan in the order of `worker.proto`. PlanError: the plan contradicts the batch."""
        started = time.perf_counter_ns()
        batch = self.batch
        batch.release(plan.release_slots)
        moves = self.swapper.move(plan.swap_out, plan.swap_in, plan.copies)
        batch.add(plan.new_sequences)
        batch.append_blocks(plan.append_slots, plan.append_blocks)
        batch.replace_blocks(plan.replace_slots, plan.replace_indices, plan.replace_blocks)
        batch.change_decode_set(plan.decode_remove, plan.decode_add)
        inputs = batch.step_inputs(plan.chunk_slots, plan.chunk_tokens, self.max_step_tokens)
        fault_point("worker.step.before_forward")
        before_forward = time.perf_counter_ns()
        hidden = self._forward(inputs)
        after_forward = time.perf_counter_ns()
        fault_point("worker.step.after_forward")
        sampled, prompt_logprobs = self._sample(plan, inputs, hidden)
        finished = time.perf_counter_ns()
        timings = StepTimings(
            idle_ns=max(0, started - self._idle_since),
            swap_out_ns=moves.swap_out_ns,
            swap_in_ns=moves.swap_in_ns,
            copy_ns=moves.copy_ns,
            forward_ns=after_forward - before_forward,
            sample_ns=finished - after_forward,
            chunk_tokens=inputs.num_tokens - inputs.decode_slots.size,
            decode_tokens=inputs.decode_slots.size,
        )
        self._idle_since = finished
        self.progress.last_step = plan.step
        self.progress.advance()
        return LaunchedStep(plan, sampled, prompt_logprobs, timings)

    def _forward(self, inputs: StepInputs) -> torch.Tensor | None:
        """Hidden states [T, H] of the step's tokens, their KV written; None for a step without tokens."""
        if not inputs.num_tokens:
            return None
        attention = AttentionBatch(
            layout=self.pool.layout,
            pool=self.pool.device_blocks,
            kernels=self.kernels,
            slot_mapping=inputs.slot_mapping,
            num_decode=inputs.decode_slots.size,
            decode_block_tables=inputs.decode_block_tables,
            decode_context_lens=inputs.decode_context_lens,
            chunk_block_tables=inputs.chunk_block_tables,
            chunk_context_lens=inputs.chunk_context_lens,
            chunk_query_start=inputs.chunk_query_start,
            on_progress=self.progress.advance,
        )
        return self.model.forward(inputs.token_ids, inputs.positions, attention)

    def _sample(
        self, plan: StepPlan, inputs: StepInputs, hidden: torch.Tensor | None
    ) -> tuple[Sampled | None, list[PromptLogprobs]]:
        """Forks, then samples: decode set, finishing chunks, forks. Only rows that need logits get them."""
        if hidden is None:
            if plan.forks:
                raise PlanError("forks in a plan without chunks")
            return None, []
        batch = self.batch
        prompt_logprobs = self._prompt_logprobs(inputs, hidden)
        finishing = [chunk for chunk in inputs.chunks if chunk.samples]
        batch.note_computed(inputs)
        batch.fork(plan.forks, finishing)
        others = [chunk.slot for chunk in finishing] + [fork.slot for fork in plan.forks]
        slots = np.concatenate((inputs.decode_slots, np.array(others, dtype=np.int64)))
        if not slots.size:
            return None, prompt_logprobs
        logits = self._logits(inputs, hidden, finishing)
        if plan.forks:
            rows = {chunk.slot: inputs.decode_slots.size + row for row, chunk in enumerate(finishing)}
            parents = torch.tensor([rows[fork.parent_slot] for fork in plan.forks], device=logits.device)
            logits = torch.cat((logits, logits[parents]))
        sampled = self.sampler.sample(logits, slots, batch.output_lens(slots))
        batch.note_sampled(slots, sampled.token_ids)
        return sampled, prompt_logprobs

    def _logits(self, inputs: StepInputs, hidden: torch.Tensor, finishing: Sequence[Chunk]) -> torch.Tensor:
        """Logits of the decode rows, then of the last tokens of the finishing chunks: float32 [R, vocab]."""
        num_decode = inputs.decode_slots.size
        if not inputs.chunks:
            return self.model.logits(hidden)
        last_rows: Slots = np.array([chunk.first_row + chunk.num_tokens - 1 for chunk in finishing], dtype=np.int64)
        rows = torch.from_numpy(np.concatenate((np.arange(num_decode), last_rows)))
        return self.model.logits(hidden[rows.to(hidden.device)])

    def _prompt_logprobs(self, inputs: StepInputs, hidden: torch.Tensor) -> list[PromptLogprobs]:
        """Log-probabilities of the prompt tokens that this step's chunks predict.

        The hidden state at position p predicts the token at p + 1, so a chunk start..end gives prompt tokens
        start + 1..end, as far as the prompt goes.
        """
        answers = []
        piece = max(1, _LOGIT_ELEMENTS // self.model.spec.vocab_size)
        for chunk in inputs.chunks:
            num_top = int(self.batch.prompt_logprobs[chunk.slot])
            last = min(chunk.start + chunk.num_tokens, int(self.batch.prompt_tokens[chunk.slot]) - 1)
            if num_top == NO_PROMPT_LOGPROBS or last <= chunk.start:
                continue
            tokens = self.batch.given_tokens(chunk.slot)[chunk.start + 1 : last + 1].to(hidden.device)
            logprobs: list[TokenLogprobs] = []
            for begin in range(0, tokens.numel(), piece):
                part = tokens[begin : begin + piece]
                row = chunk.first_row + begin
                logits = self.model.logits(hidden[row : row + part.numel()])
                logprobs += describe_logprobs(logits, part, [num_top] * part.numel())
                self.progress.advance()
            answers.append(PromptLogprobs(chunk.slot, chunk.start + 1, logprobs))
        return answers
