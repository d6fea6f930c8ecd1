"""Streams answers to the terminal and says what they cost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from pagewire.client import Stream
from pagewire.errors import PagewireError, UnavailableError
from pagewire.types import Finish, Usage

NS_PER_S = 1e9


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


def show(stream: Stream, console: Console, parts: list[str] | None = None) -> tuple[str, Finish | None]:
    """Prints sequence 0 as it arrives. Ctrl-C cancels the request. Returns its text and how it ended.

    `parts` gets the text piece by piece, for who wants to know what was said before Ctrl-C.
    """
    parts = [] if parts is None else parts
    finish: Finish | None = None
    with stream:
        for piece in stream:
            if piece.index != 0:
                continue
            parts.append(piece.text)
            # Not console.print: the model's brackets are no markup, and its line breaks are its own.
            console.file.write(_printable(piece.text))
            console.file.flush()
            finish = piece.finish or finish
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
