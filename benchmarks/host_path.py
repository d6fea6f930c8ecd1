"""What the host costs per step: real scheduler, real session, real worker link and codecs, no model.

    python -m benchmarks.host_path           prints a table, writes benchmarks/results/host_path.json

The worker's device is a stand-in that takes a given time per step. With 0 ms it answers at once, and the steps per
second are the most that the host's side can do. With the time that an H200 needs for the batch, the idle share is how
much of the device's time the host would waste. CPU microseconds per step are the kernel's accounts, so they hold on a
busy machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from benchmarks.rows import Rows
from pagewire.bench import results, throughput
from pagewire.bench.runner import Runner
from pagewire.bench.service import Launch
from pagewire.bench.workloads import Job
from pagewire.runtime import logs, ready
from pagewire.runtime.errors import run_role
from pagewire.v1 import worker_pb2
from worker.executor import Executor, LaunchedStep, Progress
from worker.link import SchedulerLink
from worker.main import fail
from worker.step import StepPlan, StepResult, StepTimings

RESULTS = Path(__file__).parent / "results" / "host_path.json"
H200_STEP_MS = {1: 3.6, 8: 4.0, 32: 4.6, 64: 5.3, 128: 7.0, 256: 11.0, 512: 21.5}
"""About what a decode step of Llama-3.1-8B takes on that card, by batch: the goals of the decode rows."""
PROMPT = 16
SPIN_NS = 200_000
"""The end of a wait is spun through, because a sleeping thread wakes up late."""
TOKEN = 17


class StandInDevice:
    """Executes steps one after the other, each in the same time, and computes nothing. Has an executor's interface."""

    def __init__(self, step_ns: int) -> None:
        self.step_ns = step_ns
        self.progress = Progress()
        self.reset()

    def reset(self) -> None:
        """Drops every row."""
        self.rows = Rows()
        self.free_at = 0

    def launch(self, plan: StepPlan) -> StandInStep:
        """Queues a step and returns."""
        now = time.perf_counter_ns()
        begin = max(now, self.free_at)
        idle_ns = begin - self.free_at if self.free_at else 0
        self.free_at = begin + self.step_ns
        self.progress.last_step = plan.step
        self.progress.advance()
        timings = StepTimings(idle_ns=idle_ns, forward_ns=self.step_ns, decode_tokens=len(self.rows.decode_set))
        return StandInStep(plan, None, (), timings, num_rows=self.rows.apply(plan), done_at=self.free_at)


@dataclass
class StandInStep(LaunchedStep):
    """A queued step; its result is there when its time has passed."""

    num_rows: int = 0
    done_at: int = 0

    def result(self) -> StepResult:
        """Waits, as for a device."""
        left = self.done_at - time.perf_counter_ns()
        if left > SPIN_NS:
            time.sleep((left - SPIN_NS) / 1e9)
        while time.perf_counter_ns() < self.done_at:
            pass
        return StepResult(self.plan.epoch, self.plan.step, [TOKEN] * self.num_rows, timings=self.timings)


def work(arguments: Sequence[str]) -> None:
    """The worker's process: the real link around the stand-in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scheduler", required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--token-budget", type=int, required=True)
    parser.add_argument("--model", required=True, help="milliseconds per step")
    parser.add_argument("--ready-fd", type=int, required=True)
    given, _ = parser.parse_known_args(arguments)
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
        cast(Executor, StandInDevice(int(float(given.model) * 1e6))),
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


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-ms", type=float, action="append", help="device time; default: 0 and the H200's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--profile", type=Path, help="file for the scheduler's stacks; needs py-spy")
    options = parser.parse_args()
    recorder = results.Recorder(options.out, results.header(steps=options.steps, load_average=os.getloadavg()[0]))
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
