"""Whether the next plan waits for the result of the step that runs, so that beams are gathered into one step.

A beam can only be planned when its result is in. A plan that is made ahead has everybody else, and the beams follow in
the step after it: with them, the weights are read twice for one token of theirs.

    made ahead    │ others, beams │ others │ others, beams │ others │        two searches alone    │ a │ b │ a │ b │
    gathered      │ others, beams │wait│ others, beams │wait│                                      │ a, b │wait│ a, b │

The wait is the way of a result to the scheduler and of a plan back, while the worker stands idle. It is measured, the
steps are predicted (scheduler/step_time.py), and whatever computes more tokens per second is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from scheduler.draft import Draft
from scheduler.sequence import SequenceGroup
from scheduler.step_time import StepTime

GAIN = 1.03
"""Waiting has to compute so many times as many tokens per second: predictions err by a few percent, and it makes the
others' tokens later."""
NEWEST = 0.25
"""Weight of the newest wait in their mean."""
LONGEST = 1.0
"""A wait counts as so many times its step at most: a stall of the scheduler should not end gathering."""
FORGETTING = 0.99
"""What a decision against waiting leaves of the measured wait: nothing measures it then, so it is tried again."""

Load = tuple[int, int]
"""Decode tokens and chunk tokens of a step."""


class Gathering:
    """What waits for results cost one worker."""

    __slots__ = ("wait_ns",)

    def __init__(self) -> None:
        self.wait_ns = 0.0
        """Time that the worker stands idle when a plan waits for a result. 0: not known, so it is tried."""

    def observe(self, wait_ns: int, step_ns: int) -> None:
        """A plan that followed a result while nothing else was in flight has kept the worker waiting for so long,
        before a step of `step_ns`."""
        wait = min(max(0, wait_ns), LONGEST * step_ns)
        self.wait_ns += (NEWEST if self.wait_ns else 1.0) * (wait - self.wait_ns)

    def pays(self, ahead: tuple[Load, Load], together: Load, step_time: StepTime) -> bool:
        """Whether one step of all `together` and its wait compute more tokens per second than two steps, of those who
        could be planned ahead and of those who can afterwards. False while no time of a step is known."""
        ahead_ns = sum(step_time.ns(*load) for load in ahead)
        together_ns = step_time.ns(*together) + self.wait_ns
        return sum(together) * ahead_ns > GAIN * sum(map(sum, ahead)) * together_ns

    def forget(self) -> None:
        """It has been decided not to wait."""
        self.wait_ns *= FORGETTING


def awaited_beams(in_flight: Iterable[Draft], running: Collection[SequenceGroup]) -> int:
    """Beams that can be planned when the results in flight are in: of the searches of which no row is missing then, and
    that go on."""
    rows = Counter(
        sequence.group
        for flight in in_flight
        for sequence in (*flight.beams, *flight.sampling)
        if sequence.group.search is not None
        and sequence.group in running
        and sequence not in flight.dropped
        and len(sequence.output) + 1 < sequence.request.max_tokens
    )
    return sum(len(group.sequences) for group, count in rows.items() if count + len(group.offers) == len(group.beams))
