"""What other settings would have given: the same load, the same tokens, other plans."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pagewire.recording import Recording
from pagewire.simulation.costs import StepCosts
from pagewire.simulation.what_if import Changes, Run, read, run_with
from tests.scheduler.recordings import record_run
from tests.simulation.commands import replay
from tests.simulation.lives import RecordedLife

COSTS = StepCosts(fixed_ns=1e9, decode_ns=1e7, prefill_ns=5e6, swap_ns=2e8)
"""So slow that it does not matter how quickly the requests were submitted when the run was recorded."""
OUTPUT_TOKENS = 12 * 14 + 4 * 14
"""Of record_run: twelve requests, four of them with two sequences."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asyncio.run(record_run(path, preemption_mode="swap", kill_a_worker=True))
    return path


@pytest.fixture(scope="module")
def run(recorded: Path) -> Run:
    """The run on a machine with known costs."""
    learned = read(Recording(recorded))
    return replace(learned, fit=replace(learned.fit, costs=COSTS, link_ns=0.0))


def test_every_request_gives_the_same_tokens_whatever_the_settings(run: Run) -> None:
    assert run.measured.output_tokens == OUTPUT_TOKENS
    assert run.measured.preemptions["swap"] > 0
    changed = [
        Changes(),
        Changes(preemption_mode="recompute"),
        Changes(token_budget=8),
        Changes(max_num_seqs=2),
        Changes(num_blocks=400),
        Changes(num_blocks=16, host_blocks=0, prefix_cache=False),
    ]
    for changes in changed:
        tally = run_with(run, changes)
        assert (tally.finished, tally.failed, tally.refused) == (12, 0, 0), changes
        assert tally.output_tokens == OUTPUT_TOKENS, changes


def test_settings_act_as_they_would_have(run: Run) -> None:
    as_recorded = run_with(run, Changes())
    assert as_recorded.preemptions["swap"] > 0
    assert run_with(run, Changes(preemption_mode="recompute")).preemptions["swap"] == 0
    roomy = run_with(run, Changes(num_blocks=400))
    assert not roomy.preemptions.total()
    assert roomy.seconds < as_recorded.seconds
    one_by_one = run_with(run, Changes(max_num_seqs=2))
    assert one_by_one.steps > 1.5 * roomy.steps
    assert sorted(one_by_one.first_token_ns)[-1] > sorted(roomy.first_token_ns)[-1]


def test_the_same_settings_give_the_same_outcome_every_time(run: Run) -> None:
    assert run_with(run, Changes(num_blocks=20)) == run_with(run, Changes(num_blocks=20))


def test_lives_with_beams_parks_stops_and_lost_workers_can_be_run_otherwise(tmp_path: Path) -> None:
    tried = parks = 0
    for seed in range(40):
        path = tmp_path / f"{seed}.rec"
        RecordedLife(seed, path).record()
        try:
            run = read(Recording(path))
        except ValueError:
            continue  # too short to fit costs to
        assert run.first_difference == ""
        tried += 1
        parks += len(run.script.parks) + len(run.script.continues)
        run = replace(run, fit=replace(run.fit, costs=StepCosts(fixed_ns=2.0), link_ns=0.0))
        for changes in (Changes(), Changes(preemption_mode="swap", host_blocks=50), Changes(num_blocks=200)):
            tally = run_with(run, changes)
            assert tally.finished + tally.failed + tally.refused > 0
    assert tried > 10
    assert parks > 10


def test_the_command_shows_measured_and_simulated_figures_side_by_side(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = replay(capsys, recorded, "--simulate", "--preemption-mode", "recompute", "--num-blocks", 30)
    assert code == 0
    assert out.startswith("changed: --preemption-mode recompute --num-blocks 30\n")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    rows = {name: figures for name, *figures in cells}
    assert rows["output tokens"] == [str(OUTPUT_TOKENS)] * 3
    assert rows["preemptions by swap"][2] == "0"


def test_another_setting_without_a_simulation_is_refused(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = replay(capsys, recorded, "--token-budget", 8)
    assert code == 2
    assert err == "pagewire replay: --token-budget needs --simulate: a worker executes what was planned\n"
