"""Queues of groups sorted by rank, with the tenants' own lines in them: who comes first is asked of the tenants, not of
everybody who waits."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any

from scheduler.sequence import SequenceGroup


class Line(list[SequenceGroup]):
    """Groups by rank. Change it by `enter` and `leave` only; a rank does not change while its group is here."""

    __slots__ = ("_tenants",)

    def __init__(self, groups: Iterable[SequenceGroup] = ()) -> None:
        super().__init__()
        self._tenants: dict[str, list[SequenceGroup]] = {}  # each tenant's by rank; none is empty
        for group in groups:
            self.enter(group)

    def enter(self, group: SequenceGroup) -> None:
        """Adds a group in its place."""
        _put_in(self, group)
        _put_in(self._tenants.setdefault(group.request.tenant, []), group)

    def leave(self, group: SequenceGroup) -> bool:
        """Removes a group. False: it was not here."""
        if not _take_out(self, group):
            return False
        own = self._tenants[group.request.tenant]
        _take_out(own, group)
        if not own:
            del self._tenants[group.request.tenant]
        return True

    def first(self, place: Callable[[SequenceGroup], Any]) -> SequenceGroup:
        """Who comes first by `place`, in which groups of one tenant go by rank. Somebody must be here."""
        return min([own[0] for own in self._tenants.values()], key=place)

    def check_integrity(self) -> None:
        """Raises AssertionError unless all are in order, and the tenants' lines hold the same."""
        assert [group.rank for group in self] == sorted(group.rank for group in self), "a queue is out of order"
        by_tenant: dict[str, list[SequenceGroup]] = {}
        for group in self:
            by_tenant.setdefault(group.request.tenant, []).append(group)
        assert by_tenant == self._tenants, "a tenant's line differs from the queue"


def _put_in(queue: list[SequenceGroup], group: SequenceGroup) -> None:
    if queue and group.rank < queue[-1].rank:
        insort(queue, group, key=rank)
    else:
        queue.append(group)


def _take_out(queue: list[SequenceGroup], group: SequenceGroup) -> bool:
    index = 0 if queue and queue[0] is group else bisect_left(queue, group.rank, key=rank)
    if index == len(queue) or queue[index] is not group:
        return False
    del queue[index]
    return True


def rank(group: SequenceGroup) -> tuple[int, int, int, int]:
    return group.rank
