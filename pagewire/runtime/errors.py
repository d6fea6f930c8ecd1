"""How a role starts, stops and says that it cannot start.

Exit codes of every role: 0 after SIGTERM or SIGINT, 2 with one clear line when it cannot start, 1 with a traceback for
a defect (which a supervisor answers with a restart).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, NoReturn

from pagewire.runtime import ready

EXIT_CANNOT_START = 2


class StartError(Exception):
    """The process cannot start. The message is one line that names the mend; no traceback is shown."""


def fail_start(role: str, error: Exception | str, ready_fd: int | None = None) -> NoReturn:
    """Says in one line why a process cannot start and exits with code 2.

    A supervised process tells its supervisor, which prints the line once however many processes stumble over it; any
    other prints `pagewire <role>: <line>` on stderr.
    """
    line = " ".join(str(error).split())
    if not ready.refuse(ready_fd, f"{role}: {line}"):
        print(f"{' '.join(['pagewire', role]).rstrip()}: {line}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CANNOT_START)


def run_role(role: str, target: Callable[[], Any] | Coroutine[Any, Any, None], ready_fd: int | None = None) -> None:
    """Runs a role until it ends or a SIGTERM or SIGINT arrives, which counts as a clean end.

    Args:
        role: name for the error line, such as "scheduler".
        target: a coroutine; a function that makes one; or a synchronous function. On a signal the coroutine is
            cancelled, and in a synchronous function `SystemExit(0)` is raised, so both clean up in `finally`. Further
            signals are ignored while they do.
        ready_fd: where a supervisor waits for the role, for `fail_start`.

    Raises:
        SystemExit: with code 2 through `fail_start`, if the target raises StartError.
    """
    try:
        if inspect.iscoroutine(target):
            _run_async(target)
        else:
            assert callable(target)
            _run_sync(target)
    except StartError as error:
        fail_start(role, error, ready_fd)


def _run_sync(target: Callable[[], Any]) -> None:
    stopping = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True  # no Event: this may interrupt itself, and an Event's lock cannot be taken twice
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with _signals_repeated_until(lambda: stopping):
        try:
            result = target()
        except Exception:
            # A library that is being imported may turn the exit into an error of its own.
            if stopping:
                sys.exit(0)
            raise
    if inspect.iscoroutine(result):
        _run_async(result)


REPEAT_S = 0.05
"""How long a signal may lie unheard."""


@contextlib.contextmanager
def _signals_repeated_until(heard: Callable[[], bool]) -> Iterator[None]:
    """Sends a signal that has arrived to this thread again and again until its handler has run.

    CPython only notes a signal and runs the handler when the main thread next executes Python. One that arrives just
    before the thread begins to wait for a lock is noted and does not interrupt the wait: the worker whose queue stays
    empty would never hear of it. Only for the main thread.
    """
    this = threading.get_ident()
    noted, note = socket.socketpair()
    note.setblocking(False)

    def repeat() -> None:
        while number := noted.recv(1):
            while number[0] in (signal.SIGTERM, signal.SIGINT) and not heard():
                time.sleep(REPEAT_S)
                signal.pthread_kill(this, number[0])

    repeater = threading.Thread(target=repeat, daemon=True)
    repeater.start()
    before = signal.set_wakeup_fd(note.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        note.close()  # which ends the repeater
        repeater.join()
        noted.close()


def _run_async(coroutine: Awaitable[Any]) -> None:
    import uvloop

    async def main() -> None:
        task = asyncio.ensure_future(coroutine)
        loop = asyncio.get_running_loop()
        stopping = False

        def stop() -> None:
            nonlocal stopping
            if not stopping:
                stopping = True
                task.cancel()

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGINT, stop)
        try:
            await task
        except asyncio.CancelledError:
            if not stopping:
                raise

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    # Closing the loop restored the default handlers; a late second signal must not turn a clean end into a kill.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
