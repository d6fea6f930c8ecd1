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


@dataclass
class Rows:
    """The persistent batch, reduced to numbers. Plans must come in order, each once; forks are not followed."""

    decode_set: set[int] = field(default_factory=set)
    uncomputed: dict[int, int] = field(default_factory=dict)
    """Known tokens of each row that are still to be computed."""

    def apply(self, plan: Plan) -> int:
        """Applies a plan; returns how many rows sample in it."""
        self.decode_set.difference_update(plan.release_slots)
        for new in plan.new_sequences:
            self.uncomputed[new.slot] = len(new.token_ids) - new.computed_tokens
        self.decode_set.difference_update(plan.decode_remove)
        self.decode_set.update(plan.decode_add)
        finishing = 0
        for slot, tokens in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            self.uncomputed[slot] -= tokens
            finishing += self.uncomputed[slot] == 0
        return len(self.decode_set) + finishing
