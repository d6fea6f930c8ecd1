"""Queues sorted by rank, and the tenants' own lines in them: who comes first is asked of the tenants, not of everybody
who waits."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

from scheduler.sequence import SequenceGroup


class TenantLines:
    """The groups of one queue by tenant, each tenant's by rank. A rank does not change while its group is here."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[str, list[SequenceGroup]] = {}  # none is empty

    def add(self, group: SequenceGroup) -> None:
        put_in(self._lines.setdefault(group.request.tenant, []), group)

    def remove(self, group: SequenceGroup) -> None:
        line = self._lines[group.request.tenant]
        take_out(line, group)
        if not line:
            del self._lines[group.request.tenant]

    def first(self, place: Callable[[SequenceGroup], Any]) -> SequenceGroup:
        """Who comes first by `place`, in which groups of one tenant go by rank. Somebody must be here."""
        return min([line[0] for line in self._lines.values()], key=place)

    def check_integrity(self, queue: list[SequenceGroup]) -> None:
        """Raises AssertionError unless exactly the queue's groups are here, in its order."""
        by_tenant: dict[str, list[SequenceGroup]] = {}
        for group in queue:
            by_tenant.setdefault(group.request.tenant, []).append(group)
        assert by_tenant == self._lines, "a tenant's line differs from the queue"


def put_in(queue: list[SequenceGroup], group: SequenceGroup) -> None:
    """Adds a group to a queue that is sorted by rank."""
    if queue and group.rank < queue[-1].rank:
        insort(queue, group, key=rank)
    else:
        queue.append(group)


def take_out(queue: list[SequenceGroup], group: SequenceGroup) -> bool:
    """Removes a group from a queue that is sorted by rank. False: it was not there."""
    index = 0 if queue and queue[0] is group else bisect_left(queue, group.rank, key=rank)
    if index == len(queue) or queue[index] is not group:
        return False
    del queue[index]
    return True


def rank(group: SequenceGroup) -> tuple[int, int, int, int]:
    return group.rank
