"""How a role tells its supervisor that it is ready or cannot start: one JSON line on an inherited descriptor."""

from __future__ import annotations

import json
import os
from typing import Any

MAX_LINE_BYTES = 4096
"""Longer lines are not atomic on a pipe."""

_told: set[int] = set()
"""Descriptors that have been used up. Their numbers may belong to other files by now."""


def announce(ready_fd: int | None, **fields: Any) -> None:
    """Writes `fields` as one JSON line to `ready_fd` and closes it.

    Does nothing without a descriptor, or the second time. A supervisor that has gone is no error here: the process
    notices that by other means.
    """
    if ready_fd is None or ready_fd in _told:
        return
    _told.add(ready_fd)
    line = (json.dumps(fields) + "\n").encode()
    assert len(line) <= MAX_LINE_BYTES, "a readiness line must fit into one pipe write"
    try:
        os.write(ready_fd, line)
    except BrokenPipeError:
        pass
    finally:
        os.close(ready_fd)


def refuse(ready_fd: int | None, line: str) -> bool:
    """Tells the supervisor why the process cannot start. False if there is none to tell: print the line then."""
    if ready_fd is None or ready_fd in _told:
        return False
    try:
        announce(ready_fd, error=line[: MAX_LINE_BYTES // 8])
    except OSError:
        return False
    return True
