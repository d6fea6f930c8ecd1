"""Streams answers to the terminal and says what they cost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue

from rich.console import Console

from pagewire.client import Stream
from pagewire.errors import PagewireError, UnavailableError
from pagewire.types import Finish, Piece, Usage

NS_PER_S = 1e9
CLOSE_LIMIT_S = 3.0
LOOK_S = 0.1


@contextmanager
def errors_as_one_line(command: str) -> Iterator[None]:
    """Ends the process with code 1 and one line when the client raises; with code 130 after Ctrl-C."""
    try:
        yield
    except PagewireError as error:
        print(f"pagewire {command}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except (TypeError, ValueError) as error:  # a number that does not fit its field at all
        print(f"pagewire {command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def tell_break() -> None:
    """Tells who waits at the terminal why nothing comes."""
    print("\n[the server is out of reach; trying to go on where the answer stopped]", file=sys.stderr)


def one_line(error: PagewireError) -> str:
    """What went wrong and what helps."""
    if isinstance(error, UnavailableError) and not error.reason:
        return f"{error}; start one with `pagewire up`, or name another with --address"
    return str(error)


class _Reader(threading.Thread):
    """Opens a stream and reads it, so that the main thread never runs gRPC's code while Ctrl-C may come.

    A KeyboardInterrupt that falls between taking one of gRPC's locks and holding it in a `with` leaves it locked for
    ever; closing the stream then waits for ever too.
    """

    def __init__(self, open_stream: Callable[[], Stream]) -> None:
        super().__init__(name="reader", daemon=True)
        self.pieces: SimpleQueue[Piece | Exception | None] = SimpleQueue()
        """What has arrived; None: the end; an exception: an end of another kind."""
        self._open_stream = open_stream
        self._stream: Stream | None = None
        self._stopped = False

    def run(self) -> None:
        try:
            with self._open_stream() as stream:
                self._stream = stream
                if not self._stopped:
                    for piece in stream:
                        self.pieces.put(piece)
            self.pieces.put(None)
        except Exception as error:
            self.pieces.put(error)

    def next(self) -> Piece | Exception | None:
        """What comes next in `pieces`. Looks up often: a signal that another thread was given wakes nobody here."""
        while True:
            with suppress(Empty):
                return self.pieces.get(timeout=LOOK_S)

    def stop(self) -> None:
        """Cancels the request; waits a little for the server's answer."""
        self._stopped = True
        if self._stream is not None:
            closing = threading.Thread(target=self._stream.close, name="closing", daemon=True)
            closing.start()
            closing.join(CLOSE_LIMIT_S)


def show(
    open_stream: Callable[[], Stream], console: Console, parts: list[str] | None = None
) -> tuple[str, Finish | None]:
    """Prints sequence 0 as it arrives. Ctrl-C cancels the request. Returns its text and how it ended.

    `parts` gets the text piece by piece, for who wants to know what was said before Ctrl-C.
    """
    parts = [] if parts is None else parts
    finish: Finish | None = None
    reader = _Reader(open_stream)
    try:
        reader.start()
        while (piece := reader.next()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece.index != 0:
                continue
            parts.append(piece.text)
            # Not console.print: the model's brackets are no markup, and its line breaks are its own.
            console.file.write(_printable(piece.text))
            console.file.flush()
            finish = piece.finish or finish
    except KeyboardInterrupt:
        reader.stop()
        raise
    console.file.write("\n")
    return "".join(parts), finish


def _printable(text: str) -> str:
    """Without control characters, which a model could use to rewrite the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def cost_line(usage: Usage, reason: str) -> str:
    """What a request cost, in one line."""
    facts = [
        f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)",
        f"{usage.completion_tokens} generated ({reason})",
        f"first token after {usage.first_token_ns / 1e6:.0f} ms",
    ]
    rate = tokens_per_s(usage)
    if rate is not None:
        facts.append(f"{rate:.1f} tokens/s")
    if usage.preemptions:
        facts.append(f"{usage.preemptions} preemptions")
    return ", ".join(facts)


def tokens_per_s(usage: Usage) -> float | None:
    """Rate of decoding: tokens after the first over the time after the first; None for fewer than two tokens."""
    seconds = (usage.total_ns - usage.first_token_ns) / NS_PER_S
    if usage.completion_tokens < 2 or seconds <= 0:
        return None
    return (usage.completion_tokens - 1) / seconds
