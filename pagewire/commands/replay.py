"""`pagewire replay`: executes a recording again on a worker and compares."""

from __future__ import annotations

import enum
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pagewire.bundled import BUNDLED_MODEL, BUNDLED_NAME
from pagewire.commands.extras import imports
from pagewire.runtime.errors import StartError

if TYPE_CHECKING:
    from pagewire.recording import Recording
    from pagewire.replay import Epoch, EpochReport

EXIT_DIFFERENT = 1
WIDTH = 120
"""Columns that the table needs; a narrower terminal wraps it."""
COSTS = (
    "per step",
    "per decode sequence",
    "per prefill token",
    "per context token",
    "per block copied",
    "per block swapped",
)
"""The fields of StepCosts, for people."""
STOP_S = 10.0
"""Time for the worker between SIGTERM and SIGKILL."""


class PreemptionMode(enum.StrEnum):
    """As of the scheduler's setting."""

    AUTO = "auto"
    SWAP = "swap"
    RECOMPUTE = "recompute"


def command() -> Callable[..., None]:
    """The command."""
    return replay


def replay(
    file: Annotated[Path, typer.Argument(help="A recording, made with --record.")],
    model: Annotated[
        str, typer.Option(help="Directory or hub id of the recorded model. Default: found by its recorded name.")
    ] = "",
    device: Annotated[str, typer.Option(help="Where the worker computes: auto, cpu or cuda.")] = "auto",
    load_format: Annotated[str, typer.Option(help="auto reads the weights; dummy makes random ones.")] = "auto",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of equal log-probabilities.")] = 1e-3,
    listen: Annotated[
        str, typer.Option(help="Start no worker; wait for one that joins at HOST:PORT.", show_default=False)
    ] = "",
    insecure: Annotated[bool, typer.Option(help="Let --listen take an address that other machines reach.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="No worker: schedule the recorded run again and compare the plans.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="No worker: fit what a step costs to the recorded step times.")
    ] = False,
    preemption_mode: Annotated[
        PreemptionMode | None,
        typer.Option(help="With --simulate: what this setting would have given, by fitted costs."),
    ] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Likewise: tokens per step.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Likewise: sequences at once per worker.")] = None,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="Likewise: KV blocks per worker.")] = None,
    host_blocks: Annotated[int | None, typer.Option(min=0, help="Likewise: host arena blocks per worker.")] = None,
    prefix_cache: Annotated[bool | None, typer.Option(help="Likewise: with or without the prefix cache.")] = None,
) -> None:
    """Execute the plans of a recorded run on a worker and compare the results, token by token.

    Exit 0: equal. 1: they differ; the first difference is named. 2: the recording cannot be replayed.
    """
    from pagewire.recording import Recording, RecordingError

    try:
        recording = Recording(file)
        changes = {
            "preemption_mode": None if preemption_mode is None else preemption_mode.value,
            "token_budget": token_budget,
            "max_num_seqs": max_num_seqs,
            "num_blocks": num_blocks,
            "host_blocks": host_blocks,
            "prefix_cache": prefix_cache,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes and not simulate:
            raise RecordingError(f"{_option(next(iter(changes)))} needs --simulate: a worker executes what was planned")
        if changes:
            _what_if(recording, changes)
        elif simulate:
            _simulate(recording)
        if calibrate:
            _calibrate(recording)
        if simulate or calibrate:
            return
        from pagewire.replay import epochs_of

        epochs = epochs_of(recording)
        reports = _on_a_worker(recording, epochs, model, device, load_format, tolerance, listen, insecure)
    except RecordingError as error:
        raise StartError(str(error)) from None
    how_it_ends = recording.how_it_ends()
    if how_it_ends:
        print(how_it_ends)
    if any(report.first_difference for report in reports):
        raise typer.Exit(EXIT_DIFFERENT)


def _simulate(recording: Recording) -> None:
    """Schedules the run again, with the recorded results."""
    from pagewire.simulation.exact import simulate

    begun = time.perf_counter()
    report = simulate(recording)
    wall_s = time.perf_counter() - begun
    print(
        f"{report.calls} calls, {report.requests} requests, {report.plans} plans, {report.results} results: "
        f"{(report.last_ns - report.first_ns) / 1e9:.1f} s of the run in {wall_s:.1f} s"
    )
    if recording.how_it_ends():
        print(recording.how_it_ends())
    if report.first_difference:
        print(f"different: {report.first_difference}")
        raise typer.Exit(EXIT_DIFFERENT)
    print("equal: every plan and every verdict is as recorded")


def _what_if(recording: Recording, changed: dict[str, Any]) -> None:
    """Runs the recorded load with other settings, and with the recorded ones to show how far the costs are right."""
    from rich.console import Console
    from rich.table import Table

    from pagewire.recording import RecordingError
    from pagewire.simulation.what_if import Changes, Tally, read, run_with

    try:
        run = read(recording)
    except ValueError as error:
        raise RecordingError(f"{recording.path}: {error}") from None
    if run.first_difference:
        raise RecordingError(f"{recording.path}: cannot be simulated: {run.first_difference}")
    tallies = [run.measured, run_with(run, Changes()), run_with(run, Changes(**changed))]

    def row(name: str, figure: Callable[[Tally], object]) -> None:
        table.add_row(name, *(str(figure(tally)) for tally in tallies))

    words = " ".join(f"{_option(name)} {str(value).lower()}" for name, value in changed.items())
    print(f"changed: {words}")
    table = Table("", "as measured", "simulated, unchanged", "simulated, changed")
    row("requests ended", lambda tally: tally.finished)
    row("failed", lambda tally: tally.failed)
    row("refused", lambda tally: tally.refused)
    row("output tokens", lambda tally: tally.output_tokens)
    row("seconds", lambda tally: f"{tally.seconds:.3f}")
    row("output tokens per second", lambda tally: f"{tally.output_tokens / (tally.seconds or 1):.1f}")
    row("first token, p50, ms", lambda tally: _percentile(tally.first_token_ns, 0.5))
    row("first token, p99, ms", lambda tally: _percentile(tally.first_token_ns, 0.99))
    row("whole request, p50, ms", lambda tally: _percentile(tally.total_ns, 0.5))
    row("whole request, p99, ms", lambda tally: _percentile(tally.total_ns, 0.99))
    row("steps", lambda tally: tally.steps)
    row("preemptions by swap", lambda tally: tally.preemptions["swap"])
    row("preemptions by recompute", lambda tally: tally.preemptions["recompute"])
    Console(highlight=False, soft_wrap=True, width=max(Console().width, WIDTH)).print(table)
    fit = run.fit
    print(f"simulated times are by fitted costs; relative error of a step: p50 {100 * fit.residual(0.5):.1f} %")
    if recording.how_it_ends():
        print(recording.how_it_ends())


def _microseconds(ns: float) -> str:
    return f"{ns / 1e3:,.0f}" if ns >= 100_000 else f"{ns / 1e3:.3g}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _percentile(values: list[int], share: float) -> str:
    """Of nanoseconds, in milliseconds."""
    if not values:
        return "-"
    return f"{sorted(values)[min(len(values) - 1, int(share * len(values)))] / 1e6:.1f}"


def _calibrate(recording: Recording) -> None:
    """Fits step costs and shows how well they fit."""
    from dataclasses import astuple

    from rich.console import Console
    from rich.table import Table

    from pagewire.recording import RecordingError
    from pagewire.simulation.costs import fit, steps_of

    try:
        found = fit(steps_of(recording)[0])
    except ValueError as error:
        raise RecordingError(f"{recording.path}: {error}") from None
    table = Table("cost", "microseconds", "steps with it")
    for name, ns, num_steps in zip(COSTS, astuple(found.costs), found.num_with, strict=True):
        table.add_row(name, _microseconds(ns) if num_steps else "not in the recording", str(num_steps))
    table.add_row("scheduler and wire, per step (median)", _microseconds(found.link_ns), str(found.num_steps))
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, WIDTH))
    console.print(table)
    shares = ", ".join(f"p{round(100 * share)} {100 * found.residual(share):.1f} %" for share in (0.5, 0.9, 0.99))
    console.print(f"relative error of a step: {shares}")
    console.print(f"all steps: measured {found.took_ns / 1e9:.3f} s, fitted {found.fitted_ns / 1e9:.3f} s")


def _on_a_worker(
    recording: Recording,
    epochs: list[Epoch],
    model: str,
    device: str,
    load_format: str,
    tolerance: float,
    listen: str,
    insecure: bool,
) -> list[EpochReport]:
    from pagewire.recording import RecordingError
    from pagewire.replay import ReplayServer, replay, why_unfit
    from pagewire.runtime.channel import is_loopback, split_address

    if recording.header.began_in_mid_run and not any(epoch.num_results for epoch in epochs):
        raise RecordingError(
            f"{recording.path}: began in mid-run, and no worker that joined later has executed anything: only that "
            "could be replayed"
        )
    if not any(epoch.num_results for epoch in epochs):
        raise RecordingError(f"{recording.path}: no step result is in it: nothing can be compared")
    if listen and not insecure and not is_loopback(split_address(listen)[0]):
        raise RecordingError(
            f"{listen} can be reached from other machines without TLS: add --insecure if that is meant"
        )
    model = model or (listen and "unused") or _model_of(recording)
    server = ReplayServer(listen or "127.0.0.1:0", lambda hello: why_unfit(recording, epochs, hello))
    try:
        if listen:
            print(f"waiting for a worker: pagewire worker --scheduler {server.address} ...", flush=True)
            reports = replay(recording, epochs, server, tolerance=tolerance)
        else:
            with _worker(recording, epochs, server.address, model, device, load_format) as is_alive:
                reports = replay(recording, epochs, server, tolerance=tolerance, is_alive=is_alive)
    finally:
        server.stop()
    _show(reports)
    if recording.header.began_in_mid_run:
        print(f"{recording.path}: began in mid-run; workers that were there already are left out")
    return reports


def _model_of(recording: Recording) -> str:
    """Where the recorded model is, as far as its name tells."""
    from pagewire.recording import RecordingError

    name = recording.header.model.name
    if name in (BUNDLED_NAME, BUNDLED_MODEL.name):
        return str(BUNDLED_MODEL)
    if "/" in name:
        return name
    raise RecordingError(f"{recording.path}: recorded with the model {name!r}: give its directory or hub id as --model")


@contextmanager
def _worker(
    recording: Recording, epochs: list[Epoch], address: str, model: str, device: str, load_format: str
) -> Iterator[Callable[[], bool]]:
    """A worker as large as the recorded ones. Yields whether it still lives; shows its log if it ended by itself."""
    from pagewire.recording import WorkerRefusedError

    with imports("worker"):
        import torch  # noqa: F401  (one clear line here, instead of a child's)
    capacities = [epoch.hello.capacity for epoch in epochs]
    arguments = {
        "--scheduler": address,
        "--model": model,
        "--served-model-name": recording.header.model.name,
        "--device": device,
        "--load-format": load_format,
        "--dtype": recording.header.model.dtype,
        "--max-model-len": recording.header.model.max_model_len,
        "--block-size": recording.header.block_size,
        "--num-blocks": max(one.num_blocks for one in capacities),
        "--host-blocks": max(one.host_blocks for one in capacities),
        "--max-num-seqs": max(one.max_slots for one in capacities),
        "--token-budget": max(one.max_step_tokens for one in capacities),
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "pagewire.cli", "worker"]
    command += [str(part) for pair in arguments.items() for part in pair]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            yield lambda: process.poll() is None
        except WorkerRefusedError:
            raise
        except BaseException:
            if process.poll() is not None:
                said.seek(0)
                sys.stderr.write(said.read().decode(errors="replace"))
            raise
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _show(reports: list[EpochReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("epoch", "worker", "steps", "tokens", "different", "log-probs", "different", "not answered")
    for report in reports:
        figures = (report.steps, report.tokens, report.different_tokens, report.logprobs, report.different_logprobs)
        table.add_row(str(report.epoch), report.worker_id, *map(str, figures), str(report.unanswered))
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, WIDTH))
    console.print(table)
    first = next((report for report in reports if report.first_difference), None)
    if first is None:
        console.print("equal: every result is as recorded", markup=False)
    else:
        console.print(f"different: epoch {first.epoch}, {first.first_difference}", markup=False)
