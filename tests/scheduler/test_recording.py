"""Recordings of a scheduler, replayed on a worker."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from pagewire.recording import Recording, RecordingError, frame
from pagewire.replay import answered_plans, epochs_of
from pagewire.v1 import recording_pb2
from scheduler.policy import SchedulerConfig
from scheduler.recorder import Recorder
from tests.scheduler import peers
from tests.scheduler.recordings import events, record_run, replay_on_fake_worker, rewrite, with_header


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asyncio.run(record_run(path))
    return path


async def test_a_run_with_forks_and_preemptions_replays_equal(recorded: Path) -> None:
    plans = [event.scheduled.step_plan for event in events(recorded)]
    assert any(plan.forks for plan in plans)
    assert any(plan.swap_out.sources for plan in plans)
    reports = await replay_on_fake_worker(recorded)
    assert len(reports) == 2
    assert all(report.tokens > 50 and report.unanswered <= 2 for report in reports)
    assert sum(report.logprobs for report in reports) > 40
    assert [report.first_difference for report in reports] == ["", ""]


async def test_a_changed_token_is_found_with_its_step_and_its_sequence(recorded: Path, tmp_path: Path) -> None:
    changed = []

    def change(event: recording_pb2.RecordingEvent) -> None:
        result = event.applied.step_result
        if not changed and result.step == 3:
            changed.append((result.epoch, result.token_ids[0]))
            result.token_ids[0] = 7

    reports = await replay_on_fake_worker(rewrite(recorded, tmp_path / "changed.rec", change))
    ((epoch, token),) = changed
    (report,) = [report for report in reports if report.epoch == epoch]
    assert report.different_tokens == 1
    assert report.first_difference.startswith("step 3, request 'r")
    assert report.first_difference.endswith(f"sequence 0, output token 2: recorded 7, got {token}")


async def test_a_changed_log_probability_is_found(recorded: Path, tmp_path: Path) -> None:
    changed = []

    def change(event: recording_pb2.RecordingEvent) -> None:
        for entry in event.applied.step_result.logprobs:
            if not changed:
                changed.append(entry)
                entry.logprob += 0.01

    reports = await replay_on_fake_worker(rewrite(recorded, tmp_path / "changed.rec", change))
    assert sum(report.different_logprobs for report in reports) == 1
    assert any("log-probability of request" in report.first_difference for report in reports)


async def test_the_epoch_of_a_lost_worker_replays_up_to_its_last_result(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    await record_run(path, kill_a_worker=True)
    reports = await replay_on_fake_worker(path)
    assert len(reports) == 3
    assert [report.first_difference for report in reports] == [""] * 3
    lost = next(report for report in reports if report.unanswered)
    assert 3 <= lost.steps <= 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": peers.model(fingerprint="xyz")}, "fingerprint abc.*fingerprint xyz.*give its --model"),
        ({"model": peers.model(dtype="bfloat16")}, "recorded with float32; the worker computes with bfloat16"),
        ({"capacity": peers.capacity(block_size=8)}, "blocks of 4 tokens; the worker's have 8"),
        ({"capacity": peers.capacity(num_blocks=20)}, "num_blocks of 24 at least; this one has 20"),
        ({"protocol_version": 2}, "the worker speaks 2"),
    ],
)
async def test_a_worker_that_cannot_replay_it_is_refused_by_what_differs(
    recorded: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(RecordingError, match=words):
        await replay_on_fake_worker(recorded, **changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format_version": 2, "pagewire_version": "9.9"}, "version 2 of the format .by Pagewire 9.9.; this one reads"),
        ({"protocol_version": 7}, "protocol version 7"),
        ({"format": "something else"}, "no recording of Pagewire"),
    ],
)
def test_a_file_of_another_version_is_refused(
    recorded: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(RecordingError, match=words):
        Recording(with_header(recorded, tmp_path / "other.rec", **fields))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"#!/bin/sh\necho these bytes are no recording, but something that begins otherwise\n", "no recording"),
        (b"\xff" * 100, "no recording of Pagewire"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=words):
        Recording(path)
    with pytest.raises(RecordingError, match="missing: cannot be read"):
        Recording(tmp_path / "missing")


def test_a_file_cut_within_its_header_is_refused(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.rec"
    path.write_bytes(recorded.read_bytes()[:20])
    with pytest.raises(RecordingError, match="cut within its header"):
        Recording(path)


async def test_a_file_cut_within_a_record_is_replayed_up_to_the_cut_and_says_so(recorded: Path, tmp_path: Path) -> None:
    whole = recorded.read_bytes()
    path = tmp_path / "cut.rec"
    path.write_bytes(whole[: len(whole) // 2])
    recording = Recording(path)
    epochs = epochs_of(recording)
    assert "cut within a record at byte" in recording.how_it_ends()
    answered = sum(len(list(answered_plans(recording, epoch.number))) for epoch in epochs)
    reports = await replay_on_fake_worker(path)
    assert sum(report.steps for report in reports) == answered > 5
    assert not any(report.first_difference for report in reports)


def test_a_damaged_record_is_refused_by_its_position(recorded: Path, tmp_path: Path) -> None:
    header = len(frame(Recording(recorded).header))
    path = tmp_path / "damaged.rec"
    path.write_bytes(recorded.read_bytes()[:header] + b"\x05\xff\xff\xff\xff\xff")
    with pytest.raises(RecordingError, match=f"damaged at byte {header}"):
        list(Recording(path).events())


async def test_a_plan_that_contradicts_those_before_it_is_refused_by_its_step(recorded: Path, tmp_path: Path) -> None:
    def change(event: recording_pb2.RecordingEvent) -> None:
        plan = event.scheduled.step_plan
        if plan.step == 3:
            plan.decode_add.append(15)  # a row that nobody has filled

    with pytest.raises(RecordingError, match=r"damaged: the plan of epoch \d+, step 3 contradicts those before it"):
        await replay_on_fake_worker(rewrite(recorded, tmp_path / "changed.rec", change))


def test_a_file_without_its_end_says_that_the_scheduler_ended_abruptly(recorded: Path, tmp_path: Path) -> None:
    recording = Recording(recorded)
    assert list(recording.events())
    assert recording.how_it_ends() == ""
    assert recording.end is not None
    end = len(frame(recording_pb2.RecordingEvent(recording_ended=recording.end)))
    path = tmp_path / "open.rec"
    path.write_bytes(recorded.read_bytes()[:-end])
    recording = Recording(path)
    assert list(recording.events())
    assert "without closing the file" in recording.how_it_ends()


def test_a_disk_that_is_too_slow_ends_the_recording_and_the_file_says_so(tmp_path: Path) -> None:
    path, may_write = tmp_path / "run.rec", threading.Event()
    recorder = Recorder(path, SchedulerConfig(), {}, max_buffered=5)

    def joined(event: recording_pb2.RecordingEvent) -> None:
        may_write.wait()  # the disk
        event.worker_joined.hello.CopyFrom(peers.hello())

    recorder.add(0, joined)
    for number in range(100):
        recorder.add(number, lambda event: event.expired.SetInParent())
    assert not recorder.is_recording
    may_write.set()
    recorder.stop()
    recording = Recording(path)
    assert 5 <= len(list(recording.events())) <= 11
    assert recording.end is not None
    assert recording.end.cause == recording_pb2.RECORDING_END_CAUSE_TOO_SLOW
    assert recording.end.dropped_events >= 89
    assert "the disk was too slow" in recording.how_it_ends()


async def test_an_existing_file_is_kept_and_another_name_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    path.write_text("what an earlier run left")
    async with peers.pool(record=path) as made:
        await made.worker()
    assert path.read_text() == "what an earlier run left"
    assert Recording(tmp_path / "run.rec.2").header.block_size == 4
