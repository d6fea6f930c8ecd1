"""Tenants that ask for little beside one that asks for much: who they are, and what is kept short for them.

A light tenant's request comes at any moment. However early it stands in line, it waits for the step that runs, and for
the one that has been planned behind it. So while a light tenant is there, or was lately,

    heavy_budget   the heavy tenants' prompts are spread over steps, instead of filling one whenever a row is free
    plan_ahead.py  the next step is planned shortly before the worker needs it, also while others wait

Neither takes anything from the heavy tenants over time: the same prompts are computed, in chunks of even size.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduler.step_time import LEAST_CHUNK, StepTime

LIGHT = 4
"""A tenant that has lately been charged so many times less than another is light."""
NEGLIGIBLE = 16 * LIGHT
"""A tenant with so many times less is forgotten."""
HALF_LIFE_NS = 20_000_000_000
"""What was charged so long ago counts half: longer than most requests take, so that one request more or less does not
make a tenant heavy or light."""
LOOK_NS = 200_000_000
"""So often all tenants are looked at; those whose request comes, at once."""
GUARD_NS = 60_000_000_000
"""For so long after a light tenant was there it is expected to come back."""

SPREAD = 8
"""Steps over which the heavy prompts that have room are spread. With more, rows stand idle for longer than a step
of theirs takes; with fewer, single steps are long."""
STRETCH = 2.0
"""Those prompts make a step so many times as long as its decodes alone, at most."""
CHEAP = 1.5
"""And as many of their tokens are always taken as make it so many times as long: cut further, the same prompts would
make more such steps, and every step with a chunk costs more than its tokens."""


class Demand:
    """What each tenant has been charged lately, in decaying units."""

    __slots__ = ("_came", "_expected_until", "_halved_at", "_look_again_at", "_most", "_units", "is_guarded")

    def __init__(self) -> None:
        self._units: dict[str, float] = {}
        self._most = 0.0  # of one tenant
        self._halved_at = 0  # nanoseconds
        self._look_again_at = 0  # nanoseconds
        self._came: set[str] = set()  # tenants with a new group since the last look
        self._expected_until = 0  # nanoseconds
        self.is_guarded = False
        """Whether a light tenant is there, or is expected back. Nothing needs to be charged while there is neither
        that nor a second tenant."""

    def charge(self, tenant: str, units: int) -> None:
        """Units of a tenant have been planned."""
        now = self._units[tenant] = self._units.get(tenant, 0.0) + units
        if now > self._most:
            self._most = now

    def came(self, tenant: str) -> None:
        """A group of a tenant has come."""
        self._came.add(tenant)

    def is_light(self, tenant: str) -> bool:
        """Whether another tenant has lately been charged at least LIGHT times as much."""
        return 0 < self._most >= LIGHT * self._units.get(tenant, 0.0)

    def look(self, now: int, present: Collection[str]) -> None:
        """A step is about to be planned; `present`: the tenants with groups."""
        if now < self._look_again_at and not self._came:
            self.is_guarded = now < self._expected_until
            return
        halvings = (now - self._halved_at) // HALF_LIFE_NS
        if now >= self._look_again_at:
            self._look_again_at = now + LOOK_NS
            self._came.update(present)
        if halvings > 0:
            self._halved_at += halvings * HALF_LIFE_NS
            part = 0.5 ** min(halvings, 64)
            self._most *= part
            least = max(1.0, self._most / NEGLIGIBLE)
            self._units = {tenant: units * part for tenant, units in self._units.items() if units * part >= least}
            self._most = max(self._units.values(), default=0.0)
        if self._came:
            if len(present) > 1 and any(tenant in present and self.is_light(tenant) for tenant in self._came):
                self._expected_until = now + GUARD_NS
            self._came.clear()
        self.is_guarded = now < self._expected_until


def heavy_budget(left: int, backlog: int, decodes: int, step_time: StepTime) -> int:
    """Of `left` chunk tokens of a step beside `decodes` decodes, those that heavy tenants' prompts may have. `backlog`:
    tokens of their prompts that have room. At least LEAST_CHUNK, so they always go on."""
    decodes, spread = max(1, decodes), -(-backlog // SPREAD)
    alone = step_time.ns(decodes, 0)
    if not alone:
        return min(left, max(LEAST_CHUNK, spread))
    cheap, most = (step_time.chunk_budget(left, round(factor * alone), decodes) for factor in (CHEAP, STRETCH))
    return min(left, max(LEAST_CHUNK, cheap, min(spread, most)))
