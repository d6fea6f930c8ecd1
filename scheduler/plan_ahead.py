"""When the plan behind the step that runs is made: at once, or shortly before the worker needs it.

    at once    │ step 1 ▒▒▒▒▒▒ │ step 2 ▒▒▒▒▒▒ │ step 3: theirs │
                plan 2 ▲  ▲ somebody comes

    late       │ step 1 ▒▒▒▒▒▒ │ step 2: theirs │
                  somebody comes ▲  ▲ plan 2, the lead before the end

Whoever comes meanwhile is in it, and has their first token a step earlier. The lead is what planning, sending and
staging take, and what a prediction of a step errs by. It is learned from how early each plan was, or how late.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from scheduler.step_plan import StepTimings

FIRST_LEAD_NS = 3_000_000
"""Before anything is learned."""
LEAST_LEAD_NS = 500_000
EXTEND, SHORTEN = 4, 128
"""A plan that needed a longer lead lengthens it, by that part at most; one that needed less shortens it by that part:
one of 33 comes late."""
EXPECTED_NS = 1_000_000_000
"""For so long after a request another is expected at most;"""
LEAST_EXPECTED_NS = 100_000_000
"""at least, where several come at once again and again;"""
PATIENCE = 8
"""and else for so many of the gaps that lay between the last ones."""
LONGEST_GAP_NS = 250_000_000
"""Where requests come more seldom than that, hardly one is a step earlier for all the plans that are late."""
REMEMBERED = 8
"""Requests whose gaps are looked at."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step in flight."""

    step_ns: int  # predicted; 0: unknown
    lead_ns: int  # its plan was to be made so long before the end of those in flight, as predicted then; 0: unknown
    is_behind_chunks: bool


class PlanAhead:
    """When a worker will have done what is in flight, and when the next plan is to be made. Nanoseconds.

    Copies are not foreseen: then the plan is made early, and nobody waits for it."""

    __slots__ = ("_came", "_done_at", "_has_chunks", "_planned", "lead_ns")

    def __init__(self) -> None:
        self._planned: deque[_Planned] = deque()
        self._done_at = 0
        self._has_chunks = False  # the last step planned
        self._came: deque[int] = deque(maxlen=REMEMBERED)
        self.lead_ns = {False: FIRST_LEAD_NS, True: FIRST_LEAD_NS}
        """Behind a step of decodes alone, and behind one with chunks, whose time is harder to foresee."""

    def came(self, now: int) -> None:
        """A request has come."""
        self._came.append(now)

    def expects(self, now: int) -> bool:
        """Whether another is expected, so that plans should be late: not behind a single one, or a burst."""
        if len(self._came) < 2:
            return False
        last = self._came[-1]
        gap = (last - self._came[0]) // (len(self._came) - 1)
        expected = min(EXPECTED_NS, max(LEAST_EXPECTED_NS, PATIENCE * gap))
        return gap <= LONGEST_GAP_NS and now - last < expected

    def planned(self, step_ns: int, now: int, due: int, *, has_chunks: bool = False) -> None:
        """A plan has been made, for a step that is predicted to take `step_ns`; 0: unknown. It was to be made at `due`:
        what a timer is late by is a part of what the lead has to cover."""
        lead = self._done_at - due if self._planned and self._planned[-1].step_ns else 0
        self._planned.append(_Planned(step_ns, lead, self._has_chunks))
        self._has_chunks = has_chunks
        self._done_at = max(now, self._done_at) + step_ns

    def applied(self, now: int, timings: StepTimings) -> None:
        """The result of the oldest plan in flight is in: the next one has begun."""
        plan = self._planned.popleft()
        self._done_at = now + sum(step.step_ns for step in self._planned)
        if plan.lead_ns > 0:
            needed = plan.lead_ns - timings.early_ns + timings.idle_ns
            lead = self.lead_ns[plan.is_behind_chunks]
            change = min(needed - lead, lead // EXTEND) if needed > lead else -(lead // SHORTEN)
            self.lead_ns[plan.is_behind_chunks] = max(LEAST_LEAD_NS, lead + change)

    @property
    def due(self) -> int:
        """When the next plan is to be made."""
        return self._done_at - self.lead_ns[self._has_chunks]
