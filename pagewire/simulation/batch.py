"""What the steps of a run have to do: a worker's rows, followed by its plans, without memory and without a model.

A steady decode step costs a constant: a row of the decode set keeps the lengths that it joined with, and grows by one
token per step until it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, Self, TypeVar

from scheduler.sequence import Request


class Moves(Protocol):
    """Block copies."""

    @property
    def sources(self) -> Sequence[int]: ...


class Plan(Protocol):
    """What counts of a step plan; the scheduler's and the worker's dataclass both have it."""

    @property
    def release_slots(self) -> Sequence[int]: ...

    @property
    def swap_out(self) -> Moves: ...

    @property
    def swap_in(self) -> Moves: ...

    @property
    def copies(self) -> Moves: ...

    @property
    def new_sequences(self) -> Sequence[Any]: ...

    @property
    def beam_slots(self) -> Sequence[int]: ...

    @property
    def beam_parents(self) -> Sequence[int]: ...

    @property
    def beam_tokens(self) -> Sequence[int]: ...

    @property
    def decode_remove(self) -> Sequence[int]: ...

    @property
    def decode_add(self) -> Sequence[int]: ...

    @property
    def chunk_slots(self) -> Sequence[int]: ...

    @property
    def chunk_tokens(self) -> Sequence[int]: ...

    @property
    def forks(self) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step has to do."""

    decode_tokens: int = 0
    """Rows of the decode set; each computes one token."""
    decode_context: int = 0
    """Sum of their context lengths, the computed token included."""
    num_chunks: int = 0
    chunk_tokens: int = 0
    """Tokens computed by chunks."""
    chunk_context: int = 0
    """Sum over chunks of the context read."""
    chunk_pairs: int = 0
    """Sum over chunks of pairs of a computed token and a token that it attends to."""
    copied_blocks: int = 0
    """Copy-on-write."""
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0

    @property
    def attended_pairs(self) -> int:
        """Pairs of a computed token and a token that it attends to."""
        return self.decode_context + self.chunk_pairs

    @property
    def context_tokens(self) -> int:
        """Tokens whose KV is read: the contexts of all rows in the step, once each."""
        return self.decode_context + self.chunk_context


@dataclass(slots=True)
class Row:
    """One row of the persistent batch. In the decode set, lengths are those that it joined with."""

    known: int
    """Tokens, prompt and output; the next one sampled comes to this position."""
    computed: int
    """Of them, those with KV."""
    joined: int = field(default=0, init=False)
    """The step in which it joined the decode set."""

    @classmethod
    def of(cls, new: Any) -> Self:
        """The row of a plan's new sequence."""
        return cls(len(new.token_ids), new.computed_tokens)

    def forked(self, index: int) -> Self:
        """A copy for another sequence of the request."""
        return replace(self)

    def followed_by(self, token: int) -> Self:
        """A copy for a beam that goes on with a token, which is among the known ones already."""
        return replace(self)


@dataclass(slots=True)
class RequestRow(Row):
    """A row that knows whose it is. What it adds to a row never changes."""

    request: Request
    index: int
    """Of the sequence in its request."""
    beam: tuple[int, ...] = ()
    """Output tokens of a beam."""

    @classmethod
    def of(cls, new: Any) -> Self:
        output = tuple(new.token_ids[new.prompt_tokens :]) if new.request.is_beam_search else ()
        return cls(len(new.token_ids), new.computed_tokens, new.request, new.index, output)

    def forked(self, index: int) -> Self:
        return replace(self, index=index)

    def followed_by(self, token: int) -> Self:
        return replace(self, beam=(*self.beam, token))


RowT = TypeVar("RowT", bound=Row)


class Batch(Generic[RowT]):
    """The rows of one epoch. Plans must come in order, each once."""

    def __init__(self, row_of: Callable[[Any], RowT]) -> None:
        """`row_of` makes the row of a plan's new sequence."""
        self.rows: dict[int, RowT] = {}
        """By slot."""
        self.decode_set: dict[int, RowT] = {}
        """Those of them that decode, in order."""
        self.finishing: list[RowT] = []
        """The other rows that sample in the last step: chunks that reach the end of the known tokens, then forks."""
        self._row_of = row_of
        self._step = 0
        self._offsets = 0
        """Sum over the decode set of computed tokens less the step of joining."""

    @property
    def num_sampling(self) -> int:
        """Rows that sample in the last step."""
        return len(self.decode_set) + len(self.finishing)

    def sampling(self) -> list[tuple[RowT, int]]:
        """The rows that sample in the last step, in the order of its result, each with the position of its token."""
        decoding = [(row, row.known + self._step - row.joined) for row in self.decode_set.values()]
        return decoding + [(row, row.known) for row in self.finishing]

    def execute(self, plan: Plan) -> StepLoad:
        """Takes the next step. Returns what it has to do."""
        step = self._step = self._step + 1
        for row in self.finishing:
            row.known += 1  # what it sampled in the step before
        for slot in plan.release_slots:
            self._leave(slot)
            del self.rows[slot]
        for slot in plan.decode_remove:
            self._leave(slot)
        for new in plan.new_sequences:
            self.rows[new.slot] = self._row_of(new)
        if plan.beam_slots:
            moved = zip(plan.beam_slots, plan.beam_parents, plan.beam_tokens, strict=True)
            self.rows.update([(slot, self.rows[parent].followed_by(token)) for slot, parent, token in moved])
        for slot in plan.decode_add:
            row = self.decode_set[slot] = self.rows[slot]
            row.joined = step
            self._offsets += row.computed - step
        self.finishing = []
        chunk_tokens = chunk_context = chunk_pairs = 0
        for slot, count in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            row = self.rows[slot]
            chunk_pairs += count * row.computed + count * (count + 1) // 2
            row.computed += count
            chunk_context += row.computed
            chunk_tokens += count
            if row.computed == row.known:
                self.finishing.append(row)
        for fork in plan.forks:
            row = self.rows[fork.slot] = self.rows[fork.parent_slot].forked(fork.index)
            self.finishing.append(row)
        num_decode = len(self.decode_set)
        return StepLoad(
            decode_tokens=num_decode,
            decode_context=self._offsets + num_decode * (step + 1),
            num_chunks=len(plan.chunk_slots),
            chunk_tokens=chunk_tokens,
            chunk_context=chunk_context,
            chunk_pairs=chunk_pairs,
            copied_blocks=len(plan.copies.sources),
            swapped_out_blocks=len(plan.swap_out.sources),
            swapped_in_blocks=len(plan.swap_in.sources),
        )

    def _leave(self, slot: int) -> None:
        row = self.decode_set.pop(slot, None)
        if row is not None:
            self._offsets -= row.computed - row.joined
            row.known += self._step - row.joined
            row.computed += self._step - row.joined
