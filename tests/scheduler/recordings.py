"""Recordings of a real scheduler with fake workers, and files made of other files."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from pagewire.recording import Recording, frame
from pagewire.replay import EpochReport, ReplayServer, epochs_of, replay, why_unfit
from pagewire.v1 import recording_pb2, worker_pb2, worker_pb2_grpc
from tests.scheduler.peers import FakeWorker, hello, pool


async def record_run(path: Path, *, kill_a_worker: bool = False, **settings: object) -> None:
    """Records requests of one and several sequences, with log-probabilities, on two small workers that preempt."""
    async with pool(record=path, **settings) as made:
        small = {
            "capacity": worker_pb2.WorkerCapacity(
                block_size=4, num_blocks=24, host_blocks=12, block_bytes=4096, max_slots=16, max_step_tokens=64
            )
        }
        workers = [await made.worker("w1", **small), await made.worker("w2", **small)]
        gateway = await made.gateway()
        for number in range(12):
            fields = {"n": 2} if number % 3 == 1 else {"logprobs": 1}
            await gateway.submit(10 * number, [11 + number % 4] * (5 + number), max_tokens=14, **fields)
        streams = [10 * number for number in range(12)] + [10 * number + 1 for number in range(1, 12, 3)]
        if kill_a_worker:
            for _ in range(4):
                await workers[0].step()
            await workers[0].stop()
            await made.worker("w1", **small)
            made.workers[-1].run()
        else:
            workers[0].run()
        workers[1].run()
        await gateway.finish(*streams)


def rewrite(source: Path, target: Path, change: Callable[[recording_pb2.RecordingEvent], None]) -> Path:
    """Copies a recording; `change` sees every event."""
    recording = Recording(source)
    parts = [frame(recording.header)]
    for event in recording.events():
        change(event)
        parts.append(frame(event))
    assert recording.end is not None
    parts.append(frame(recording_pb2.RecordingEvent(recording_ended=recording.end)))
    target.write_bytes(b"".join(parts))
    return target


def with_header(source: Path, target: Path, **fields: object) -> Path:
    """A file with that header and nothing behind it."""
    header = Recording(source).header
    header.MergeFrom(recording_pb2.RecordingHeader(**fields))
    target.write_bytes(frame(header))
    return target


class ReplayingWorker:
    """The fake worker, as a process that joins whoever serves `address` and joins again after each stream."""

    def __init__(self, address: str, introduction: worker_pb2.WorkerHello) -> None:
        self.address = address
        self.introduction = introduction
        self.stopped = False
        self.call: grpc.Call | None = None

    def stop(self) -> None:
        """Ends `run`. A join that reaches a server while that stops is never answered: it has to be cancelled."""
        self.stopped = True
        if self.call is not None:
            self.call.cancel()

    def run(self) -> None:
        while not self.stopped:
            with grpc.insecure_channel(self.address) as channel, contextlib.suppress(grpc.RpcError):
                self.serve(worker_pb2_grpc.WorkerServiceStub(channel))

    def serve(self, stub: worker_pb2_grpc.WorkerServiceStub) -> None:
        outgoing: queue.Queue[worker_pb2.JoinRequest] = queue.Queue()
        outgoing.put(worker_pb2.JoinRequest(hello=self.introduction))
        rows = FakeWorker(None, self.introduction.worker_id)  # type: ignore[arg-type]
        try:
            self.call = responses = stub.Join(iter(outgoing.get, None))
            if self.stopped:
                responses.cancel()
            for response in responses:
                if response.WhichOneof("message") == "step_plan":
                    outgoing.put(worker_pb2.JoinRequest(step_result=rows.execute(response.step_plan)))
        finally:
            outgoing.put(None)  # gRPC's thread waits there


async def replay_on_fake_worker(path: Path, **changes: object) -> list[EpochReport]:
    """Replays a recording on a fake worker; `changes` are of its introduction."""
    recording = Recording(path)
    epochs = epochs_of(recording)
    server = ReplayServer("127.0.0.1:0", lambda said: why_unfit(recording, epochs, said))
    worker = ReplayingWorker(server.address, hello("replaying", **changes))
    running = asyncio.create_task(asyncio.to_thread(worker.run))
    try:
        return await asyncio.to_thread(replay, recording, epochs, server, tolerance=1e-3)
    finally:
        worker.stop()
        await asyncio.to_thread(server.stop)
        await running


def events(path: Path) -> Iterable[recording_pb2.RecordingEvent]:
    return Recording(path).events()
