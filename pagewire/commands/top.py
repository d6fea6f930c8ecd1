"""`pagewire top`."""

from __future__ import annotations

import json
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pagewire.commands import options as o
from pagewire.commands.extras import imports
from pagewire.runtime.errors import StartError

if TYPE_CHECKING:
    from pagewire.terminal.figures import Frame

PIPE_WIDTH = 160
"""Columns where standard output has no width of its own."""
REDRAW_S = 1.0


def command() -> Callable[..., None]:
    """The command."""
    return top


def top(
    address: o.Address = o.DEFAULT_ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0,
    sort: Annotated[
        str, typer.Option(help="Order of the requests: state, tokens/s, age, blocks, preemptions.")
    ] = "state",
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture, with rates over one interval, and exit.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with the same content, and exit.")
    ] = False,
) -> None:
    """Watch requests, block pools and workers. Keys: q quits, s sorts otherwise, p pauses."""
    with imports("gateway"):
        from pagewire.commands.output import errors_as_one_line
        from pagewire.terminal.screen import SORTS, Screen, View
        from pagewire.terminal.watch import look_once

    if sort not in SORTS:
        raise StartError(f"--sort {sort} is unknown: use one of {', '.join(SORTS)}")
    if once or as_json:
        with errors_as_one_line("top"):
            frame = look_once(address, interval)
        if as_json:
            print(json.dumps({"address": address, **asdict(frame)}))
            return
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        console.print(Screen(frame, View(address, sort, interactive=False), height=None))
        return
    if not sys.stdout.isatty():
        raise StartError("standard output is no terminal: add --once for one picture, or --json for a script")
    _live(address, interval, sort)


def _live(address: str, interval: float, sort: str) -> None:
    """Draws until somebody quits."""
    from rich.live import Live

    from pagewire.terminal.keys import Keys
    from pagewire.terminal.screen import Screen, View
    from pagewire.terminal.watch import Watcher

    console = Console(highlight=False)
    keys = Keys()
    view = View(address, sort, interactive=keys.descriptor is not None)
    frame: Frame | None = None
    seen_at = time.monotonic()
    with Watcher(address, interval) as watcher, keys, Live(console=console, screen=True, auto_refresh=False) as live:
        signal.signal(signal.SIGWINCH, lambda _number, _frame: watcher.nudge())
        try:
            while True:
                live.update(Screen(frame, view, console.height), refresh=True)
                waiting = [watcher.wake, *([] if keys.descriptor is None else [keys.descriptor])]
                ready = select.select(waiting, [], [], REDRAW_S)[0]
                if keys.descriptor in ready:
                    typed = keys.pressed()
                    if "q" in typed:
                        return
                    for key in typed:
                        if key == "s":
                            view.next_sort()
                        elif key in "p ":
                            view.paused = not view.paused
                news = watcher.take()
                if news is not None and news.error is not None:
                    view.error = str(news.error)
                elif news is not None and news.frame is not None and not view.paused:
                    frame, view.error, seen_at = news.frame, "", time.monotonic()
                    view.note_rate(frame)
                view.stale_s = time.monotonic() - seen_at
        except KeyboardInterrupt:
            return
        finally:
            signal.signal(signal.SIGWINCH, signal.SIG_DFL)
