"""Ties a child process to its supervisor, so that a supervisor's sudden death leaves no orphans."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

VARIABLE = "PAGEWIRE_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1


def die_with_supervisor() -> None:
    """If a supervisor started this process, asks the kernel for SIGKILL when it ends. Call first, in the main thread.

    Linux only; elsewhere an orphan lives until someone ends it. The variable is consumed: it is not meant for
    processes that this one starts.
    """
    given = os.environ.pop(VARIABLE, "")
    if not given.isdecimal() or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(given):
        # It ended between our start and the call above.
        os._exit(1)
