"""Deadlines: when the next one needs looking at, and whether one can still be met.

A request is refused early, before it runs, when what it needs at least takes longer than it has: the prompt at the
measured marginal prefill rate, less what the prefix cache holds, and one step per further token that it asks for at
least. Waiting in the queue is not foreseen, so nobody is refused for a wait that might not come: a request that waits
is looked at again at the last moment at which it could start.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from scheduler.sequence import Request, SequenceGroup
from scheduler.step_time import StepTime

MARGIN = 0.8
"""What of the predicted time counts: rates are estimates, and a wrong refusal is worse than a late one."""


def least_ns(request: Request, cached_tokens: int, step_time: StepTime, decodes: int = 1) -> int:
    """Time from the start of a request to the last token that it asks for at least, in steps of `decodes` sequences; 0
    while rates are unknown."""
    if not step_time.prefill_tokens_per_second:
        return 0
    prefill = step_time.ns(0, max(1, len(request.prompt) - cached_tokens))
    decode = max(0, request.min_tokens - 1) * step_time.ns(decodes, 0)
    return int(MARGIN * (prefill + decode))


class Deadlines:
    """Live requests by the time at which they have to be looked at."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []  # time, arrival, request id; some are outdated

    def __len__(self) -> int:
        """Entries, outdated ones included."""
        return len(self._heap)

    def note(self, at: int, group: SequenceGroup, live: Mapping[str, SequenceGroup]) -> None:
        """A group has to be looked at then."""
        heappush(self._heap, (at, group.arrival, group.request.request_id))
        if len(self._heap) > 2 * len(live) + 64:  # mostly outdated: finished before their deadline
            self._heap = [entry for entry in self._heap if find(live, entry) is not None]
            heapify(self._heap)

    def take(self, now: int, live: Mapping[str, SequenceGroup]) -> list[SequenceGroup]:
        """Live groups that have to be looked at by now; they are forgotten here."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            group = find(live, heappop(self._heap))
            if group is not None:
                due.append(group)
        return due

    @property
    def next(self) -> int | None:
        """When the next one is due; None: there is none."""
        return self._heap[0][0] if self._heap else None


def find(live: Mapping[str, SequenceGroup], entry: tuple[int, int, str]) -> SequenceGroup | None:
    """The group that an entry is about, if it lives: its name may have been used again."""
    group = live.get(entry[2])
    return group if group is not None and group.arrival == entry[1] else None
