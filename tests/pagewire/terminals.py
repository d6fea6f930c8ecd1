"""A program in a terminal of its own: what it draws is read, keys are typed."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 20.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|[\x01\x02]")
# Whoever runs the tests in the background has SIGINT ignored, and so would the child.
PROGRAM = (
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pagewire.cli import main; main(sys.argv[1:])"
)


class Terminal:
    """A pseudo-terminal with a process in it."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self.raw = b""
        """Everything that has been written so far."""
        self._descriptor = descriptor
        self._read_to = 0
        """In the text without escapes."""
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._receive)

    def _receive(self) -> None:
        try:
            part = os.read(self._descriptor, 65536)
        except OSError:  # the last writer has gone
            part = b""
        if not part:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self.raw += part
        self._changed.set()

    async def until(self, words: str) -> str:
        """Waits for words behind those that were waited for last; returns the text up to and with them."""
        while True:
            text = ESCAPES.sub("", self.raw.decode(errors="replace"))
            found = text.find(words, self._read_to)
            if found >= 0:
                begin, self._read_to = self._read_to, found + len(words)
                return text[begin : self._read_to]
            assert self.process.returncode is None, f"it ended without {words!r}: {text[-2000:]}"
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), LIMIT_S)
            except TimeoutError:
                raise AssertionError(f"no {words!r} in {LIMIT_S:g} s; the last bytes: {self.raw[-2000:]!r}") from None

    def type(self, text: str) -> None:
        """Types keys; Enter is \\r, Ctrl-C is \\x03, Ctrl-D is \\x04."""
        os.write(self._descriptor, text.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Changes the terminal's size, which the program is told by SIGWINCH."""
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def in_line_mode(self) -> bool:
        """Whether the terminal is as a shell expects it: lines are edited and keys are shown."""
        flags = termios.tcgetattr(self._descriptor)[3]
        return bool(flags & termios.ICANON) and bool(flags & termios.ECHO)

    async def exit_code(self) -> int:
        """Waits for the end; `raw` is complete then."""
        async with asyncio.timeout(LIMIT_S):
            code = await self.process.wait()
        while select.select([self._descriptor], [], [], 0)[0]:
            self.raw += os.read(self._descriptor, 65536)
        return code


@asynccontextmanager
async def terminal(
    *arguments: str, columns: int = 120, lines: int = 30, environment: dict[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """`pagewire ARGUMENTS` in a terminal, killed at the end of the `with` block if it still runs."""
    descriptor, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **(environment or {})}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        variables.pop(name, None)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, *arguments),
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=ROOT,
        env=variables,
        start_new_session=True,
    )
    made = Terminal(process, descriptor)
    try:
        yield made
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(child)
        os.close(descriptor)
