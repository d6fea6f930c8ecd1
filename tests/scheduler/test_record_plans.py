"""Recordings that an operator starts and stops over the wire."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from pagewire.recording import Recording, RecordingError
from pagewire.replay import epochs_of
from pagewire.simulation.exact import simulate
from pagewire.v1 import control_pb2, control_pb2_grpc
from tests.scheduler import peers
from tests.scheduler.recordings import replay_on_fake_worker
from tests.simulation.commands import replay


async def record(made: peers.Pool, **fields: object) -> control_pb2.RecordPlansResponse:
    return await control_pb2_grpc.ControlServiceStub(made.channel).RecordPlans(control_pb2.RecordPlansRequest(**fields))


async def refused(made: peers.Pool, **fields: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(made, **fields)
    return caught.value.code(), caught.value.details() or ""


async def test_a_recording_before_the_first_worker_is_whole(tmp_path: Path) -> None:
    async with peers.pool(record_dir=tmp_path) as made:
        started = await record(made, name="run.rec")
        assert (started.file, started.recording, started.whole) == (str(tmp_path / "run.rec"), True, True)
        (await made.worker()).run()
        gateway = await made.gateway()
        await gateway.submit(1, [5, 6, 7])
        await gateway.finish(1)
        stopped = await record(made, stop=True)
    assert not stopped.recording
    assert stopped.bytes == (tmp_path / "run.rec").stat().st_size
    report = simulate(Recording(tmp_path / "run.rec"))
    assert (report.first_difference, report.requests) == ("", 1)
    assert [one.first_difference for one in await replay_on_fake_worker(tmp_path / "run.rec")] == [""]


async def test_one_that_begins_in_mid_run_replays_workers_that_joined_later_and_is_not_simulated(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.rec"
    async with peers.pool(record_dir=tmp_path) as made:
        first = await made.worker("w1")
        gateway = await made.gateway()
        await gateway.submit(1, [5, 6, 7], max_tokens=30)
        for _ in range(4):
            await first.step()
        await gateway.until(lambda: len(gateway.on(1).tokens) == 4)  # its results have arrived
        started = await record(made, name="run.rec")
        assert (started.recording, started.whole) == (True, False)
        for _ in range(4):
            await first.step()
        await first.stop()
        (await made.worker("w2")).run()
        await gateway.finish(1)
        await record(made, stop=True)
    recording = Recording(path)
    assert [epoch.hello.worker_id for epoch in epochs_of(recording)] == ["w2"]
    present = next(recording.events()).worker_present
    assert (present.hello.worker_id, present.last_step) == ("w1", 4)
    (report,) = await replay_on_fake_worker(path)
    assert (report.worker_id, report.first_difference) == ("w2", "")
    assert report.tokens > 10
    with pytest.raises(RecordingError, match="began in mid-run, so what the scheduler held then is not in it"):
        simulate(recording)


async def test_one_in_which_nothing_can_be_replayed_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with peers.pool(record_dir=tmp_path) as made:
        (await made.worker()).run()
        made_file = (await record(made)).file
        gateway = await made.gateway()
        await gateway.submit(1, [5, 6, 7])
        await gateway.finish(1)
        await record(made, stop=True)
    code, _, err = replay(capsys, made_file)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(
        f"pagewire replay: {made_file}: began in mid-run, and no worker that joined later has executed"
    )
    code, _, err = replay(capsys, made_file, "--calibrate")
    assert (code, err.count("\n")) == (2, 1), err


async def test_what_cannot_be_started_or_stopped_is_refused_by_name(tmp_path: Path) -> None:
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    async with peers.pool() as made:
        assert await refused(made) == (
            precondition,
            "no folder for recordings is set: start the scheduler with --record-dir",
        )
        assert await refused(made, stop=True) == (precondition, "nothing is being recorded")
    (tmp_path / "old.rec").write_text("an earlier run")
    async with peers.pool(record_dir=tmp_path) as made:
        assert await refused(made, name="old.rec") == (
            precondition,
            f"{tmp_path / 'old.rec'} exists: choose another name",
        )
        for name in ("../run.rec", ".hidden", "a/b", "x" * 101):
            code, details = await refused(made, name=name)
            assert (code, details.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "name")
        await record(made, name="a.rec")
        assert await refused(made, name="b.rec") == (
            precondition,
            f"{tmp_path / 'a.rec'} is being recorded: stop that first",
        )
    assert (tmp_path / "old.rec").read_text() == "an earlier run"
    assert not (tmp_path / "b.rec").exists()
