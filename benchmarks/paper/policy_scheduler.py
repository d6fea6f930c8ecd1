"""A scheduler process with another memory policy, for measurements with a real worker:
`python -m benchmarks.paper.policy_scheduler POLICY OPTIONS OF pagewire scheduler`.

The engine is the same but for the admission of requests (`benchmarks.simulator.allocation`). Requests of a benchmark
ignore the end of sequence, so `max_tokens` is how long an output becomes: what Orca's oracle knows.
"""

from __future__ import annotations

import functools
import sys

from benchmarks.simulator.allocation import OrcaMax, OrcaOracle, OrcaPow2, ReservingScheduler
from pagewire.cli import main as cli
from scheduler import engine
from scheduler.recorder import RecordedDispatcher
from scheduler.scheduler import Scheduler
from scheduler.sequence import Request

LONGEST = 2048
"""Tokens that Orca (Max) takes every sequence to become: the longest that the paper's model allowed."""


class _Measured(ReservingScheduler):
    def reserved_tokens(self, request: Request) -> int:
        return self.reservation.tokens(len(request.prompt), request.max_tokens, LONGEST)


class MeasuredMax(_Measured, OrcaMax):
    """Reserves the longest sequence."""


class MeasuredPow2(_Measured, OrcaPow2):
    """Reserves the output's next power of two."""


class MeasuredOracle(_Measured, OrcaOracle):
    """Reserves what the output becomes."""


POLICIES: dict[str, type[Scheduler]] = {
    "orca-max": MeasuredMax,
    "orca-pow2": MeasuredPow2,
    "orca-oracle": MeasuredOracle,
    "pagewire": Scheduler,
}


def main() -> None:
    """Runs the scheduler with the policy that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in POLICIES:
        sys.exit(f"the first argument must be one of {', '.join(POLICIES)}")
    make_scheduler = POLICIES[sys.argv[1]]
    # The one place where the process makes its dispatcher.
    engine.RecordedDispatcher = functools.partial(RecordedDispatcher, make_scheduler=make_scheduler)  # type: ignore[misc,assignment]
    cli(["scheduler", *sys.argv[2:]])


if __name__ == "__main__":
    main()
