"""Online rows: requests arrive at random times, and every stream is timed.

Times count from the moment a request was due, not from when a late client sent it. The time between tokens is taken
between messages of one stream; tokens that come in one message count once.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pagewire.bench import workloads
from pagewire.bench.anchors import ONLINE
from pagewire.bench.doors import DOORS, Door
from pagewire.bench.results import Row, percentiles
from pagewire.bench.runner import Runner
from pagewire.bench.session import BenchError, Session, Times
from pagewire.bench.workloads import FULL, Scale

LEAD_S = 0.2
"""Between preparing the requests and the first arrival's clock."""

At = Literal["session", "gateway", "openai"]
"""The scheduler's session; a gateway's gRPC; a gateway's OpenAI-compatible HTTP."""


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count as good; milliseconds. None: no limit."""

    ttft_ms: float | None = 200.0
    itl_ms: float | None = 50.0
    """Mean time between its tokens."""
    e2e_ms: float | None = None
    """From when it was due to its last token."""

    def kept(self, ttft_ms: float, itl_ms: float, e2e_ms: float) -> bool:
        """Whether a request with these times is good."""
        pairs = ((ttft_ms, self.ttft_ms), (itl_ms, self.itl_ms), (e2e_ms, self.e2e_ms))
        return all(limit is None or value <= limit for value, limit in pairs)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Load:
    """How requests come: at random moments, or a new one as soon as one has ended. One of the two is set."""

    rate: float | None = None
    """Arrivals per second, on average."""
    concurrency: int | None = None
    """Requests that run at any time."""

    @property
    def label(self) -> Row:
        """As a row tells it."""
        return {"rate": self.rate} if self.concurrency is None else {"concurrency": self.concurrency}


async def measure(
    runner: Runner,
    at: At,
    load: Load,
    count: int,
    *,
    scale: Scale,
    limits: Limits,
    vocab_size: int,
    text: bool = False,
) -> Row:
    """A row's values. Raises BenchError when a request fails."""
    jobs, arrivals = workloads.online(load.rate or 1.0, count, scale, vocab_size)
    run_name = f"online-{time.monotonic_ns()}"
    cpu_before: float | None = None
    if at == "session":
        async with Session(runner.scheduler, run_name) as session:
            messages = session.prepare(jobs)
            begin = time.monotonic_ns() + int(LEAD_S * 1e9)
            times = await session.drain_while(session.submit_at(messages, arrivals, begin), timed=True)
    else:
        addresses = runner.gateways if at == "gateway" else runner.http
        cpu_before = runner.service.gateway_cpu_s() if runner.service else None
        async with DOORS[at](addresses, jobs, run_name, text=text) as door:
            if load.concurrency is None:
                times = await at_random(door, arrivals)
            else:
                times = await side_by_side(door, load.concurrency)
    row = summary(times, jobs, limits)
    if scale != FULL:
        row["scale"] = {"requests": scale.requests, "lengths": scale.lengths}
    if at != "session":
        row["text"] = text
        cpu_after = runner.service.gateway_cpu_s() if runner.service else None
        if cpu_before is not None and cpu_after is not None:
            row["gateway_cpu_us_per_token"] = round((cpu_after - cpu_before) / row["out_tokens"] * 1e6, 1)
    return row


async def at_random(door: Door, arrivals: Sequence[float]) -> list[Times]:
    """Sends each job when it is due: an open loop. Raises BenchError when one fails."""
    times = [Times() for _ in door.jobs]
    begin = time.monotonic_ns() + int(LEAD_S * 1e9)
    try:
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(arrivals):
                note = times[number]
                note.due = begin + int(arrival * 1e9)
                wait = (note.due - time.monotonic_ns()) / 1e9
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(door.send(number, note))
    except* BenchError as errors:
        raise BenchError(str(errors.exceptions[0])) from None
    return times


async def side_by_side(door: Door, concurrency: int) -> list[Times]:
    """Keeps so many jobs running until all are done: a closed loop. Raises BenchError when one fails."""
    times = [Times() for _ in door.jobs]
    numbers = itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < len(times):
            times[number].due = time.monotonic_ns()
            await door.send(number, times[number])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client())
    except* BenchError as errors:
        raise BenchError(str(errors.exceptions[0])) from None
    return times


def gaps(times: Sequence[Times]) -> list[int]:
    """Nanoseconds between messages of one stream, of all streams."""
    found: list[int] = np.concatenate([np.diff(np.array(one.arrivals, dtype=np.int64)) for one in times]).tolist()
    return found


def summary(times: Sequence[Times], jobs: Sequence[workloads.Job], limits: Limits) -> Row:
    """The values of a row from the times of its requests."""
    ttft = [(one.arrivals[0] - one.due) / 1e6 for one in times]
    mean_gaps = [(one.arrivals[-1] - one.arrivals[0]) / 1e6 / max(1, one.tokens - 1) for one in times]
    seconds = (max(one.arrivals[-1] for one in times) - min(one.due for one in times)) / 1e9
    num_in, num_out = workloads.totals(jobs)
    e2e = [(one.arrivals[-1] - one.due) / 1e6 for one in times]
    good = sum(map(limits.kept, ttft, mean_gaps, e2e))
    return {
        "ttft_ms": percentiles(ttft),
        "itl_ms": percentiles([gap / 1e6 for gap in gaps(times)] or [0.0]),
        "requests": len(jobs),
        "in_tokens": num_in,
        "out_tokens": num_out,
        "seconds": round(seconds, 3),
        "out_tok_s": round(num_out / seconds, 1),
        "mean_itl_ms": percentiles(mean_gaps),
        "e2e_ms": percentiles(e2e),
        "client_late_ms": percentiles([(one.sent - one.due) / 1e6 for one in times]),
        "tokens_per_message": round(num_out / max(1, sum(len(one.arrivals) for one in times)), 3),
        "goodput": {
            "ttft_limit_ms": limits.ttft_ms,
            "itl_limit_ms": limits.itl_ms,
            "e2e_limit_ms": limits.e2e_ms,
            "share": round(good / len(times), 4),
            "requests_s": round(good / seconds, 3),
        },
    }


def table(rows: Sequence[Row], *, compare: bool) -> list[list[str]]:
    """Rows for people, a heading first."""
    heading = [
        "load",
        "at",
        "TTFT p50 / p99 ms",
        "inter-token p50 / p99 ms",
        "out tok/s",
        "goodput",
        "gateway CPU us/token",
    ]
    if compare:
        heading += ["peer TTFT", "peer inter-token", "goal met"]
    lines = [heading]
    for row in rows:
        concurrency = row.get("concurrency")
        start = [f"{row['rate']:g}/s" if concurrency is None else f"{concurrency} at once", row["at"]]
        if "error" in row:
            lines.append([*start, f"error: {row['error'][:150]}"])
            continue
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        line = [
            *start,
            f"{ttft['p50']:.1f} / {ttft['p99']:.1f}",
            f"{itl['p50']:.2f} / {itl['p99']:.1f}",
            f"{row['out_tok_s']:.1f}",
            f"{row['goodput']['share']:.1%}",
            str(row.get("gateway_cpu_us_per_token", "-")),
        ]
        if compare and (anchor := ONLINE.get(row.get("rate", 0.0))):
            line += [f"{anchor.ttft_p50} / {anchor.ttft_p99}", f"{anchor.itl_p50} / {anchor.itl_p99}"]
            line.append("yes" if anchor.meets_goal(row) else "no")
        lines.append(line)
    return lines
