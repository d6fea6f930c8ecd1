"""A step between plan and output: the plan while it is made, what is remembered of it, and what its result brought."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.sequence import Sequence, SequenceGroup
from scheduler.step_plan import NO_MOVES, BlockMoves, Fork, NewSequence, StepPlan, TokenLogprobs


class ResultError(ValueError):
    """A step result contradicts its plan; the caller should drop the worker."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step result brought: accepted tokens only, dropped ones are not in it. Do not change the lists."""

    accepted: bool = True  # False: the result was stale and has been ignored, or came early and is kept for its turn
    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # parallel to sequences
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position in token_ids
    num_searched: int = 0  # of the tokens, those of beam searches, which are told all at once
    first_tokens: list[SequenceGroup] = field(default_factory=list)  # groups that had got none before

    def followed_by(self, other: StepOutput) -> StepOutput:
        """This output and the next one, when two results were applied together."""
        shift = len(self.token_ids)
        return StepOutput(
            True,
            self.sequences + other.sequences,
            self.token_ids + other.token_ids,
            self.logprobs | {position + shift: entry for position, entry in other.logprobs.items()},
            self.num_searched + other.num_searched,
            self.first_tokens + other.first_tokens,
        )


@dataclass(slots=True, eq=False)
class Draft:
    """A plan being made, with what has to be remembered until its result is in."""

    step: int
    left: int = 0  # token budget not used yet
    left_for_heavy: int = 0  # of that, for the prompts of heavy tenants
    has_preempted: bool = False
    serves_light_tenants: bool = False  # a prompt of one is in it, so those of heavy tenants wait for the next step
    decodes_sit_out: bool = False  # the decode set waits for the next step
    idle_since: int | None = None  # the result that it follows came then, and the worker has had nothing since
    release_slots: list[int] = field(default_factory=list)
    swap_out: BlockMoves = NO_MOVES
    swap_in: BlockMoves = NO_MOVES
    copies: BlockMoves = NO_MOVES
    new_sequences: list[NewSequence] = field(default_factory=list)
    append_slots: list[int] = field(default_factory=list)
    append_blocks: list[int] = field(default_factory=list)
    beam_slots: list[int] = field(default_factory=list)
    beam_parents: list[int] = field(default_factory=list)
    beam_tokens: list[int] = field(default_factory=list)
    replace_slots: list[int] = field(default_factory=list)
    replace_indices: list[int] = field(default_factory=list)
    replace_blocks: list[int] = field(default_factory=list)
    decode_remove: list[int] = field(default_factory=list)
    decode_add: list[int] = field(default_factory=list)
    chunk_slots: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    # Remembered until the result:
    decoding: list[Sequence] = field(default_factory=list)  # the decode set but for beams; never changed in place
    beams: list[Sequence] = field(default_factory=list)  # in the decode set for this step alone, behind the others
    sampling: list[Sequence] = field(default_factory=list)  # chunks that sample, in plan order
    forked: list[Sequence] = field(default_factory=list)  # rows of forks, in plan order
    chunks: dict[int, Sequence] = field(default_factory=dict)  # by slot
    ending: list[Sequence] = field(default_factory=list)  # this step samples their last token by length
    dropped: set[Sequence] = field(default_factory=set)  # ended or started over since: their tokens do not count
    sharers: list[SequenceGroup] = field(default_factory=list)  # started in this plan on cached blocks
    registered: list[tuple[list[int], list[bytes]]] = field(default_factory=list)  # blocks findable once it is made
    recomputed_tokens: int = 0
    cache_blocks_out: int = 0  # of the swaps out, those for the prefix cache's second tier
    cache_blocks_in: int = 0

    @property
    def rows(self) -> list[Sequence]:
        """The sequences behind the rows of the result, in order."""
        if self.sampling or self.beams:
            return self.decoding + self.beams + self.sampling + self.forked
        return self.decoding

    @property
    def searches(self) -> bool:
        """Some row is a beam."""
        return bool(self.beams) or (bool(self.sampling) and any(s.group.search is not None for s in self.sampling))

    def ignores(self, group: SequenceGroup) -> bool:
        """Nothing that this step brings for the group counts."""
        return all(sequence in self.dropped for sequence in group.live)

    def plan(self, epoch: int) -> StepPlan:
        """The draft as the value that the worker gets."""
        return StepPlan(
            epoch=epoch,
            step=self.step,
            release_slots=self.release_slots,
            swap_out=self.swap_out,
            swap_in=self.swap_in,
            copies=self.copies,
            new_sequences=self.new_sequences,
            beam_slots=self.beam_slots,
            beam_parents=self.beam_parents,
            beam_tokens=self.beam_tokens,
            append_slots=self.append_slots,
            append_blocks=self.append_blocks,
            replace_slots=self.replace_slots,
            replace_indices=self.replace_indices,
            replace_blocks=self.replace_blocks,
            decode_remove=self.decode_remove,
            decode_add=self.decode_add,
            chunk_slots=self.chunk_slots,
            chunk_tokens=self.chunk_tokens,
            forks=self.forks,
        )

    def add_swap_out(self, moves: BlockMoves) -> None:
        self.swap_out = self.swap_out.followed_by(moves)

    def add_swap_in(self, moves: BlockMoves) -> None:
        self.swap_in = self.swap_in.followed_by(moves)

    def add_copy(self, slot: int, index: int, source: int, destination: int) -> None:
        """Copy-on-write: entry `index` of the row's block table becomes a copy."""
        self.copies = self.copies.followed_by(BlockMoves([source], [destination]))
        self.replace_slots.append(slot)
        self.replace_indices.append(index)
        self.replace_blocks.append(destination)

    def add_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """Prefill: `num_tokens` further known tokens of a row."""
        self.left -= num_tokens
        self.chunk_slots.append(sequence.slot)
        self.chunk_tokens.append(num_tokens)
        self.chunks[sequence.slot] = sequence
