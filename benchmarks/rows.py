"""Counts which rows of a plan sample, as a stand-in for a worker has to know and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Plan(Protocol):
    """What counts of a step plan; the scheduler's and the worker's dataclass both have it."""

    @property
    def release_slots(self) -> Sequence[int]: ...

    @property
    def new_sequences(self) -> Sequence[Any]: ...

    @property
    def decode_remove(self) -> Sequence[int]: ...

    @property
    def decode_add(self) -> Sequence[int]: ...

    @property
    def chunk_slots(self) -> Sequence[int]: ...

    @property
    def chunk_tokens(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Work:
    """What one step computes."""

    decode_tokens: int
    chunk_tokens: int
    context_tokens: int
    """Tokens whose KV is read: the contexts of all rows in the step, once each."""
    sampled: int
    """Rows that sample."""


@dataclass
class Rows:
    """The persistent batch, reduced to numbers. Plans must come in order, each once; forks are not followed."""

    step: int = 0
    decode_set: dict[int, int] = field(default_factory=dict)
    """By slot: the row's known tokens, less the number of the step at which they were so many."""
    offsets: int = 0
    """Sum over the decode set, so that a steady step costs no loop."""
    known: dict[int, int] = field(default_factory=dict)
    """Known tokens of each row outside the decode set."""
    computed: dict[int, int] = field(default_factory=dict)
    """How many of them have KV."""

    def apply(self, plan: Plan) -> Work:
        """Applies a plan and says what it computes."""
        self.step += 1
        for slot in plan.release_slots:
            self._leave(slot)
        for new in plan.new_sequences:
            self.known[new.slot], self.computed[new.slot] = len(new.token_ids), new.computed_tokens
        for slot in plan.decode_remove:
            self._leave(slot)
        for slot in plan.decode_add:
            self.decode_set[slot] = self.known.pop(slot) - self.step
            self.offsets += self.decode_set[slot]
        context = self.offsets + self.step * len(self.decode_set)
        finishing = 0
        for slot, tokens in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            self.computed[slot] += tokens
            context += self.computed[slot]
            if self.computed[slot] == self.known[slot]:
                finishing += 1
                self.known[slot] += 1  # the token that it samples
        return Work(len(self.decode_set), sum(plan.chunk_tokens), context, len(self.decode_set) + finishing)

    def _leave(self, slot: int) -> None:
        offset = self.decode_set.pop(slot, None)
        if offset is not None:
            self.offsets -= offset
            self.known[slot] = offset + self.step
            self.computed[slot] = self.known[slot] - 1
