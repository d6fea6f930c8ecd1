"""Parked and held requests: until when each is kept, and how many a tenant may have.

A parked request has been taken off its worker in mid-generation; a held one has ended by STOP or LENGTH and asked for
its KV to be kept. Both wait for a Continue, for as long as they asked for at most. Their KV is in the arena of the
worker that they ran on, or nowhere: then it is computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heappop, heappush

from scheduler.policy import SchedulerConfig
from scheduler.sequence import SequenceGroup


class Parking:
    """Groups that wait to be continued, by request id."""

    __slots__ = ("_by_tenant", "_config", "_expiries", "_groups")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._groups: dict[str, SequenceGroup] = {}  # in order of parking
        self._by_tenant: Counter[str] = Counter()
        self._expiries: list[tuple[int, int, str]] = []  # time, arrival, request id; some are outdated

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._groups.values())

    def get(self, request_id: str) -> SequenceGroup | None:
        """The group of that name, if it is here."""
        return self._groups.get(request_id)

    def has_room(self, tenant: str) -> bool:
        """Whether one more of a tenant may come."""
        config = self._config
        return len(self._groups) < config.max_parked and self._by_tenant[tenant] < config.max_parked_per_tenant

    def held_for_longest(self, tenant: str) -> SequenceGroup | None:
        """Who of a tenant would make room: the held group that came first. Parked ones have not ended and stay."""
        own = (group for group in self._groups.values() if group.request.tenant == tenant)
        return next((group for group in own if not group.is_parked), None)

    def add(self, group: SequenceGroup) -> None:
        """Keeps a group until its `keep_until`."""
        assert group.keep_until is not None
        request = group.request
        self._groups[request.request_id] = group
        self._by_tenant[request.tenant] += 1
        heappush(self._expiries, (group.keep_until, group.arrival, request.request_id))
        if len(self._expiries) > 2 * len(self._groups) + 64:  # mostly outdated: continued before they expired
            self._expiries = sorted(entry for entry in self._expiries if self._is_current(entry))

    def remove(self, group: SequenceGroup) -> None:
        """Forgets a group that is here."""
        del self._groups[group.request.request_id]
        self._by_tenant[group.request.tenant] -= 1
        if not self._by_tenant[group.request.tenant]:
            del self._by_tenant[group.request.tenant]

    def expired(self, now: int) -> list[SequenceGroup]:
        """Groups whose time is over; they stay until they are removed."""
        found = []
        while self._expiries and self._expiries[0][0] <= now:
            entry = heappop(self._expiries)
            if self._is_current(entry):
                found.append(self._groups[entry[2]])
        return found

    @property
    def next_expiry(self) -> int | None:
        """When the next one may expire; None: there is none."""
        return self._expiries[0][0] if self._expiries else None

    def _is_current(self, entry: tuple[int, int, str]) -> bool:
        group = self._groups.get(entry[2])
        return group is not None and (group.keep_until, group.arrival) == entry[:2]

    def check_integrity(self) -> None:
        """Raises AssertionError unless everybody here has ended, is counted and will expire."""
        entries = {entry[2] for entry in self._expiries if self._is_current(entry)}
        assert entries == self._groups.keys(), "a parked group never expires"
        assert self._by_tenant == Counter(group.request.tenant for group in self), "parked groups are miscounted"
        assert len(self._groups) <= self._config.max_parked, "too many groups are parked"
        for group in self:
            assert group.is_finished, f"{group} runs and is parked"
