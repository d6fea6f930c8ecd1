"""A profile fitted to executed steps finds the machine that executed them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.simulator.calibrate import calibrate, mean_error
from benchmarks.simulator.profiles import H200_LLAMA_8B, WorkerProfile, prefill_load
from benchmarks.simulator.simulation import Simulation
from benchmarks.simulator.traces import SHAREGPT_LIKE
from pagewire.simulation.batch import StepLoad
from scheduler.scheduler import Scheduler

MACHINE = replace(
    H200_LLAMA_8B, memory_rate=3.6e12, compute_rate=610e12, step_overhead_ns=450_000, row_overhead_ns=2_500
)


def executed(machine: WorkerProfile, noise: float) -> list[tuple[StepLoad, int]]:
    """Steps of a busy while, with their times as that machine would report them."""
    dice = random.Random(3)
    steps: list[tuple[StepLoad, int]] = []

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        steps.append((load, round(machine.forward_ns(load) * dice.gauss(1.0, noise))))

    Simulation([machine], SHAREGPT_LIKE.arrivals(40.0, 10.0), observer=observe).run()
    return steps


def test_the_machine_is_found_again_from_its_steps() -> None:
    fitted = calibrate(H200_LLAMA_8B, executed(MACHINE, noise=0.0))
    assert fitted.memory_rate == pytest.approx(3.6e12, rel=0.01)
    assert fitted.compute_rate == pytest.approx(610e12, rel=0.01)
    assert fitted.step_overhead_ns == pytest.approx(450_000, rel=0.02)
    assert fitted.row_overhead_ns == pytest.approx(2_500, rel=0.02)


def test_noise_of_five_percent_leaves_step_times_within_five_percent() -> None:
    steps = executed(MACHINE, noise=0.05)
    fitted = calibrate(H200_LLAMA_8B, steps)
    assert mean_error(fitted, steps) < 0.05 < mean_error(H200_LLAMA_8B, steps)


def test_a_rate_that_no_step_depends_on_stays() -> None:
    decodes = [StepLoad(decode_tokens=rows, decode_context=rows * 100 * rows) for rows in range(1, 20)]
    fitted = calibrate(H200_LLAMA_8B, [(load, MACHINE.forward_ns(load)) for load in decodes])
    assert fitted.compute_rate == H200_LLAMA_8B.compute_rate
    assert fitted.memory_rate == pytest.approx(3.6e12, rel=0.01)


def test_a_handful_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="3 steps are too few"):
        calibrate(H200_LLAMA_8B, [(prefill_load(100), 5_000_000)] * 3)
