"""Step costs are found again from recordings that were made with known ones."""

from __future__ import annotations

import asyncio
import random
from dataclasses import astuple
from pathlib import Path

import pytest

from pagewire.recording import Recording
from pagewire.simulation.batch import StepLoad
from pagewire.simulation.costs import Step, StepCosts, StepWatch, fit, steps_of
from pagewire.simulation.exact import simulate
from pagewire.v1 import recording_pb2
from tests.scheduler.recordings import record_run, rewrite
from tests.simulation.commands import replay

MACHINE = StepCosts(fixed_ns=2e6, decode_ns=30_000, prefill_ns=9_000, context_ns=120, copy_ns=5_000, swap_ns=40_000)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Always swaps, so that its plans do not depend on its step times."""
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asyncio.run(record_run(path, preemption_mode="swap"))
    return path


def timed(source: Path, target: Path, noise: float) -> Path:
    """The recording as the machine would have made it: every step takes what MACHINE says, but for the noise."""
    watch = StepWatch()
    simulate(Recording(source), watch)
    steps, dice = iter(watch.steps), random.Random(1)

    def change(event: recording_pb2.RecordingEvent) -> None:
        if event.HasField("applied"):
            timings = event.applied.step_result.timings
            timings.Clear()
            load = next(steps).load
            swapping = MACHINE.swap_ns * (load.swapped_out_blocks + load.swapped_in_blocks)
            copying = MACHINE.copy_ns * load.copied_blocks
            timings.swap_out_ns, timings.copy_ns = round(swapping), round(copying)
            timings.forward_ns = round((MACHINE.step_ns(load) - swapping - copying) * dice.gauss(1.0, noise))

    return rewrite(source, target, change)


def test_the_machine_is_found_again_from_its_recording(recorded: Path, tmp_path: Path) -> None:
    steps, report = steps_of(Recording(timed(recorded, tmp_path / "timed.rec", noise=0.0)))
    assert len(steps) == report.results > 30
    found = fit(steps)
    assert found.num_with[-1] > 0
    for got, cost, num_steps in zip(astuple(found.costs), astuple(MACHINE), found.num_with, strict=True):
        assert got == pytest.approx(cost if num_steps else 0.0, rel=0.01)
    assert found.residual(1.0) < 1e-3
    assert found.fitted_ns == pytest.approx(found.took_ns, rel=1e-3)


def test_noise_of_ten_percent_stays_in_the_residuals(recorded: Path, tmp_path: Path) -> None:
    steps, _ = steps_of(Recording(timed(recorded, tmp_path / "noisy.rec", noise=0.1)))
    found = fit(steps)
    assert 0.02 < found.residual(0.5) < 0.15
    assert found.fitted_ns == pytest.approx(found.took_ns, rel=0.1)


def test_the_command_shows_the_costs_and_the_residuals(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = replay(capsys, timed(recorded, tmp_path / "timed.rec", noise=0.0), "--calibrate")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    shown = {name: value for name, value, _ in cells}
    assert shown["per step"] == "2,000"
    assert shown["per block swapped"] == "40"
    assert "relative error of a step: p50 0.0 %, p90 0.0 %, p99 0.0 %" in out


def test_a_negative_cost_is_left_out_and_so_is_one_that_only_repeats_another() -> None:
    def step(rows: int, prefill: int, took_ns: int) -> Step:
        return Step(StepLoad(decode_tokens=rows, decode_context=2 * rows, chunk_tokens=prefill), took_ns, 0, 0, 0)

    steps = [step(rows, prefill, 10_000 + 100 * rows - prefill) for rows in range(1, 9) for prefill in (0, 50)]
    costs = fit(steps).costs
    assert costs.prefill_ns == 0.0
    assert costs.context_ns == 0.0
    assert costs.decode_ns == pytest.approx(100, rel=0.1)


def test_a_handful_of_steps_is_refused(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forget(event: recording_pb2.RecordingEvent) -> None:
        event.applied.step_result.ClearField("timings")

    path = rewrite(recorded, tmp_path / "untimed.rec", lambda event: event.HasField("applied") and forget(event))
    code, _, err = replay(capsys, path, "--calibrate")
    assert code == 2
    assert err == f"pagewire replay: {path}: it has 0 steps with times; a fit needs 16 at least\n"
