"""Step plans and step results as values: what the scheduler decides and what a worker answers.

They mirror `protos/pagewire/v1/worker.proto` field by field; only `codec.py` knows the wire. Plans of one epoch are
numbered 1, 2, 3, ...; every plan is to be understood as if the plans before it had completely finished. A plan holds
no token that a worker has sampled in the same epoch: a decoding row's input is "the token it sampled last". Beams are
the exception: a beam search chooses their tokens from results, so its next step is planned when they are in.

Nobody changes a list inside a plan once `schedule()` has returned it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from array import array

    from scheduler.sequence import Request


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position's log-probabilities, natural logarithm, of the raw distribution."""

    logprob: float  # of the chosen token
    rank: int  # of the chosen token, 1 = most likely
    top_ids: list[int] = field(default_factory=list)  # the N most likely tokens, most likely first
    top_logprobs: list[float] = field(default_factory=list)  # belong to top_ids


@dataclass(frozen=True, slots=True)
class BlockMoves:
    """Block copies as two lists of equal length; no destination appears twice."""

    sources: list[int] = field(default_factory=list)  # block ids the worker reads
    destinations: list[int] = field(default_factory=list)  # block ids the worker writes

    def __len__(self) -> int:
        return len(self.sources)

    def followed_by(self, other: BlockMoves) -> BlockMoves:
        """These moves, then the other ones."""
        return BlockMoves(self.sources + other.sources, self.destinations + other.destinations)


NO_MOVES = BlockMoves()
"""The empty list of moves, shared by all plans without any."""


class NewSequence(NamedTuple):
    """A row that the worker fills whole: an admitted, resumed or re-admitted sequence."""

    slot: int  # the empty row
    token_ids: array[int]  # all known tokens: prompt, then output so far
    prompt_tokens: int  # how many of token_ids are the prompt
    computed_tokens: int  # how many of token_ids have their KV in the blocks; below len(token_ids)
    blocks: list[int]  # the row's block table
    index: int  # type: ignore[assignment]  # of the sequence in its request; keys the draw with seed and position
    request: Request  # for the codec: sampling parameters (in payload), min_tokens, stop_ids
    logprobs: int | None = None  # as in the request; of a beam the tokens that it is to offer
    prompt_logprobs: int | None = None  # as in the request, None once they are complete


@dataclass(frozen=True, slots=True)
class Fork:
    """A row that becomes a copy of its parent's and samples from the parent's logits in this step."""

    parent_slot: int  # a row whose last chunk is in this plan
    slot: int  # the empty row to fill
    index: int  # of the new sequence in its request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, as changes to the worker's persistent batch, in the order in which the worker executes them."""

    epoch: int  # fences the plan: a worker refuses older ones
    step: int  # 1, 2, 3, ... within the epoch
    release_slots: list[int] = field(default_factory=list)  # rows that become empty; leaves the decode set too
    swap_out: BlockMoves = NO_MOVES  # KV block -> host block
    swap_in: BlockMoves = NO_MOVES  # host block -> KV block
    copies: BlockMoves = NO_MOVES  # KV block -> KV block (copy-on-write)
    new_sequences: list[NewSequence] = field(default_factory=list)  # rows filled whole
    append_slots: list[int] = field(default_factory=list)  # pairs with append_blocks: the row's table grows
    append_blocks: list[int] = field(default_factory=list)
    beam_slots: list[int] = field(default_factory=list)  # triples: the row continues a parent's beam with a token
    beam_parents: list[int] = field(default_factory=list)  # slots; all rows are read before the first is written
    beam_tokens: list[int] = field(default_factory=list)
    replace_slots: list[int] = field(default_factory=list)  # triples: one entry of the row's table changes
    replace_indices: list[int] = field(default_factory=list)
    replace_blocks: list[int] = field(default_factory=list)
    decode_remove: list[int] = field(default_factory=list)  # rows that leave the decode set but stay filled
    decode_add: list[int] = field(default_factory=list)  # rows appended to the decode set, in this order
    chunk_slots: list[int] = field(default_factory=list)  # pairs with chunk_tokens: known tokens to compute (prefill)
    chunk_tokens: list[int] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)  # parallel samples of a prompt whose last chunk is in this plan


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of consecutive prompt tokens of one row."""

    slot: int  # the row
    first_token: int  # position of the first entry in the prompt, at least 1
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Where a step's time went, in nanoseconds of the worker's clock. The cost model learns its rates from them."""

    idle_ns: int = 0  # the device waited for this plan
    swap_out_ns: int = 0
    swap_in_ns: int = 0
    copy_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0
    chunk_tokens: int = 0  # tokens computed by chunks in this step
    decode_tokens: int = 0  # tokens computed by the decode set in this step
    early_ns: int = 0  # before the device was free for this plan, its work for it was ready; 0: it was not, or unknown

    @property
    def step_ns(self) -> int:
        """From the step's begin to its end."""
        return self.swap_out_ns + self.swap_in_ns + self.copy_ns + self.forward_ns + self.sample_ns


NO_TIMINGS = StepTimings()


@dataclass(frozen=True, slots=True)
class StepResult:
    """A worker's answer to one plan. Its rows are: the decode set in order, the chunks that sample, the forks."""

    epoch: int
    step: int
    token_ids: list[int]  # one per row, also for rows that failed (the value is then meaningless)
    logprob_rows: list[int] = field(default_factory=list)  # rows that asked for log-probabilities, ascending
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # belong to logprob_rows
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    nonfinite_rows: list[int] = field(default_factory=list)  # rows whose logits were not finite
    timings: StepTimings = NO_TIMINGS
    out_of_memory_slots: list[int] = field(default_factory=list)  # row slots that could not be computed
