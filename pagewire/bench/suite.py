"""A series of rows over one start of the service, recorded and shown. The model is loaded once for all of them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pagewire.bench import results, serve, throughput, workloads
from pagewire.bench.anchors import CONFIG, GPU
from pagewire.bench.results import ROOT, Recorder, Row
from pagewire.bench.runner import Runner
from pagewire.bench.serve import DEFAULT_LIMITS, At, Limits, Load
from pagewire.bench.service import Launch
from pagewire.bench.workloads import FULL, Scale

PLACES: tuple[At, ...] = ("session", "gateway", "openai")
PIPE_WIDTH = 160
"""Columns where standard output has no width of its own."""
LENGTH_STEP = 256
"""Contexts are rounded up to this."""


@dataclass(frozen=True)
class Given:
    """A service that is there already."""

    scheduler: str
    metrics: str
    gateways: tuple[str, ...] = ()
    http: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which rows, how and where to."""

    offline: tuple[str, ...] = ()
    """Names of workloads."""
    repeat: int = 1
    """Runs of each offline row."""
    online: tuple[tuple[float, int], ...] = ()
    """Rates, each with its number of requests."""
    concurrent: tuple[tuple[int, int], ...] = ()
    """Numbers of requests that run at any time, each with its number of requests altogether."""
    text: bool = False
    """Whether gateways decode tokens to text in online rows."""
    plot: Path | None = None
    """Picture of the online rows."""
    places: tuple[str, ...] = ("gateway",)
    """Of PLACES: where online rows are measured."""
    goodput: Limits = DEFAULT_LIMITS
    scale: Scale = FULL
    row_limit_s: float = 120.0
    limit_s: float = 3600.0
    offline_output: Path | None = None
    online_output: Path | None = None
    logs: Path | None = None
    """Folder for the processes' logs; None: a temporary one, which stays when a row fails."""


async def main(plan: Plan, launch: Launch, given: Given | None = None) -> bool:
    """Runs a plan, prints its tables last. True: every row has values."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    folder = plan.logs or Path(tempfile.mkdtemp(prefix="pagewire-bench-logs-"))
    if given is None:
        launch = with_context(launch, plan)
        runner = Runner(launch, folder, limit_s=plan.limit_s, say=partial(console.print, markup=False))
    else:
        runner = Runner(
            None,
            folder,
            scheduler=given.scheduler,
            metrics_address=given.metrics or None,
            gateways=given.gateways,
            http=given.http,
            limit_s=plan.limit_s,
        )
    head = header(launch, given)
    offline, online = Recorder(plan.offline_output, head), Recorder(plan.online_output, head)
    try:
        await _offline_rows(runner, plan, offline, console)
        await _online_rows(runner, plan, online, console)
    finally:
        await runner.stop()
    compare = is_comparable(plan, launch, given, head)
    if offline.rows:
        show(console, throughput.table(offline.rows, compare=compare))
    if online.rows:
        show(console, serve.table(online.rows, compare=compare))
    if plan.plot is not None:
        from pagewire.bench.plot import plot_online  # needs matplotlib

        plot_online(online.rows, plan.plot)
        console.print(f"plot in {plan.plot}", markup=False)
    failed = [row for row in [*offline.rows, *online.rows] if "error" in row]
    if failed:
        console.print(f"{len(failed)} rows failed; logs in {folder}", markup=False)
    return not failed


def header(launch: Launch, given: Given | None) -> dict[str, object]:
    """The head of both files."""
    roles = f"1 scheduler, {_workers(launch.workers)} and {launch.gateways} gateways"
    layout = f"{roles} as processes, gRPC over Unix sockets; client in one"
    model = launch.model.replace(f"{ROOT}/", "")
    modules = (launch.scheduler_module, launch.worker_module)
    settings = {name: value for name, value in vars(launch).items() if value not in (None, *modules)}
    return results.header(
        model=None if given else model,
        settings=None if given else {**settings, "model": model},
        layout=f"a service that ran already at {given.scheduler}" if given else layout,
        seeds={"prompts": workloads.PROMPT_SEED, "gaps": workloads.GAP_SEED, "online lengths": workloads.ONLINE_SEED},
    )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def is_comparable(plan: Plan, launch: Launch, given: Given | None, head: dict[str, object]) -> bool:
    """Whether rows may stand beside the recorded ones: same requests, same model shape, same card."""
    alike = given is None and launch.workers == 1 and plan.scale.is_full and Path(launch.model).name == CONFIG
    return alike and GPU in str(head["gpu"])


def with_context(launch: Launch, plan: Plan) -> Launch:
    """`launch` with the context that the plan's rows need, within what the model's config allows."""
    if launch.max_model_len is not None:
        return launch
    needs = [workloads.longest(workloads.offline(name, plan.scale)) for name in plan.offline]
    counts = [count for _, count in (*plan.online, *plan.concurrent)]
    needs += [workloads.longest(workloads.online(1.0, count, plan.scale)[0]) for count in counts]
    needed = -(-max(needs, default=LENGTH_STEP) // LENGTH_STEP) * LENGTH_STEP
    config = Path(launch.model) / "config.json"
    if not config.is_file():
        return launch
    allowed = json.loads(config.read_text()).get("max_position_embeddings")
    return replace(launch, max_model_len=min(needed, allowed) if isinstance(allowed, int) else needed)


async def _offline_rows(runner: Runner, plan: Plan, recorder: Recorder, console: Console) -> None:
    for name in plan.offline:

        async def measure(name: str = name) -> Row:
            return await throughput.measure(
                runner,
                name,
                scale=plan.scale,
                repeat=plan.repeat,
                vocab_size=await runner.vocab_size(),
                limit_s=plan.row_limit_s,
            )

        recorder.add(await runner.row({"workload": name}, plan.row_limit_s, measure))
        _tell(console, throughput.table(recorder.rows[-1:], compare=False))


async def _online_rows(runner: Runner, plan: Plan, recorder: Recorder, console: Console) -> None:
    series = [(Load(rate=rate), count) for rate, count in plan.online]
    series += [(Load(concurrency=concurrency), count) for concurrency, count in plan.concurrent]
    if series:
        await runner.begin_online()
    for load, count in series:
        for place in PLACES:
            if place not in plan.places:
                continue

            async def measure(load: Load = load, count: int = count, place: At = place) -> Row:
                return await serve.measure(
                    runner,
                    place,
                    load,
                    count,
                    scale=plan.scale,
                    limits=plan.goodput,
                    vocab_size=await runner.vocab_size(),
                    text=plan.text,
                )

            recorder.add(await runner.row({**load.label, "at": place}, plan.row_limit_s, measure))
            _tell(console, serve.table(recorder.rows[-1:], compare=False))


def _tell(console: Console, lines: Sequence[Sequence[str]]) -> None:
    """One row as soon as it is known: a run that is cut short has shown what it had."""
    console.print("  ".join(lines[1]), markup=False, soft_wrap=True)


def show(console: Console, lines: Sequence[Sequence[str]]) -> None:
    """A table, its heading first."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(lines[0]):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        if len(line) == len(lines[0]):
            table.add_row(*line)
    console.print(table)
    for line in lines[1:]:
        if len(line) != len(lines[0]):
            console.print("  ".join(line), markup=False, soft_wrap=True)
