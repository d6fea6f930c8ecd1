"""Online rows: requests arrive at random times, and every stream is timed.

Times count from the moment a request was due, not from when a late client sent it. The time between tokens is taken
between messages of one stream; tokens that come in one message count once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import grpc.aio
import numpy as np

from pagewire.bench import workloads
from pagewire.bench.anchors import ONLINE
from pagewire.bench.results import Row, percentiles
from pagewire.bench.runner import Runner
from pagewire.bench.session import BenchError, Session, Times
from pagewire.bench.workloads import FULL, Job, Scale
from pagewire.runtime.channel import client_options
from pagewire.v1 import inference_pb2

GENERATE = "/pagewire.v1.InferenceService/Generate"
STREAMS_PER_CHANNEL = 64
"""Below the gateway's limit of streams on one connection."""
MAX_CHANNELS = 64
LEAD_S = 0.2
"""Between preparing the requests and the first arrival's clock."""

At = Literal["session", "gateway"]


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count as good; milliseconds."""

    ttft_ms: float = 200.0
    itl_ms: float = 50.0
    """Mean time between its tokens."""


DEFAULT_LIMITS = Limits()


async def measure(
    runner: Runner, at: At, rate: float, count: int, *, scale: Scale, limits: Limits, vocab_size: int
) -> Row:
    """A row's values. Raises BenchError when a request fails."""
    jobs, arrivals = workloads.online(rate, count, scale, vocab_size)
    run_name = f"online-{time.monotonic_ns()}"
    if at == "session":
        async with Session(runner.scheduler, run_name) as session:
            messages = session.prepare(jobs)
            begin = time.monotonic_ns() + int(LEAD_S * 1e9)
            times = await session.drain_while(session.submit_at(messages, arrivals, begin), timed=True)
    else:
        if not runner.gateways:
            raise BenchError("no gateway is there to measure at")
        times = await through_gateways(runner.gateways, jobs, arrivals, run_name)
    row = summary(times, jobs, limits)
    if scale != FULL:
        row["scale"] = {"requests": scale.requests, "lengths": scale.lengths}
    return row


async def through_gateways(
    addresses: Sequence[str], jobs: Sequence[Job], arrivals: Sequence[float], run_name: str
) -> list[Times]:
    """Sends each job when it is due as a Generate call of its own. Raises BenchError when one fails."""
    per_gateway = min(MAX_CHANNELS, -(-len(jobs) // (STREAMS_PER_CHANNEL * len(addresses))))
    # Channels with equal options share one connection unless they are told not to.
    options: list[Any] = [*client_options(internal=False), ("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.aio.insecure_channel(address, options=options) for address in addresses for _ in range(per_gateway)
    ]
    requests = [_request(job, run_name, number) for number, job in enumerate(jobs)]
    times = [Times() for _ in jobs]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        begin = time.monotonic_ns() + int(LEAD_S * 1e9)
        async with asyncio.TaskGroup() as group:
            for number, (raw, arrival) in enumerate(zip(requests, arrivals, strict=True)):
                note = times[number]
                note.due = begin + int(arrival * 1e9)
                wait = (note.due - time.monotonic_ns()) / 1e9
                if wait > 0:
                    await asyncio.sleep(wait)
                call = channels[number % len(channels)].unary_stream(GENERATE, None, None)
                group.create_task(_stream(call, raw, jobs[number], note))
    except* BenchError as group_of_errors:
        raise BenchError(str(group_of_errors.exceptions[0])) from None
    finally:
        for channel in channels:
            await channel.close(None)
    return times


def _request(job: Job, run_name: str, number: int) -> bytes:
    return inference_pb2.GenerateRequest(
        request_id=f"{run_name}-{number}",
        token_ids=inference_pb2.TokenIds(ids=job.prompt),
        sampling=inference_pb2.SamplingParams(temperature=0.0),
        stop=inference_pb2.StopParams(max_tokens=job.max_tokens, ignore_eos=True),
        output=inference_pb2.OutputOptions(token_ids_only=True),
        tenant=run_name,
    ).SerializeToString()


async def _stream(method: Any, request: bytes, job: Job, times: Times) -> None:
    """Reads one call to its end. Messages are parsed after the last one, so that parsing delays no other stream."""
    messages: list[bytes] = []
    times.sent = time.monotonic_ns()
    try:
        call = method(request)
        while isinstance(raw := await call.read(), bytes):
            messages.append(raw)
            times.arrivals.append(time.monotonic_ns())
    except grpc.RpcError as error:
        code, details = getattr(error, "code", None), getattr(error, "details", None)
        raise BenchError(f"{code().name if code else error}: {details() if details else ''}") from None
    responses = [inference_pb2.GenerateResponse.FromString(raw) for raw in messages]
    times.arrivals = [now for now, response in zip(times.arrivals, responses, strict=True) if response.token_ids]
    times.tokens = sum(len(response.token_ids) for response in responses)
    if times.tokens != job.max_tokens:
        raise BenchError(f"a request ended with {times.tokens} of {job.max_tokens} tokens")


def summary(times: Sequence[Times], jobs: Sequence[Job], limits: Limits) -> Row:
    """The values of a row from the times of its requests."""
    ttft = [(one.arrivals[0] - one.due) / 1e6 for one in times]
    gaps = np.concatenate([np.diff(np.array(one.arrivals, dtype=np.int64)) for one in times]) / 1e6
    mean_gaps = [(one.arrivals[-1] - one.arrivals[0]) / 1e6 / max(1, one.tokens - 1) for one in times]
    seconds = (max(one.arrivals[-1] for one in times) - min(one.due for one in times)) / 1e9
    num_in, num_out = workloads.totals(jobs)
    good = sum(first <= limits.ttft_ms and mean <= limits.itl_ms for first, mean in zip(ttft, mean_gaps, strict=True))
    return {
        "ttft_ms": percentiles(ttft),
        "itl_ms": percentiles(gaps.tolist() or [0.0]),
        "requests": len(jobs),
        "in_tokens": num_in,
        "out_tokens": num_out,
        "seconds": round(seconds, 3),
        "out_tok_s": round(num_out / seconds, 1),
        "mean_itl_ms": percentiles(mean_gaps),
        "client_late_ms": percentiles([(one.sent - one.due) / 1e6 for one in times]),
        "tokens_per_message": round(num_out / max(1, sum(len(one.arrivals) for one in times)), 3),
        "goodput": {
            "ttft_limit_ms": limits.ttft_ms,
            "itl_limit_ms": limits.itl_ms,
            "share": round(good / len(times), 4),
            "requests_s": round(good / seconds, 3),
        },
    }


def table(rows: Sequence[Row], *, compare: bool) -> list[list[str]]:
    """Rows for people, a heading first."""
    heading = ["rate", "at", "TTFT p50 / p99 ms", "inter-token p50 / p99 ms", "goodput"]
    if compare:
        heading += ["peer TTFT", "peer inter-token", "goal met"]
    lines = [heading]
    for row in rows:
        start = [f"{row['rate']:g}/s", row["at"]]
        if "error" in row:
            lines.append([*start, f"error: {row['error'][:150]}"])
            continue
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        line = [
            *start,
            f"{ttft['p50']:.1f} / {ttft['p99']:.1f}",
            f"{itl['p50']:.2f} / {itl['p99']:.1f}",
            f"{row['goodput']['share']:.1%}",
        ]
        if compare and (anchor := ONLINE.get(row["rate"])):
            line += [f"{anchor.ttft_p50} / {anchor.ttft_p99}", f"{anchor.itl_p50} / {anchor.itl_p99}"]
            line.append("yes" if anchor.meets_goal(row) else "no")
        lines.append(line)
    return lines
