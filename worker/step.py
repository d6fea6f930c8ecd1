"""Step plans and step results as the worker sees them. `worker.proto` says what each field means and in which order a
plan is executed; `worker.codec` converts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class PlanError(Exception):
    """A plan contradicts what the worker knows. Executing it could corrupt KV blocks, so the process must end."""


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen. Unset fields of the wire message have these defaults."""

    temperature: float = 1.0
    """Below 1e-5: greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """Unsigned 64 bits."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of token id and bias."""


@dataclass(frozen=True)
class NewSequence:
    """A row's whole content."""

    slot: int
    token_ids: Sequence[int]
    prompt_tokens: int
    computed_tokens: int
    blocks: Sequence[int]
    index: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Fork:
    """A row that becomes a copy of its parent's."""

    parent_slot: int
    slot: int
    index: int


@dataclass(frozen=True)
class BlockMoves:
    """Block copies: sources[i] to destinations[i]."""

    sources: Sequence[int] = ()
    destinations: Sequence[int] = ()


@dataclass(frozen=True)
class StepPlan:
    """One step, as changes to the persistent batch, in the order in which they are made."""

    epoch: int
    step: int
    release_slots: Sequence[int] = ()
    swap_out: BlockMoves = field(default_factory=BlockMoves)
    swap_in: BlockMoves = field(default_factory=BlockMoves)
    copies: BlockMoves = field(default_factory=BlockMoves)
    new_sequences: Sequence[NewSequence] = ()
    append_slots: Sequence[int] = ()
    append_blocks: Sequence[int] = ()
    beam_slots: Sequence[int] = ()
    beam_parents: Sequence[int] = ()
    beam_tokens: Sequence[int] = ()
    replace_slots: Sequence[int] = ()
    replace_indices: Sequence[int] = ()
    replace_blocks: Sequence[int] = ()
    decode_remove: Sequence[int] = ()
    decode_add: Sequence[int] = ()
    chunk_slots: Sequence[int] = ()
    chunk_tokens: Sequence[int] = ()
    forks: Sequence[Fork] = ()
    traceparents: Sequence[str] = ()
    """Traces that this step belongs to. The executor does not read them."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one position, of the raw distribution."""

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of consecutive prompt tokens of one row."""

    slot: int
    first_token: int
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True)
class StepTimings:
    """Where the step's time went, in nanoseconds; and how many tokens it computed."""

    idle_ns: int = 0
    swap_out_ns: int = 0
    swap_in_ns: int = 0
    copy_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    chunk_tokens: int = 0
    decode_tokens: int = 0
    early_ns: int = 0
    """Before the device was free, its work for this step was ready. 0: it was not, or that is unknown."""


@dataclass(frozen=True)
class StepResult:
    """The answer to one plan."""

    epoch: int
    step: int
    token_ids: Sequence[int] = ()
    logprob_rows: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[PromptLogprobs] = ()
    nonfinite_rows: Sequence[int] = ()
    timings: StepTimings = field(default_factory=StepTimings)
    out_of_memory_slots: Sequence[int] = ()
