"""Named places where a test makes a process stall or die: `FAULT_POINTS=step.after_launch:sleep=2,emit.before:kill@7`.

Each entry is `NAME:ACTION[@N]`: `sleep=SECONDS` stalls the calling thread every time, `kill` ends the process as
SIGKILL does (no cleanup runs). With `@N` only the N-th visit acts, counted from 1. A place that acts says so on stderr
with one line, `fault point NAME: ACTION (visit N)`, so that a test can prove it was hit. When the variable is unset a
visit costs one call and one look at an empty dict.

A name is `<role or module>.<moment>`, such as `scheduler.after_apply`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass

from pagewire.runtime.errors import EXIT_CANNOT_START, StartError

VARIABLE = "FAULT_POINTS"


@dataclass
class _Fault:
    """What happens at one place."""

    sleep_s: float
    """Seconds to stall; negative: kill instead."""
    only_visit: int
    """The visit that acts, from 1; 0: every one."""
    visits: int = 0

    def due(self, name: str) -> bool:
        self.visits += 1
        if self.only_visit not in (0, self.visits):
            return False
        what = "kill" if self.sleep_s < 0 else f"sleep={self.sleep_s:g}"
        print(f"fault point {name}: {what} (visit {self.visits})", file=sys.stderr, flush=True)
        return True


def parse(text: str) -> dict[str, _Fault]:
    """Reads the variable's text. Raises StartError with the expected form for an entry that is malformed."""
    faults: dict[str, _Fault] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, action = entry.partition(":")
        action, _, visit = action.partition("@")
        kind, _, seconds = action.partition("=")
        try:
            if not (name and separator) or kind not in ("sleep", "kill") or (kind == "kill") != (not seconds):
                raise ValueError
            sleep_s = float(seconds) if kind == "sleep" else -1.0
            faults[name] = _Fault(sleep_s, int(visit) if visit else 0)
            if kind == "sleep" and not 0 <= sleep_s < 3600:
                raise ValueError
        except ValueError:
            raise StartError(f"{VARIABLE}: {entry!r} is not NAME:sleep=SECONDS or NAME:kill, with @N at will") from None
    return faults


def _from_environment() -> dict[str, _Fault]:
    """Read once, at import, so that visits cost nothing; a malformed text ends the process like any start-up error."""
    try:
        return parse(os.environ.get(VARIABLE, ""))
    except StartError as error:
        print(f"pagewire: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CANNOT_START) from None


_faults = _from_environment()


def fault_point(name: str) -> None:
    """Stalls or kills here if the environment asks for it. A stall blocks the whole thread."""
    if _faults and (fault := _faults.get(name)) is not None and fault.due(name):
        if fault.sleep_s < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(fault.sleep_s)


async def async_fault_point(name: str) -> None:
    """Like `fault_point`, but a stall leaves the event loop to others."""
    if _faults and (fault := _faults.get(name)) is not None and fault.due(name):
        if fault.sleep_s < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(fault.sleep_s)
