"""A recorded run gives a profile that the simulator runs other loads on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulator.recorded import RecordedProfile, profile_of
from benchmarks.simulator.simulation import Arrival, Simulation
from pagewire.recording import Recording, RecordingError
from pagewire.simulation.batch import StepLoad
from pagewire.simulation.costs import StepCosts
from tests.scheduler.recordings import record_run, rewrite


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asyncio.run(record_run(path))
    return path


@pytest.fixture(scope="module")
def profile(recorded: Path) -> RecordedProfile:
    return profile_of(Recording(recorded))


def test_it_has_the_recorded_workers_sizes_and_the_fitted_costs(profile: RecordedProfile) -> None:
    assert profile.name == "recorded-fake"
    assert (profile.capacity.num_blocks, profile.capacity.host_blocks, profile.capacity.block_bytes) == (24, 12, 4096)
    # The fake worker says that every step takes a microsecond.
    assert profile.forward_ns(StepLoad(decode_tokens=3, decode_context=30)) == pytest.approx(1000, abs=20)
    assert profile.forward_ns(StepLoad()) == 0
    assert profile.rates.swap_out_bytes_per_second > 0


def test_the_simulator_runs_another_load_on_it(profile: RecordedProfile) -> None:
    arrivals = [Arrival(number * 1000, [number + 1] * 12, output_tokens=6) for number in range(30)]
    as_recorded = Simulation([profile], arrivals).run()
    assert (len(as_recorded.completions), as_recorded.failures, as_recorded.refused) == (30, [], 0)
    quick, slow = (
        Simulation([replace(profile, costs=StepCosts(fixed_ns=ns, swap_ns=1000.0), link_delay_ns=0)], arrivals).run()
        for ns in (1e6, 1e7)
    )
    assert slow.end_ns > 5 * quick.end_ns
    assert slow.workers[0].busy_ns >= slow.workers[0].steps * 10_000_000


def test_a_recording_without_step_times_is_refused_by_name(recorded: Path, tmp_path: Path) -> None:
    path = rewrite(
        recorded,
        tmp_path / "untimed.rec",
        lambda event: event.HasField("applied") and event.applied.step_result.ClearField("timings"),
    )
    with pytest.raises(RecordingError, match=r"untimed.rec: it has 0 steps with times"):
        profile_of(Recording(path))
