"""One step's sampling over the rows that want a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels import reference
from worker.sampling_state import SamplingState, Slots
from worker.step import TokenLogprobs


@dataclass(frozen=True)
class Sampled:
    """What R rows sampled."""

    token_ids: torch.Tensor
    """int64 [R]."""
    nonfinite: torch.Tensor
    """bool [R]: the row's logits were not finite, its token means nothing."""
    logprob_rows: Sequence[int]
    """The rows that asked for log-probabilities, ascending."""
    logprobs: Sequence[TokenLogprobs]
    """Belongs to logprob_rows."""


class Sampler:
    """Chooses tokens in the order of the public API: penalties and bias, temperature, top-k, top-p, min-p, draw."""

    def __init__(self, state: SamplingState) -> None:
        self.state = state

    def sample(self, logits: torch.Tensor, slots: Slots, output_lens: Slots) -> Sampled:
        """Samples one token per row and counts it.

        logits is float32 [R, vocab] and may be overwritten; slots [R] are the rows' slots; output_lens [R] how many
        output tokens each has so far, which is the position that keys its draw.
        """
        state = self.state
        lowest, highest = logits.aminmax(dim=-1)
        nonfinite = ~(lowest.isfinite() & highest.isfinite())
        # A row that is not finite must neither raise nor slow the others: it samples from anything.
        logits.masked_fill_(nonfinite.unsqueeze(1), 0.0)
        adjusted = self._adjust(logits, slots, output_lens)
        random_rows = np.flatnonzero(state.random[slots])
        token_ids = reference.argmax(adjusted)
        if random_rows.size:
            rows, of = state.tensor(random_rows), state.tensor(slots[random_rows])
            positions = state.tensor(output_lens[random_rows])
            draws = reference.uniform_draws(state.seed[of], state.index[of], positions)
            token_ids[rows] = reference.sample(
                adjusted[rows], state.temperature[of], state.top_k[of], state.top_p[of], state.min_p[of], draws
            )
        state.note_sampled(slots, token_ids)
        logprob_rows = np.flatnonzero(state.logprobs[slots] >= 0)
        logprobs: list[TokenLogprobs] = []
        if logprob_rows.size:
            of_rows = state.tensor(logprob_rows)
            wanted = state.logprobs[slots[logprob_rows]].tolist()
            logprobs = describe_logprobs(logits[of_rows], token_ids[of_rows], wanted)
        return Sampled(token_ids, nonfinite, logprob_rows.tolist(), logprobs)

    def _adjust(self, logits: torch.Tensor, slots: Slots, output_lens: Slots) -> torch.Tensor:
        """The logits after penalties, bias and min_tokens. Rows that ask for none keep theirs bit by bit."""
        state = self.state
        penalised = np.flatnonzero(state.penalised[slots])
        biased = np.flatnonzero(state.biased[slots])
        too_short = np.flatnonzero(output_lens < state.min_tokens[slots])
        if not (penalised.size or biased.size or too_short.size):
            return logits
        logits = logits.clone()
        if penalised.size:
            assert state.prompt_seen is not None
            assert state.output_counts is not None
            rows, of = state.tensor(penalised), state.tensor(slots[penalised])
            logits[rows] = reference.apply_penalties(
                logits[rows],
                state.prompt_seen[of],
                state.output_counts[of],
                state.repetition[of],
                state.presence[of],
                state.frequency[of],
            )
        if biased.size:
            pairs = [state.bias[slot] for slot in slots[biased].tolist()]
            ids = [pair[0] for pair in pairs]
            rows = _repeat(state, biased, ids)
            reference.add_logit_bias(logits, rows, torch.cat(ids), torch.cat([pair[1] for pair in pairs]))
        if too_short.size:
            ids = [state.stop_ids[slot] for slot in slots[too_short].tolist()]
            reference.mask_tokens(logits, _repeat(state, too_short, ids), torch.cat(ids))
        return logits


def _repeat(state: SamplingState, rows: Slots, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each row as often as its part has elements."""
    return state.tensor(np.repeat(rows, [part.numel() for part in parts]))


def describe_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of R rows: logits float32 [R, vocab], chosen tokens int64 [R], number of likeliest tokens."""
    rows = reference.token_logprobs(logits, token_ids, max(num_top))
    columns = (rows.logprobs, rows.ranks, rows.top_ids, rows.top_logprobs)
    return [
        TokenLogprobs(logprob, rank, top_ids[:top], top_logprobs[:top])
        for logprob, rank, top_ids, top_logprobs, top in zip(*(c.tolist() for c in columns), num_top, strict=True)
    ]
