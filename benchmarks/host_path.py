"""What the host costs per step: real scheduler, real session, real worker link and codecs, no model.

    python -m benchmarks.host_path           prints a table, writes benchmarks/results/host_path.json
    python -m benchmarks.host_path --rows    the offline workloads instead, to benchmarks/results/host_rows.json
    python -m benchmarks.host_path --online  the online rows instead, to benchmarks/results/host_online.json

The worker's device is a stand-in that takes a given time per step. With 0 ms it answers at once, and the steps per
second are the most that the host's side can do. With the time that an H200 needs for the batch, the idle share is how
much of the device's time the host would waste. CPU microseconds per step are the kernel's accounts, so they hold on a
busy machine too.

Workloads and online rows run on a device that takes exactly the time of the limit in docs/performance.md: weights,
arithmetic and KV at the H200's measured rates. What is missing to the limit then is lost by the scheduler's policy and
by the host.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn, cast

from benchmarks import cards
from pagewire.bench import results, suite, throughput
from pagewire.bench.anchors import OFFLINE as OFFLINE_ANCHORS
from pagewire.bench.anchors import ONLINE
from pagewire.bench.runner import Runner
from pagewire.bench.service import Launch
from pagewire.bench.workloads import FULL, HIGHEST_ID, OFFLINE, Job
from pagewire.runtime import logs, ready
from pagewire.runtime.errors import run_role
from pagewire.runtime.parent import die_with_supervisor
from pagewire.simulation.batch import Batch, Row, StepLoad
from pagewire.v1 import worker_pb2
from worker.executor import Executor, Progress
from worker.link import SchedulerLink
from worker.step import StepPlan, StepResult, StepTimings

RESULTS = Path(__file__).parent / "results" / "host_path.json"
H200_STEP_MS = {1: 3.6, 8: 4.0, 32: 4.6, 64: 5.3, 128: 7.0, 256: 11.0, 512: 21.5}
"""About what a decode step of Llama-3.1-8B takes on that card, by batch: the goals of the decode rows."""
PROMPT = 16
SPIN_NS = 200_000
"""The end of a wait is spun through, because a sleeping thread wakes up late."""
TOKEN = 17

StepTime = Callable[[StepLoad], int]
"""Nanoseconds that a step takes."""


WEIGHT_BYTES = 15.0e9
"""Of Llama-3.1-8B in bfloat16, the embedding left out: a step reads a few of its rows."""
KV_BYTES = 131_072
"""Per token: 32 layers, key and value, 8 heads of 128, 2 bytes."""
RATES = {"limit-h200": (4.2e3, 742e3), "limit-h100": cards.RATES["h100"]}
"""Devices that take the limit's time, and their bytes and operations a nanosecond. For an H200 the limit is that of
`pagewire.bench.anchors`, which rows are held against."""


def fixed(step_ms: float) -> StepTime:
    """The same for every step."""
    return lambda _load: int(step_ms * 1e6)


def limit(bytes_per_ns: float, flops_per_ns: float) -> StepTime:
    """The larger of weights and arithmetic, and the KV; nanoseconds."""

    def step_time(load: StepLoad) -> int:
        tokens = load.decode_tokens + load.chunk_tokens
        return int(
            max(WEIGHT_BYTES / bytes_per_ns, tokens * WEIGHT_BYTES / flops_per_ns)
            + load.context_tokens * KV_BYTES / bytes_per_ns
        )

    return step_time


class StandInDevice:
    """Executes steps one after the other and computes nothing. Has an executor's interface."""

    def __init__(self, step_time: StepTime) -> None:
        self.step_time = step_time
        self.progress = Progress()
        self.reset()

    def reset(self) -> None:
        """Drops every row."""
        self.batch = Batch(Row.of)
        self.free_at = 0

    def launch(self, plan: StepPlan, _waited_ns: int = 0) -> StandInStep:
        """Queues a step and returns."""
        load = self.batch.execute(plan)
        step_ns = self.step_time(load)
        now = time.perf_counter_ns()
        begin = max(now, self.free_at)
        idle_ns, early_ns = (begin - self.free_at if self.free_at else 0), max(0, self.free_at - now)
        self.free_at = begin + step_ns
        self.progress.last_step = plan.step
        self.progress.advance()
        timings = StepTimings(
            idle_ns=idle_ns,
            forward_ns=step_ns,
            chunk_tokens=load.chunk_tokens,
            decode_tokens=load.decode_tokens,
            early_ns=early_ns,
        )
        return StandInStep(plan, timings, num_rows=self.batch.num_sampling, done_at=self.free_at)


@dataclass
class StandInStep:
    """A queued step; its result is there when its time has passed."""

    plan: StepPlan
    timings: StepTimings
    num_rows: int
    done_at: int

    def result(self) -> StepResult:
        """Waits, as for a device."""
        left = self.done_at - time.perf_counter_ns()
        if left > SPIN_NS:
            time.sleep((left - SPIN_NS) / 1e9)
        while time.perf_counter_ns() < self.done_at:
            pass
        return StepResult(self.plan.epoch, self.plan.step, [TOKEN] * self.num_rows, timings=self.timings)


def fail(error: BaseException) -> NoReturn:
    """Ends the worker's process."""
    traceback.print_exception(error)
    os._exit(1)


def work(arguments: Sequence[str]) -> None:
    """The worker's process: the real link around the stand-in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scheduler", required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--token-budget", type=int, required=True)
    parser.add_argument("--model", required=True, help="milliseconds per step, or one of RATES")
    parser.add_argument("--ready-fd", type=int, required=True)
    given, _ = parser.parse_known_args(arguments)
    die_with_supervisor()
    logs.configure("worker", "warning")
    hello = worker_pb2.WorkerHello(
        protocol_version=1,
        worker_id=f"stand-in-{os.getpid()}",
        model=worker_pb2.ModelInfo(name="stand-in", fingerprint="stand-in", vocab_size=31_000, max_model_len=1 << 20),
        capacity=worker_pb2.WorkerCapacity(
            block_size=16,
            num_blocks=1 << 16,
            block_bytes=1 << 21,
            max_slots=given.max_num_seqs,
            max_step_tokens=given.token_budget,
        ),
        swap_out_bytes_per_second=50_000_000_000,
        swap_in_bytes_per_second=50_000_000_000,
    )
    link = SchedulerLink(
        given.scheduler,
        hello,
        cast(
            Executor,
            StandInDevice(limit(*RATES[given.model]) if given.model in RATES else fixed(float(given.model))),
        ),
        on_welcome=lambda: ready.announce(given.ready_fd, worker_id=hello.worker_id),
        on_failure=fail,
    )
    run_role("worker", link.run, given.ready_fd)


@dataclass
class CpuTimes:
    """CPU seconds of processes, from the kernel."""

    pids: dict[str, int]
    begin: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin = self.read()

    def read(self) -> dict[str, float]:
        """Seconds so far, user and system."""
        tick = os.sysconf("SC_CLK_TCK")
        found = {}
        for name, pid in self.pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = (int(fields[11]) + int(fields[12])) / tick
        return found

    def used(self) -> dict[str, float]:
        """Seconds since the beginning."""
        now = self.read()
        return {name: now[name] - seconds for name, seconds in self.begin.items()}


async def measure(runner: Runner, batch: int, steps: int, profile: Path | None) -> results.Row:
    """One run of `batch` requests that decode `steps` tokens each."""
    await runner.vocab_size()
    service = runner.service
    assert service is not None
    cpu = CpuTimes({**service.pids, "client": os.getpid()})
    profiler = profile_scheduler(service.pids["scheduler"], profile) if profile is not None else None
    jobs = [Job([11] * PROMPT, steps) for _ in range(batch)]
    outcome = await throughput.run(runner, jobs, f"host-path-{batch}-{time.monotonic_ns()}")
    used = cpu.used()
    if profiler is not None:
        await asyncio.to_thread(profiler.wait, 60)
    assert outcome.used is not None
    plans = max(1, outcome.used.steps)
    return {
        "steps": plans,
        "seconds": round(outcome.seconds, 4),
        "steps_s": round(plans / outcome.seconds, 1),
        "ms_per_step": round(1e3 * outcome.seconds / plans, 4),
        "gpu_idle_ratio": round((outcome.idle_s or 0.0) / outcome.seconds, 4),
        "cpu_us_per_step": {name: round(1e6 * seconds / plans, 1) for name, seconds in used.items()},
        "part_ms": outcome.used.part_ms,
    }


def profile_scheduler(pid: int, path: Path) -> subprocess.Popen[bytes]:
    """Samples the scheduler's stacks, if py-spy is installed; collapsed stacks go to `path`."""
    command = [
        "py-spy",
        "record",
        "-p",
        str(pid),
        "-o",
        str(path),
        "-f",
        "raw",
        "-r",
        "500",
        "-d",
        "8",
        "--nonblocking",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def limit_launch(card: str, token_budget: int, gateways: int = 0, target_itl_ms: float = 0.0) -> Launch:
    """A service whose device takes the limit's time."""
    worker = ("benchmarks.host_path", "worker")
    return Launch(
        model=f"limit-{card}",
        token_budget=token_budget,
        target_itl_ms=target_itl_ms,
        gateways=gateways,
        worker_module=worker,
    )


async def measure_rows(names: Sequence[str], card: str, token_budget: int, path: Path) -> None:
    """The offline workloads on the device that takes the limit's time."""
    launch = limit_launch(card, token_budget)
    recorder = results.Recorder(path, results.header(token_budget=token_budget, load_average=os.getloadavg()[0]))
    with tempfile.TemporaryDirectory(prefix="pagewire-host-path-") as folder:
        runner = Runner(launch, Path(folder), say=lambda _line: None)
        print("workload              out tok/s   limit  of limit   seconds    idle  steps")
        for name in names:
            call = partial(throughput.measure, runner, name, scale=FULL, repeat=1, vocab_size=HIGHEST_ID)
            row = await runner.row({"workload": name}, 120.0, call)
            if "error" in row:
                print(f"{name:<20}  {row['error']}")
            else:
                anchor = OFFLINE_ANCHORS[name]
                value = row[anchor.unit]
                share = 0.0 if anchor.limit is None else value / anchor.limit
                row["of_limit"] = round(1 / share if anchor.unit == "seconds" and share else share, 4) or None
                row["device_s"] = round(row["steps"] * row["ms_per_step"]["forward"] / 1e3, 4)
                print(
                    f"{name:<20}  {row['out_tok_s']:9.0f}  {anchor.limit or 0:6.0f}  {row['of_limit'] or 0:8.1%}"
                    f"  {row['seconds']:8.2f}  {row['gpu_idle_ratio']:6.1%}  {row['steps']:5}",
                    flush=True,
                )
            recorder.add(row)
        await runner.stop()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-ms", type=float, action="append", help="device time; default: 0 and the H200's")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="*", choices=OFFLINE, help="run these workloads; none named: all")
    parser.add_argument("--card", choices=[name.removeprefix("limit-") for name in RATES], default="h200")
    parser.add_argument("--online", action="store_true", help="run the online rows, at session and gateway")
    parser.add_argument("--at", nargs="+", choices=("session", "gateway"), default=["session", "gateway"])
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--token-budget", type=int, default=Launch("").token_budget)
    parser.add_argument("--target-itl-ms", type=float, default=0.0, help="of the online rows; 0: no limit")
    parser.add_argument("--profile", type=Path, help="file for the scheduler's stacks; needs py-spy")
    options = parser.parse_args()
    if options.rows is not None:
        path = options.out or RESULTS.with_name("host_rows.json")
        await measure_rows(options.rows or OFFLINE, options.card, options.token_budget, path)
        return
    if options.online:
        path = options.out or RESULTS.with_name("host_online.json")
        launch = limit_launch(options.card, options.token_budget, options.gateways, options.target_itl_ms)
        rates = tuple((rate, anchor.requests) for rate, anchor in ONLINE.items())
        await suite.main(suite.Plan(online=rates, places=tuple(options.at), online_output=path), launch)
        return
    recorder = results.Recorder(
        options.out or RESULTS, results.header(steps=options.steps, load_average=os.getloadavg()[0])
    )
    print("batch  device ms   ms/step   steps/s    idle   CPU us per step")
    for batch in options.batch:
        for step_ms in options.step_ms or (0.0, H200_STEP_MS[batch]):
            launch = Launch(model=str(step_ms), max_num_seqs=batch, worker_module=("benchmarks.host_path", "worker"))
            with tempfile.TemporaryDirectory(prefix="pagewire-host-path-") as folder:
                runner = Runner(launch, Path(folder), say=lambda _line: None)
                row = await runner.row(
                    {"batch": batch, "device_ms": step_ms},
                    120.0,
                    partial(measure, runner, batch, options.steps, options.profile),
                )
                await runner.stop()
            recorder.add(row)
            if "error" in row:
                print(f"{batch:5}  {step_ms:9.1f}  {row['error']}")
                continue
            parts = ", ".join(f"{name} {value:.0f}" for name, value in row["cpu_us_per_step"].items())
            print(
                f"{batch:5}  {step_ms:9.1f}  {row['ms_per_step']:8.3f}  {row['steps_s']:8.0f}"
                f"  {row['gpu_idle_ratio']:6.1%}   {parts}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2:])
    else:
        import uvloop

        uvloop.run(main())
