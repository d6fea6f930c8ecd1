"""Single keys from a terminal, as they are pressed."""

from __future__ import annotations

import os
import sys
import termios
import tty
from types import TracebackType


class Keys:
    """Takes the terminal out of line mode for the length of a `with` block. Signals such as Ctrl-C stay as they are."""

    def __init__(self) -> None:
        self.descriptor: int | None = sys.stdin.fileno() if sys.stdin.isatty() else None
        """To wait on; None: standard input is no terminal, or has ended."""
        self._before: list[object] | None = None

    def __enter__(self) -> Keys:
        if self.descriptor is not None:
            self._before = termios.tcgetattr(self.descriptor)
            tty.setcbreak(self.descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def pressed(self) -> str:
        """What has been typed; empty at the end of input, which then is not waited on any more."""
        assert self.descriptor is not None
        typed = os.read(self.descriptor, 64)
        if not typed:
            self.descriptor = None
        return typed.decode(errors="replace")
