"""The rows of a worker's persistent batch: which are free, how many are held, and by whom."""

from __future__ import annotations

from scheduler.draft import Draft
from scheduler.sequence import Sequence, SequenceGroup


class Rows:
    """A running group holds a row for each of its sequences from its start on, at first as a promise. A row that is
    given back can be filled again from the plan on that releases it."""

    __slots__ = ("by", "free", "held", "most", "released")

    def __init__(self, num_slots: int, most: int) -> None:
        """num_slots: rows of the worker, of which `most` are used at a time."""
        self.most = most
        self.free = list(range(num_slots - 1, -1, -1))
        self.released: list[int] = []  # that the next plan releases
        self.held = 0  # or promised; the released ones included
        self.by: dict[tuple[str, int], int] = {}  # those that are not released, by tenant and priority

    def has_room(self, group: SequenceGroup) -> bool:
        """Whether a group's sequences can have rows in the next plan."""
        return self.held + len(group.live) <= self.most

    def promise(self, group: SequenceGroup, count: int) -> None:
        """A group starts to run with so many sequences."""
        self.held += count
        self._count(group, count)

    def take(self, sequence: Sequence) -> None:
        """A promised row becomes a row."""
        sequence.slot = self.free.pop()
        sequence.has_row = True

    def give_back(self, sequence: Sequence) -> None:
        """A running sequence needs its row, or its promise of one, no longer."""
        self._count(sequence.group, -1)
        if sequence.has_row:
            sequence.has_row = False
            self.released.append(sequence.slot)
        else:
            self.held -= 1

    def release(self, draft: Draft) -> None:
        """The plan being made releases what has been given back, and can fill it again."""
        released, self.released = self.released, []
        draft.release_slots = draft.release_slots + released
        self.free.extend(released)
        self.held -= len(released)

    def undo_release(self, draft: Draft) -> None:
        """The plan is not made. It has filled no row."""
        if draft.release_slots:
            del self.free[-len(draft.release_slots) :]
            self.held += len(draft.release_slots)
            self.released = draft.release_slots + self.released

    def by_tenant(self) -> dict[str, int]:
        """Rows that each tenant holds."""
        held: dict[str, int] = {}
        for (tenant, _), rows in self.by.items():
            held[tenant] = held.get(tenant, 0) + rows
        return held

    def _count(self, group: SequenceGroup, change: int) -> None:
        key = (group.request.tenant, group.request.priority)
        rows = self.by.get(key, 0) + change
        if rows:
            self.by[key] = rows
        else:
            del self.by[key]
