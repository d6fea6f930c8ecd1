"""A recorded run is scheduled again without a worker, plan by plan."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from pagewire.recording import Recording, RecordingError, frame
from pagewire.simulation.exact import simulate
from pagewire.v1 import recording_pb2
from tests.scheduler.recordings import record_run, rewrite, with_header
from tests.simulation.commands import replay
from tests.simulation.lives import RecordedLife

SEEDS = range(60)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asyncio.run(record_run(path, kill_a_worker=True))
    return path


def test_every_life_of_the_core_is_scheduled_again_plan_by_plan(tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    for seed in SEEDS:
        path = tmp_path / f"{seed}.rec"
        life = RecordedLife(seed, path)
        life.record()
        report = simulate(Recording(path))
        assert report.first_difference == "", f"seed {seed}"
        happened += life.statistics
        for event in Recording(path).events():
            happened[event.WhichOneof("event") or ""] += 1
            plan = event.scheduled.step_plan
            happened.update(name for name in ("forks", "beam_slots", "swap_out", "copies") if getattr(plan, name))
    kinds = ("parked", "continued", "held_cut", "sequence_stopped", "request_ended", "expired", "worker_left")
    for kind in (*kinds, "forks", "beam_slots", "swap_out", "copies", "prefix_pinned", "park: ok", "continue: ok"):
        assert happened[kind] > 0, f"no life had {kind}: {happened}"


def test_a_served_run_with_a_lost_worker_is_simulated_by_the_command(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = replay(capsys, recorded, "--simulate")
    assert code == 0
    assert "12 requests" in out
    assert out.endswith("equal: every plan and every verdict is as recorded\n")


def test_a_plan_that_comes_out_otherwise_is_named_with_its_step_and_field(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed: list[recording_pb2.RecordingEvent] = []

    def change(event: recording_pb2.RecordingEvent) -> None:
        if not changed and event.scheduled.step_plan.step == 3:
            changed.append(event)
            event.scheduled.step_plan.chunk_slots.append(15)

    code, out, _ = replay(capsys, rewrite(recorded, tmp_path / "changed.rec", change), "--simulate")
    assert code == 1
    (plan,) = [event.scheduled.step_plan for event in changed]
    assert f"different: epoch {plan.epoch}, step 3, worker " in out
    assert ", chunk_slots: recorded [" in out


def test_a_plan_too_many_and_a_changed_verdict_are_named(recorded: Path, tmp_path: Path) -> None:
    def forget_plan(event: recording_pb2.RecordingEvent) -> None:
        if event.scheduled.step_plan.step == 3:
            event.scheduled.ClearField("step_plan")

    def refuse(event: recording_pb2.RecordingEvent) -> None:
        if event.submitted.submit.request_id == "r20":
            event.submitted.verdict = "later"

    report = simulate(Recording(rewrite(recorded, tmp_path / "plan.rec", forget_plan)))
    assert report.first_difference.endswith("recorded no plan, got one")
    report = simulate(Recording(rewrite(recorded, tmp_path / "verdict.rec", refuse)))
    assert report.first_difference == "verdict on request 'r20': recorded 'later', got 'ok'"


def test_settings_and_calls_of_a_later_version_are_refused_by_name(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = with_header(recorded, tmp_path / "later.rec", policy={"patience": "7"}, pagewire_version="9.9")
    code, _, err = replay(capsys, changed, "--simulate")
    assert code == 2
    assert err == (
        f"pagewire replay: {changed}: made by Pagewire 9.9, whose scheduler has settings that this one does not know: "
        "patience\n"
    )
    unknown = recording_pb2.RecordingEvent(at_ns=1).SerializeToString() + b"\xf2\x06\x00"  # field 110, empty
    path = tmp_path / "calls.rec"
    path.write_bytes(frame(Recording(recorded).header) + bytes([len(unknown)]) + unknown)
    with pytest.raises(RecordingError, match="recorded calls that this version does not know"):
        simulate(Recording(path))


def test_a_request_that_no_scheduler_would_have_taken_is_refused_in_one_line(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(event: recording_pb2.RecordingEvent) -> None:
        if event.HasField("submitted"):
            event.submitted.submit.sampling.top_p = 2

    changed = rewrite(recorded, tmp_path / "changed.rec", change)
    code, _, err = replay(capsys, changed, "--simulate")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"pagewire replay: {changed}: damaged: ")
    assert "sampling.top_p is 2, which is out of range" in line


def test_a_difference_in_a_file_from_before_parks_were_recorded_says_so(recorded: Path, tmp_path: Path) -> None:
    old = Recording(recorded).header
    old.format_revision = 0
    left_out = [event for event in Recording(recorded).events() if not event.HasField("submitted")]
    path = tmp_path / "old.rec"
    path.write_bytes(b"".join(map(frame, [old, *left_out])))
    assert "if any was parked, this is why" in simulate(Recording(path)).first_difference
