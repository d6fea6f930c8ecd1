"""What streams notice when one of two workers dies under load: `python -m benchmarks.worker_loss OUT.json`.

Two workers, each on a GPU of its own where there are two; requests arrive at random; in the middle one worker gets
SIGKILL and nobody starts it again. The scheduler moves its sequences to the other, which computes their KV anew. A row
without the loss comes first. That every stream gets each of its tokens once is checked by the client: a row has no
values otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.arguments import add_model
from pagewire.bench import results, serve, suite, workloads
from pagewire.bench.results import Recorder
from pagewire.bench.runner import Runner
from pagewire.bench.serve import DEFAULT_LIMITS
from pagewire.bench.service import Launch
from pagewire.bench.session import BenchError, Session, Times, loads
from pagewire.bench.workloads import Scale

ROW_LIMIT_S = 150.0
VICTIM = "worker-0"


async def row(runner: Runner, given: argparse.Namespace, *, kill: bool) -> results.Row:
    """A load's values, and with `kill` the pauses of those that ran when a worker died. Raises BenchError when a stream
    fails or its tokens are not complete."""
    jobs, arrivals = workloads.online(
        given.rate, given.requests, Scale(1.0, given.length_scale), await runner.vocab_size()
    )
    killed: list[results.Row] = []

    async def lose(begin: int) -> None:
        await asyncio.sleep((begin - time.monotonic_ns()) / 1e9 + given.after_s)
        carried = (await loads(runner.scheduler)).loads
        assert runner.service is not None
        os.kill(runner.service.pids[VICTIM], signal.SIGKILL)
        killed.append({"at": time.monotonic_ns(), "running": [load.running for load in carried]})

    async with Session(runner.scheduler, f"loss-{time.monotonic_ns()}") as session:
        messages = session.prepare(jobs)
        begin = time.monotonic_ns() + int(serve.LEAD_S * 1e9)
        async with asyncio.TaskGroup() as tasks:
            if kill:
                tasks.create_task(lose(begin))
            times = await session.drain_while(session.submit_at(messages, arrivals, begin), timed=True)
    values = serve.summary(times, jobs, DEFAULT_LIMITS)
    if killed:
        (loss,) = killed
        values["loss"] = {"after_s": given.after_s, "running": loss["running"], **pauses(times, loss["at"])}
    return values


def pauses(times: Sequence[Times], at: int) -> results.Row:
    """How long the streams that ran at `at`, in ns, got no token around it: a sequence on the lost worker waits for its
    KV, one on the other for the steps that compute it."""
    around = sorted(
        (min(later for later in one.arrivals if later > at) - max(earlier for earlier in one.arrivals if earlier <= at))
        / 1e6
        for one in times
        if one.arrivals and one.arrivals[0] <= at < one.arrivals[-1]
    )
    if not around:
        raise BenchError("no stream ran when the worker was ended: choose another --after-s")
    return {"streams": len(around), "pause_ms": serve.percentiles(around), "longest_pause_ms": round(around[-1], 1)}


async def measure(given: argparse.Namespace, folder: Path) -> bool:
    """Both rows; whether each has values."""
    launch = Launch(
        model=given.model,
        load_format=given.load_format,
        device=given.device,
        max_model_len=2048,
        num_blocks=given.num_blocks,
        max_num_seqs=given.max_num_seqs,
        token_budget=2048,
        workers=2,
    )
    recorder = Recorder(given.out, suite.header(launch, None))
    runner = Runner(launch, folder, limit_s=given.limit_s, say=print)
    try:
        for kill in (False, True):
            head = {"rate": given.rate, "lost_workers": int(kill)}
            measured = await runner.row(head, ROW_LIMIT_S, lambda kill=kill: row(runner, given, kill=kill))
            recorder.add(measured)
            print(*(f"{name}: {measured[name]}" for name in ("error", "loss", "itl_ms", "ttft_ms") if name in measured))
    finally:
        await runner.stop()
    return not any("error" in measured for measured in recorder.rows)


def main() -> int:
    """Command line. Exit code 1: a row has no value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the results")
    add_model(parser)
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--after-s", type=float, default=10.0, help="when a worker dies")
    parser.add_argument("--num-blocks", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--limit-s", type=float, default=300.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if uvloop.run(measure(given, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
