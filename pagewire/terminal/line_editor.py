"""Reads lines with the keys of a shell, a history that is kept, and completion of commands.

By the standard library's readline: it edits in place, wraps long lines and takes a paste of several lines as one.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from pagewire.commands.output import LOOK_S

HISTORY_LINES = 1000
BOLD, PLAIN = "\001\x1b[1m\002", "\001\x1b[0m\002"
"""Between marks that tell readline that they take no room."""


def history_file() -> Path:
    """Where lines are kept: below XDG_STATE_HOME, or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "pagewire" / "chat_history"


class LineEditor:
    """Reads lines from standard input. Without a terminal it reads them as they are, and keeps nothing.

    Args:
        path: the history; None: none is kept.
        words: completions of a first word that begins with a slash.
        arguments: completions of the second word, by first word; None: file names.
    """

    def __init__(self, path: Path | None, words: Sequence[str], arguments: Mapping[str, Sequence[str] | None]) -> None:
        self.complaint = ""
        """Why the history is not kept, in one line; empty: it is, or was not asked for."""
        self._path = path
        self._words = words
        self._arguments = arguments
        self._found: list[str] = []
        self._unread = b""
        self._readline: ModuleType | None = None
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # a Python that was built without it
                import readline

                self._readline = readline
                self._set_up(readline)

    def read(self) -> str:
        """The next line; one that ends with a backslash goes on in the next. Raises EOFError and KeyboardInterrupt."""
        prompt, text = "> ", ""
        while True:
            if self._readline is not None:
                line = input(f"{BOLD}{prompt}{PLAIN}")
            else:
                print(prompt, end="", flush=True)
                line = self._plain_line()
            self._keep()
            if not line.endswith("\\"):
                return text + line
            text += line[:-1] + "\n"
            prompt = ". "

    def _plain_line(self) -> str:
        """The next line of what is no terminal. Looks up often: a Ctrl-C that comes just before a read, or that another
        thread is given, would be noticed with the next line only."""
        while b"\n" not in self._unread:
            if not select.select([sys.stdin], [], [], LOOK_S)[0]:
                continue
            piece = os.read(sys.stdin.fileno(), 1 << 16)
            if not piece and not self._unread:
                raise EOFError
            self._unread += piece or b"\n"
        line, _, self._unread = self._unread.partition(b"\n")
        return line.removesuffix(b"\r").decode(sys.stdin.encoding, sys.stdin.errors or "strict")

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.touch(mode=0o600)
            with contextlib.suppress(OSError):  # libedit cannot read its own empty file
                readline.read_history_file(self._path)
            if readline.get_current_history_length() > HISTORY_LINES:
                readline.set_history_length(HISTORY_LINES)
                readline.write_history_file(self._path)
        except OSError as error:
            self.complaint = f"lines are not kept for the next chat: {self._path}: {error.strerror}"
            self._path = None

    def _keep(self) -> None:
        """Appends the last line to the file at once, so that several chats and a kill lose nothing."""
        if self._readline is not None and self._path is not None:
            with contextlib.suppress(OSError):
                self._readline.append_history_file(1, self._path)

    def _complete(self, text: str, state: int) -> str | None:
        """readline's question for the `state`-th completion of the word before the cursor."""
        assert self._readline is not None
        if state == 0:
            before = self._readline.get_line_buffer()[: self._readline.get_begidx()].split()
            self._found = self.completions(before, text)
        return self._found[state] if state < len(self._found) else None

    def completions(self, before: Sequence[str], text: str) -> list[str]:
        """What the word `text` behind the words `before` may become."""
        if not before:
            return [f"{word} " for word in self._words if text.startswith("/") and word.startswith(text)]
        if len(before) > 1 or before[0] not in self._arguments:
            return []
        names = self._arguments[before[0]]
        if names is not None:
            return [f"{name} " for name in names if name.startswith(text)]
        return _file_names(text)


def _file_names(text: str) -> list[str]:
    """Files whose names begin like that; folders with a slash behind them."""
    folder, slash, start = text.rpartition("/")
    try:
        entries = sorted(Path(f"{folder}{slash}" or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if entry.name.startswith(start) and (start or not entry.name.startswith("."))
    ]
