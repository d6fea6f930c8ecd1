"""How a role tells its supervisor that it is ready: one JSON line on an inherited file descriptor."""

from __future__ import annotations

import json
import os
from typing import Any


def announce(ready_fd: int | None, **fields: Any) -> None:
    """Writes `fields` as one JSON line to `ready_fd` and closes it. Without a descriptor nothing happens.

    A supervisor that has gone is no error here: the process notices that by other means.
    """
    if ready_fd is None:
        return
    line = (json.dumps(fields) + "\n").encode()
    assert len(line) <= 4096, "longer lines are not atomic on a pipe"
    try:
        os.write(ready_fd, line)
    except BrokenPipeError:
        pass
    finally:
        os.close(ready_fd)
