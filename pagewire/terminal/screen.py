"""Draws a frame: bars for the pools, a line per worker, a line per request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from pagewire.terminal.figures import Blocks, Frame, Request, Worker, known_sum, total

_STATES = ("running", "prefilling", "swapped", "preempted", "waiting")
SORTS: dict[str, Callable[[Request], tuple[float, ...]]] = {
    "state": lambda one: (_STATES.index(one.state), -one.age_s),
    "tokens/s": lambda one: (-(one.tokens_per_s or 0.0), -one.age_s),
    "age": lambda one: (-one.age_s,),
    "blocks": lambda one: (-one.blocks, -one.age_s),
    "preemptions": lambda one: (-one.preemptions, -one.age_s),
}
"""Orders of the requests; the largest comes first."""
_STATE_STYLES = {"running": "green", "prefilling": "cyan", "swapped": "magenta", "preempted": "yellow"}
HISTORY = 200
UNLIMITED = 1 << 30
FULL_BARS = " ▁▂▃▄▅▆▇█"
Row = TypeVar("Row")
KEYS = "q quit   s sort   p pause"


@dataclass
class View:
    """What the picture depends on beside the frame."""

    address: str
    sort: str = "state"
    paused: bool = False
    error: str = ""
    """Why the service cannot be reached; empty: it can."""
    stale_s: float = 0.0
    """How old the frame is, when it cannot."""
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    """Tokens generated per second, oldest first."""
    interactive: bool = True
    """Whether keys do anything."""

    def next_sort(self) -> None:
        """The next order."""
        names = list(SORTS)
        self.sort = names[(names.index(self.sort) + 1) % len(names)]

    def note_rate(self, frame: Frame) -> None:
        """Keeps the frame's rate of generation for the curve."""
        known = known_sum([worker.generation_tokens_per_s for worker in frame.workers])
        if known is not None:
            self.rates.append(known)


class Screen:
    """A picture that fits its height: requests and workers that have no room are counted instead of drawn.

    Args:
        frame: None: nothing has been seen yet.
        height: lines; None: as many as there are to draw.
    """

    def __init__(self, frame: Frame | None, view: View, height: int | None) -> None:
        self._frame = frame
        self._view = view
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, ascii_only = options.max_width, options.ascii_only
        lines: list[Text | Table] = [*self._title()]
        footer = [Text(KEYS, style="dim")] if self._view.interactive else []
        if self._frame is not None:
            frame, workers = self._frame, self._frame.workers
            lines += _summary(frame, self._view.rates, width, ascii_only)
            # Two tables with their headings, an order, two empty lines and two of rest take seven lines more.
            room = UNLIMITED if self._height is None else max(2, self._height - len(lines) - 7 - len(footer))
            shown = workers[: max(1, room // 3)]
            if shown:
                lines += [Text(), _workers(shown, width, ascii_only), *_rest(len(workers) - len(shown), "workers")]
            lines += [Text(), *_requests(frame, self._view.sort, width, room - len(shown))]
        if footer and self._height is not None:
            drawn = sum(line.row_count + 1 if isinstance(line, Table) else 1 for line in lines)
            lines += [Text() for _ in range(self._height - drawn - 1)]
        for line in [*lines, *footer]:
            if isinstance(line, Text):
                line.no_wrap, line.overflow = True, "ellipsis"
            yield line

    def _title(self) -> list[Text]:
        view, title = self._view, Text()
        title.append("Pagewire", style="bold")
        if self._frame is not None:
            server = self._frame.server
            model = (
                f"{server.model} ({server.dtype}, {server.max_model_len} tokens)" if server.model else "no model yet"
            )
            title.append(f" {server.version}  {printable(model)}  up {duration(server.uptime_s)}")
        title.append(f"  {printable(view.address)}")
        if self._frame is not None and self._frame.server.draining:
            title.append("  draining", style="yellow")
        if view.paused:
            title.append("  paused", style="reverse")
        if view.error:
            old = "" if self._frame is None else f" (these figures are {duration(view.stale_s)} old)"
            return [title, Text(f"trying again{old}: {printable(view.error)}", style="bold red")]
        if self._frame is None:
            return [title, Text("connecting", style="dim")]
        return [title]


def _summary(frame: Frame, rates: deque[float], width: int, ascii_only: bool) -> list[Text | Table]:
    """What holds for all workers together, in five lines; four where there is no worker."""
    workers = frame.workers
    out = known_sum([worker.generation_tokens_per_s for worker in workers])
    prompt = known_sum([worker.prompt_tokens_per_s for worker in workers])
    tokens = Text("tokens/s    ")
    tokens.append(f"{rate(out)} out", style="bold")
    tokens.append(f"  {rate(prompt)} in  ")
    if not ascii_only:
        tokens.append(sparkline(list(rates)[-max(1, width - len(tokens)) :]), style="green")
    waiting = sum(worker.waiting for worker in workers) + frame.unassigned_requests
    requests = Text("requests    ")
    requests.append(f"{frame.live_requests} live", style="bold")
    requests.append(f"  {sum(worker.running for worker in workers)} sequences running  {waiting} waiting")
    requests.append(f"  {sum(worker.swapped for worker in workers)} swapped")
    if frame.unassigned_requests:
        requests.append(f"  {frame.unassigned_requests} without a worker", style="red")
    preempted = Text("preemptions ")
    preempted.append(f"{sum(worker.preemptions_swap for worker in workers)} by swap")
    preempted.append(f"  {sum(worker.preemptions_recompute for worker in workers)} by recompute")
    moved_out = known_sum([worker.swap_out_bytes_per_s for worker in workers])
    moved_in = known_sum([worker.swap_in_bytes_per_s for worker in workers])
    preempted.append(f"  swap out {byte_rate(moved_out)}  in {byte_rate(moved_in)}")
    if not workers:
        return [tokens, requests, preempted, Text("no worker has joined", style="red")]
    kv, host = total([worker.kv_blocks for worker in workers]), total([worker.host_blocks for worker in workers])
    return [
        tokens,
        requests,
        preempted,
        _pool("KV pool", kv, width, ascii_only),
        _pool("host arena", host, width, ascii_only, used="swapped"),
    ]


def _workers(workers: tuple[Worker, ...], width: int, ascii_only: bool) -> Table:
    columns: list[Column[Worker]] = [
        Column("worker", _worker_name, right=False),
        Column("device", lambda one: Text(clip(printable(one.device), 24)), 110, right=False),
        Column("epoch", lambda one: str(one.epoch)),
        Column("KV pool", lambda one: _bar(one.kv_blocks, 10, ascii_only), 140, right=False),
        Column("run", lambda one: str(one.running)),
        Column("wait", lambda one: str(one.waiting)),
        Column("swap", lambda one: str(one.swapped)),
        Column("step", lambda one: "-" if one.step_ms is None else f"{one.step_ms:.1f} ms"),
        Column("steps/s", lambda one: rate(one.steps_per_s), 90),
        Column("GPU idle", lambda one: percent(one.idle_ratio)),
        Column("tok/s", lambda one: rate(one.generation_tokens_per_s), 90),
        Column("cached", lambda one: percent(one.cache_hit_ratio), 100),
        Column("waste", lambda one: percent(one.kv_waste_ratio), 120),
    ]
    return _table(columns, workers, width)


def _worker_name(worker: Worker) -> Text:
    name = Text(clip(printable(worker.worker_id), 20))
    if worker.stalled:
        name.append(f" stalled, heard {duration(worker.heard_s)} ago", style="red")
    return name


def _requests(frame: Frame, sort: str, width: int, room: int) -> list[Text | Table]:
    if not frame.requests:
        return [Text("no live requests", style="dim")]
    several = len(frame.workers) > 1
    columns: list[Column[Request]] = [
        Column("request", lambda one: Text(clip(printable(one.request_id), 20)), right=False),
        Column("state", lambda one: Text(one.state, style=_STATE_STYLES.get(one.state, "dim")), right=False),
        Column("worker", lambda one: Text(clip(printable(one.worker_id), 20)), 120 if several else 150, right=False),
        Column("tenant", lambda one: Text(clip(printable(one.tenant), 12)), 100, right=False),
        Column("prio", lambda one: str(one.priority), 100),
        Column("prompt", lambda one: str(one.prompt_tokens)),
        Column("cached", lambda one: str(one.cached_tokens), 90),
        Column("output", _output),
        Column("tok/s", lambda one: rate(one.tokens_per_s)),
        Column("blocks", lambda one: str(one.blocks)),
        Column("preempt", lambda one: str(one.preemptions), 90),
        Column("age", lambda one: duration(one.age_s)),
        Column("TTFT", lambda one: "-" if one.first_token_s is None else milliseconds(one.first_token_s)),
    ]
    shown = sorted(frame.requests, key=SORTS[sort])[: max(1, room)]
    heading = Text(f"by {sort}", style="dim")
    return [heading, _table(columns, shown, width), *_rest(frame.live_requests - len(shown), "requests")]


def _output(one: Request) -> str:
    of = f"{one.sequences} x {one.max_tokens}" if one.sequences > 1 else str(one.max_tokens)
    return f"{one.output_tokens}/{of}"


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column that narrow terminals do without."""

    title: str
    cell: Callable[[Row], Text | str]
    least_width: int = 0
    """Of the terminal, in columns."""
    right: bool = True


def _table(columns: Sequence[Column[Row]], rows: Sequence[Row], width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    wanted = [column for column in columns if column.least_width <= width]
    for column in wanted:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(column.cell(row) for column in wanted))
    return table


def _pool(name: str, blocks: Blocks, width: int, ascii_only: bool, used: str = "used") -> Text:
    line = Text(f"{name:<12}")
    if not blocks.total:
        return line.append("none", style="dim")
    told = f"  {blocks.used} {used}  {blocks.cached} cached  {blocks.free} free of {blocks.total}"
    line.append_text(_bar(blocks, max(10, min(60, width - 12 - len(told))), ascii_only))
    return line.append(told)


def _bar(blocks: Blocks, width: int, ascii_only: bool) -> Text:
    """Used, cached and free blocks as one bar. What there is at all, is seen: a share above 0 has a cell."""
    bar = Text()
    used, cached = _cells(blocks.used, blocks.total, width), _cells(blocks.cached, blocks.total, width)
    used = min(used, width - (blocks.cached > 0) - (blocks.free > 0))
    cached = min(cached, width - used - (blocks.free > 0))
    glyphs = "#=." if ascii_only else "█▓░"
    bar.append(glyphs[0] * used, style="red" if blocks.used > 0.95 * blocks.total else "green")
    bar.append(glyphs[1] * cached, style="blue")
    return bar.append(glyphs[2] * (width - used - cached), style="dim")


def _cells(part: int, whole: int, width: int) -> int:
    return 0 if part <= 0 else max(1, round(width * part / whole))


def _rest(count: int, what: str) -> list[Text | Table]:
    return [Text(f"and {count} more {what}", style="dim")] if count > 0 else []


def sparkline(values: list[float]) -> str:
    """One character per value, from 0 to the largest."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return ""
    return "".join(FULL_BARS[max(1, round(value / highest * 8)) if value > 0 else 0] for value in values)


def printable(text: str) -> str:
    """Without control characters, which a client could use to rewrite the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def clip(text: str, width: int) -> str:
    """At most so many characters; the end counts more than the middle of a random name."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def rate(value: float | None) -> str:
    """Something per second."""
    return "-" if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.1%}"


def byte_rate(value: float | None) -> str:
    """Bytes per second."""
    if value is None:
        return "-"
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B/s"


def milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else duration(seconds)


def duration(seconds: float) -> str:
    """A long time, in its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
