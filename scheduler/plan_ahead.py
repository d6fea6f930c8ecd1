"""When the plan behind the step that runs is made: at once, or shortly before the worker needs it.

    at once    │ step 1 ▒▒▒▒▒▒ │ step 2 ▒▒▒▒▒▒ │ step 3: theirs │
                plan 2 ▲  ▲ somebody comes

    late       │ step 1 ▒▒▒▒▒▒ │ step 2: theirs │
                  somebody comes ▲  ▲ plan 2, the lead before the end

Whoever comes meanwhile is in it, and has their first token a step earlier. The lead is what planning, sending and
staging take, and what a prediction of a step errs by. It is learned from how long the device waited for such plans.
"""

from __future__ import annotations

from collections import deque

FIRST_LEAD_NS = 3_000_000
"""Before anything is learned."""
LEAST_LEAD_NS = 500_000
LEAD_SHARE = 8
"""The lead is at least that part of the step before the end of which the plan is made: its time is an estimate."""
SLACK_NS = 50_000
"""Between two steps the device is idle for so long at least, whenever the plan came."""
SLACK_SHARE = 128
"""What it waits below that part of its step is not worth a longer lead."""
EASE = 256
"""A plan that came in time shortens the lead by that part: a spike of the host is forgotten in a second or two, and
probing costs a tenth of a percent of the device's time."""
EXPECTED_NS = 1_000_000_000
"""For so long after a request another is expected."""


class PlanAhead:
    """When a worker will have done what is in flight, and when the next plan is to be made. Nanoseconds.

    Copies are not foreseen: then the plan is made early, and nobody waits for it."""

    __slots__ = ("_done_at", "_expected_until", "_last_ns", "_planned", "lead_ns")

    def __init__(self) -> None:
        self._planned: deque[tuple[int, bool]] = deque()  # of the steps in flight: predicted time, whether it was late
        self._done_at = 0
        self._last_ns = 0
        self._expected_until = 0
        self.lead_ns = FIRST_LEAD_NS

    def came(self, now: int) -> None:
        """A request has come."""
        self._expected_until = now + EXPECTED_NS

    def expects(self, now: int) -> bool:
        """Whether another is expected, so that plans should be late."""
        return now < self._expected_until

    def planned(self, step_ns: int, now: int, *, is_late: bool = False) -> None:
        """A plan has been made, for a step that is predicted to take `step_ns`; 0: unknown. `is_late`: it was held back
        until now."""
        self._last_ns = step_ns
        self._planned.append((step_ns, is_late))
        self._done_at = max(now, self._done_at) + step_ns

    def applied(self, now: int, step_ns: int, idle_ns: int) -> None:
        """The result of the oldest plan in flight is in: the next one has begun. Its step took `step_ns`, and the device
        was idle for `idle_ns` before."""
        _, was_late = self._planned.popleft()
        self._done_at = now + sum(predicted for predicted, _ in self._planned)
        if was_late:
            if idle_ns > max(SLACK_NS, step_ns // SLACK_SHARE):
                self.lead_ns += min(idle_ns, step_ns)
            else:
                self.lead_ns = max(LEAST_LEAD_NS, self.lead_ns - self.lead_ns // EASE)

    @property
    def due(self) -> int:
        """When the next plan is to be made."""
        return self._done_at - max(self.lead_ns, self._last_ns // LEAD_SHARE)
