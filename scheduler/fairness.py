"""Fairness between tenants: how many tokens each has been served, and whose turn it is.

As the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): a tenant is
charged one unit per prompt token and two per output token, when they are planned, and of equal priority whoever has
been charged least goes first. What a preemption makes the worker compute again is nobody's bill.

A tenant that asks for little saves up little: with each request it is brought up to CREDIT below the least charged of
the others, and one that is new goes just before them. So it goes first for a moment, not for as long as it has slept.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.light_tenants import Demand
from scheduler.sequence import Sequence, SequenceGroup

PROMPT_TOKEN = 1
OUTPUT_TOKEN = 2
"""Units; an output token occupies a row of a step, a prompt token shares its step with many others."""
CREDIT = 4096
"""Units by which a tenant that comes back may be ahead of the others."""
NEW = -1 << 62
"""Stands for the counter of a tenant that nothing is known about."""
MAX_REMEMBERED = 1024
"""Tenants without a request whose counters are kept."""


class TenantTokens:
    """Counters of the tenants with groups on one worker, and of some that had."""

    __slots__ = ("_decoding", "_num_groups", "_remembered", "_rows", "_served", "demand", "is_guarded", "is_shared")

    def __init__(self) -> None:
        self._served: dict[str, int] = {}  # units; of the tenants with groups
        self._num_groups: dict[str, int] = {}  # of the same
        self._remembered: dict[str, int] = {}  # units; of tenants without groups, in order of leaving
        self._decoding: list[Sequence] = []  # the decode set that _rows counts
        self._rows: dict[str, int] = {}
        self.demand = Demand()
        self.is_guarded = False  # whether heavy tenants' steps are to be short, for a light one that is or will be here
        self.is_shared = False  # whether there is anybody to be fair to

    def enter(self, group: SequenceGroup) -> None:
        """A group has come to the worker. Takes from its tenant what it has saved up beyond the credit."""
        tenant = group.request.tenant
        self.demand.came(tenant)
        if tenant in self._served:
            self._num_groups[tenant] += 1
            if len(self._served) == 1:
                return
            served = self._served.pop(tenant)
        else:
            self._num_groups[tenant] = 1
            served = self._remembered.pop(tenant, NEW)
        others = min(self._served.values(), default=0)
        self.is_shared = bool(self._served)
        self._served[tenant] = others - 1 if served == NEW else max(served, others - CREDIT)

    def leave(self, group: SequenceGroup) -> None:
        """A group has left it."""
        tenant = group.request.tenant
        self._num_groups[tenant] -= 1
        if self._num_groups[tenant]:
            return
        del self._num_groups[tenant]
        self._remembered[tenant] = self._served.pop(tenant)
        self.is_shared = len(self._served) > 1
        if not self._served:  # an idle worker owes nobody anything
            self._remembered.clear()
        elif len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def served(self, group: SequenceGroup) -> int:
        """Units that the group's tenant has been charged."""
        return self._served[group.request.tenant]

    def served_more(self, group: SequenceGroup) -> set[str]:
        """Tenants that have been charged more than the group's."""
        own = self.served(group)
        return {tenant for tenant, served in self._served.items() if served > own}

    def look(self, now: int) -> None:
        """A step is about to be planned, `now` in nanoseconds."""
        self.demand.look(now, self._served.keys())
        self.is_guarded = self.demand.is_guarded

    def is_light(self, group: SequenceGroup) -> bool:
        """Whether the group's tenant asks for much less than another, that is here or was lately."""
        return self.is_charged and self.demand.is_light(group.request.tenant)

    @property
    def is_charged(self) -> bool:
        """Whether anybody wants to know who is served how much: also while the others are away for a moment."""
        return self.is_shared or bool(self._remembered) or self.is_guarded

    def charge_prompt(self, group: SequenceGroup, num_tokens: int) -> None:
        """Prompt tokens of a group have been planned."""
        self._charge(group.request.tenant, PROMPT_TOKEN * num_tokens)

    def charge_decodes(self, decoding: list[Sequence]) -> None:
        """A step of the decode set has been planned. The set is told by its identity: it is never changed in place."""
        if self._decoding is not decoding:
            self._decoding, self._rows = decoding, rows_by_tenant(decoding)
        for tenant, rows in self._rows.items():
            self._charge(tenant, OUTPUT_TOKEN * rows)

    def note_step(self, prompt_tokens: int, decodes: int) -> None:
        """A step of the only tenant there is has been planned. Nobody needs its counter; but whoever comes beside it
        is light or not by what it has had."""
        for tenant in self._served:
            self.demand.charge(tenant, PROMPT_TOKEN * prompt_tokens + OUTPUT_TOKEN * decodes)

    def _charge(self, tenant: str, units: int) -> None:
        self._served[tenant] += units
        self.demand.charge(tenant, units)

    def check_integrity(self, groups: Iterable[SequenceGroup]) -> None:
        """Raises AssertionError unless exactly the groups' tenants are counted."""
        counts: dict[str, int] = {}
        for group in groups:
            counts[group.request.tenant] = counts.get(group.request.tenant, 0) + 1
        assert counts == self._num_groups, "groups of tenants are miscounted"
        assert self._served.keys() == counts.keys(), "a tenant without groups has a counter, or the reverse"
        assert self.is_shared == (len(counts) > 1), "who shares is miscounted"
        assert not self._remembered.keys() & counts.keys(), "a tenant with groups is taken for absent"
        assert len(self._remembered) <= MAX_REMEMBERED, "too many tenants are remembered"


def rows_by_tenant(sequences: Iterable[Sequence]) -> dict[str, int]:
    """How many of the sequences each tenant has."""
    rows: dict[str, int] = {}
    for sequence in sequences:
        tenant = sequence.group.request.tenant
        rows[tenant] = rows.get(tenant, 0) + 1
    return rows
