"""Offline rows: the whole set is submitted at once at the scheduler's token-level session.

A row's seconds run from the first submission to the message that ended the last request, as this process sees them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.bench import metrics, workloads
from pagewire.bench.anchors import OFFLINE
from pagewire.bench.results import Row, relative_spread
from pagewire.bench.runner import Runner
from pagewire.bench.session import BenchError, Session
from pagewire.bench.workloads import FULL, Job, Scale

PRIMER = [Job([10] * 8, 2)]
"""Runs right before the clock starts, so that the device's idle time counts from here and not from the last row."""

MARGIN = 1.2
"""Another run is begun only if there is that many times the last one's time for it."""


@dataclass(frozen=True)
class Outcome:
    """One run of one set."""

    seconds: float
    tokens: int
    steps: int
    """Step messages that this client got."""
    idle_s: float | None
    """Seconds that the device waited for plans; None: not known."""
    used: metrics.Used | None


async def measure(
    runner: Runner, name: str, *, scale: Scale, repeat: int, vocab_size: int, limit_s: float = float("inf")
) -> Row:
    """A row's values: the median run of `repeat`, or of fewer when `limit_s` leaves no time for another.

    Raises:
        BenchError: any run failed.
    """
    jobs = workloads.offline(name, scale, vocab_size)
    num_in, num_out = workloads.totals(jobs)
    deadline = time.monotonic() + min(limit_s, runner.left_s)
    outcomes: list[Outcome] = []
    while len(outcomes) < repeat:
        begun = time.monotonic()
        outcomes.append(await run(runner, jobs, f"{name}-{time.monotonic_ns()}"))
        ended = time.monotonic()
        if ended + MARGIN * (ended - begun) > deadline:
            break
    seconds = [outcome.seconds for outcome in outcomes]
    middle = sorted(outcomes, key=lambda outcome: outcome.seconds)[(len(outcomes) - 1) // 2]
    row: Row = {
        "out_tok_s": round(num_out / middle.seconds, 1),
        "total_tok_s": round((num_in + num_out) / middle.seconds, 1),
        "seconds": round(middle.seconds, 4),
        "gpu_idle_ratio": None if middle.idle_s is None else round(middle.idle_s / middle.seconds, 4),
        "spread": relative_spread(seconds),
        "runs_s": [round(value, 4) for value in seconds],
        "requests": len(jobs),
        "in_tokens": num_in,
        "out_tokens": num_out,
    }
    if middle.used is not None:
        row["steps"] = middle.used.steps
        row["ms_per_step"] = {
            "all": round(1e3 * middle.seconds / max(1, middle.used.steps), 4),
            **middle.used.part_ms,
        }
        row["preemptions"] = middle.used.preemptions
        row["cached_tokens"] = middle.used.cached_tokens
    if scale != FULL:
        row["scale"] = {"requests": scale.requests, "lengths": scale.lengths}
    return row


async def run(runner: Runner, jobs: Sequence[Job], run_name: str) -> Outcome:
    """Runs a set once. Raises BenchError when a request fails, ends early or loses a token."""
    async with Session(runner.scheduler, run_name) as session:
        await session.submit(session.prepare(PRIMER, "primer"))
        await session.drain()
        primed_at = session.ended_at
        before = await runner.read_metrics()
        steps, tokens = session.steps, session.num_tokens
        messages = session.prepare(jobs)
        begin = time.monotonic_ns()
        await session.drain_while(session.submit(messages))
        seconds = (session.ended_at - begin) / 1e9
        received = session.num_tokens - tokens
        wanted = sum(job.max_tokens for job in jobs)
        if received != wanted:
            raise BenchError(f"{received} tokens came, {wanted} were asked for")
        after = await runner.read_metrics()
    used = metrics.used(before, after) if before is not None and after is not None else None
    idle_s = None if used is None else max(0.0, used.idle_s - (begin - primed_at) / 1e9)
    return Outcome(seconds, received, session.steps - steps, idle_s, used)


def table(rows: Sequence[Row], *, compare: bool) -> list[list[str]]:
    """Rows for people, a heading first.

    Args:
        rows: as recorded.
        compare: put the peer's values, the limit and the goal beside them; only right for full rows on their card.
    """
    heading = ["workload", "out tok/s", "seconds", "spread", "idle", "ms/step"]
    if compare:
        heading += ["peer", "limit", "goal", "of peer", "goal met"]
    lines = [heading]
    for row in rows:
        if "error" in row:
            lines.append([row["workload"], f"error: {row['error'][:150]}"])
            continue
        idle, step = row.get("gpu_idle_ratio"), row.get("ms_per_step")
        line = [
            row["workload"],
            f"{row['out_tok_s']:,.0f}",
            f"{row['seconds']:.2f}",
            "-" if row["spread"] is None else f"{row['spread']:.1%}",
            "-" if idle is None else f"{idle:.1%}",
            "-" if step is None else f"{step['all']:.2f}",
        ]
        if compare and (anchor := OFFLINE.get(row["workload"])):
            unit = " s" if anchor.unit == "seconds" else ""
            limit = "-" if anchor.limit is None else f"{anchor.limit:,g}{unit}"
            ratio = anchor.ratio(row)
            line += [
                f"{anchor.peer:,g}{unit}",
                limit,
                f"{anchor.goal:,g}{unit}",
                "-" if ratio is None else f"{ratio:.2f}x",
            ]
            line.append("yes" if anchor.meets_goal(row) else "no")
        lines.append(line)
    return lines
