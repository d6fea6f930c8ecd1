"""One step's sampling over the rows that want a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.backend import SamplingKernels
from kernels.reference import TokenLogprobRows
from kernels.reference.sampling import decode_ids, encode_finite
from worker.sampling_state import INDEX, MIN_P, SEED, TEMPERATURE, TOP_K, TOP_P, SamplingState, Slots
from worker.step import TokenLogprobs
from worker.upload import Placed, Upload


@dataclass(frozen=True)
class SamplePlan:
    """What R rows ask of the sampler, known before there are logits."""

    random: bool = False
    """Some row draws."""
    penalised: tuple[Placed, Placed] | None = None
    """Rows with penalties, and their slots."""
    biased: tuple[Placed, Placed, Placed] | None = None
    """Row, token id and bias of every biased logit."""
    stopped: tuple[Placed, Placed] | None = None
    """Row and token id of every stop token that comes too early."""
    logprob_rows: Sequence[int] = ()
    """The rows that asked for log-probabilities, ascending."""
    placed_logprob_rows: Placed | None = None
    num_top: Sequence[int] = field(default=())
    """Likeliest tokens that each of logprob_rows wants."""

    @property
    def is_plain(self) -> bool:
        """Logits alone decide, by temperature, top-k, top-p and min-p, and nothing else is wanted."""
        return self.penalised is None and self.biased is None and self.stopped is None and not self.logprob_rows


@dataclass(frozen=True)
class Sampled:
    """What R rows sampled, on the device."""

    encoded: torch.Tensor
    """int64 [R]: the token ids; all bits turned where the row's logits were not finite, which makes them negative."""
    logprobs: TokenLogprobRows | None
    """Of the plan's logprob_rows."""

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [R]: ids within the vocabulary, also of rows that are not finite."""
        return decode_ids(self.encoded)


class Sampler:
    """Chooses tokens in the order of the public API: penalties and bias, temperature, top-k, top-p, min-p, draw."""

    def __init__(self, state: SamplingState, kernels: SamplingKernels) -> None:
        self.state = state
        self.kernels = kernels

    def plan(self, slots: Slots, output_lens: Slots, upload: Upload) -> SamplePlan:
        """What rows of these slots, with so many output tokens so far, ask for."""
        state = self.state
        penalised = np.flatnonzero(state.penalised[slots])
        biased = np.flatnonzero(state.biased[slots])
        stopped = np.flatnonzero(output_lens < state.min_tokens[slots])
        wanted = np.flatnonzero(state.logprobs[slots] >= 0)
        random = bool(state.random[slots].any())
        if not (penalised.size or biased.size or stopped.size or wanted.size):
            return SamplePlan(random)
        biases = [state.bias[slot] for slot in slots[biased].tolist()]
        stops = [state.stop_ids[slot] for slot in slots[stopped].tolist()]
        return SamplePlan(
            random,
            penalised=(upload.put(penalised), upload.put(slots[penalised])) if penalised.size else None,
            biased=(
                upload.put(_repeat(biased, [ids for ids, _ in biases])),
                upload.put(np.concatenate([ids for ids, _ in biases])),
                upload.put(np.concatenate([values for _, values in biases]), np.float32),
            )
            if biased.size
            else None,
            stopped=(upload.put(_repeat(stopped, stops)), upload.put(np.concatenate(stops))) if stopped.size else None,
            logprob_rows=wanted.tolist(),
            placed_logprob_rows=upload.put(wanted) if wanted.size else None,
            num_top=state.logprobs[slots[wanted]].tolist(),
        )

    def sample(self, logits: torch.Tensor, slots: torch.Tensor, output_lens: torch.Tensor, plan: SamplePlan) -> Sampled:
        """Samples one token per row and counts it. Waits for nothing.

        logits is floating [R, vocab]; slots int64 [R] the rows' slots; output_lens int64 [R] how many output tokens
        each has so far, which is the position that keys its draw.
        """
        state, kernels = self.state, self.kernels
        adjusted = logits if plan.is_plain else self._adjust(logits, plan)
        if plan.random:
            numbers, shares = state.numbers.index_select(1, slots), state.shares.index_select(1, slots)
            encoded = kernels.sample(
                adjusted,
                shares[TEMPERATURE],
                numbers[TOP_K],
                shares[TOP_P],
                shares[MIN_P],
                numbers[SEED],
                numbers[INDEX],
                output_lens,
            )
        else:
            encoded = kernels.argmax(adjusted)
        if adjusted is not logits:  # a stop token that comes too early is infinite there, and the row is not
            encoded = encode_finite(decode_ids(encoded), logits)
        if plan.penalised is not None:
            assert state.output_counts is not None
            rows, of = (placed.tensor for placed in plan.penalised)
            ones = torch.ones_like(rows, dtype=torch.int32)
            token_ids = decode_ids(encoded.index_select(0, rows))
            state.output_counts.index_put_((of, token_ids), ones, accumulate=True)
        logprobs = None
        if plan.placed_logprob_rows is not None:
            rows = plan.placed_logprob_rows.tensor
            token_ids = decode_ids(encoded.index_select(0, rows))
            logprobs = kernels.token_logprobs(logits.index_select(0, rows), token_ids, max(plan.num_top))
        return Sampled(encoded, logprobs)

    def _adjust(self, logits: torch.Tensor, plan: SamplePlan) -> torch.Tensor:
        """The logits after penalties, bias and min_tokens. Rows that ask for none keep theirs bit by bit."""
        state, kernels = self.state, self.kernels
        if plan.penalised is None and plan.biased is None and plan.stopped is None:
            return logits
        logits = logits.to(torch.float32, copy=True)
        if plan.penalised is not None:
            assert state.prompt_seen is not None
            assert state.output_counts is not None
            rows, of = (placed.tensor for placed in plan.penalised)
            penalised = kernels.apply_penalties(
                logits.index_select(0, rows),
                state.prompt_seen.index_select(0, of),
                state.output_counts.index_select(0, of),
                *state.penalties.index_select(1, of),
            )
            logits.index_copy_(0, rows, penalised)
        if plan.biased is not None:
            kernels.add_logit_bias(logits, *(placed.tensor for placed in plan.biased))
        if plan.stopped is not None:
            kernels.mask_tokens(logits, *(placed.tensor for placed in plan.stopped))
        return logits


def _repeat(rows: Slots, parts: Sequence[Slots]) -> Slots:
    """Each row as often as its part has elements."""
    return np.repeat(rows, [part.size for part in parts])


def describe_logprobs(rows: TokenLogprobRows, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities on the host as they are sent; num_top is how many likeliest tokens each row wants."""
    columns = (rows.logprobs, rows.ranks, rows.top_ids, rows.top_logprobs)
    return [
        TokenLogprobs(logprob, rank, top_ids[:top], top_logprobs[:top])
        for logprob, rank, top_ids, top_logprobs, top in zip(*(c.tolist() for c in columns), num_top, strict=True)
    ]
