"""Recording: every call of the core that changes it goes to a file, with what the core answered.

The event loop only appends to a bounded buffer; a thread encodes and writes. Where the disk is slower than the run, the
recording ends and says so in the file and in the log: a recording with a hole could not be replayed, and a buffer that
grows would bring the scheduler down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import Message

from pagewire import __version__
from pagewire.recording import FORMAT, FORMAT_REVISION, FORMAT_VERSION, PROTOCOL_VERSION, frame
from pagewire.runtime import logs
from pagewire.v1 import recording_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.dispatcher import Continuation, Dispatcher, ParkingVerdict, Resumed, Submitted
from scheduler.draft import StepOutput
from scheduler.events import StatusCode
from scheduler.policy import SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.scheduler import Scheduler
from scheduler.sequence import FinishReason, Request
from scheduler.step_plan import StepPlan, StepResult

MAX_BUFFERED = 8192
"""Events that wait for the disk; as many again may be on their way to it. Some seconds of a busy run."""

Encoder = Callable[[recording_pb2.RecordingEvent], None]
"""Fills in an event, on the writing thread. What it refers to must not change any more."""

log = logs.get_logger("scheduler.recorder")


class Recorder:
    """One file being written."""

    def __init__(
        self,
        path: Path,
        config: SchedulerConfig,
        settings: dict[str, str],
        max_buffered: int = MAX_BUFFERED,
        *,
        in_mid_run: bool = False,
        present: Sequence[recording_pb2.RecordedWorkerPresent] = (),
    ) -> None:
        """Makes the file. Raises OSError when it exists already or cannot be made.

        `in_mid_run`: what is recorded builds on what is not, such as the workers that are `present`."""
        self.path = path
        self.num_events = 0
        """Written so far."""
        self.num_bytes = 0
        """Written so far."""
        self._header = recording_pb2.RecordingHeader(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            format_revision=FORMAT_REVISION,
            protocol_version=PROTOCOL_VERSION,
            pagewire_version=__version__,
            settings=settings,
            policy={name: json.dumps(value) for name, value in dataclasses.asdict(config).items()},
            started_at_unix_ns=time.time_ns(),
            began_in_mid_run=in_mid_run,
        )
        self._max_buffered = max_buffered
        self._file: BinaryIO = path.open("xb")
        self._buffer: deque[tuple[int, Encoder]] = deque()
        self._early: list[recording_pb2.RecordingEvent] = []  # before the header; hardly anything happens then
        self._changed = threading.Condition()
        self._cause = recording_pb2.RECORDING_END_CAUSE_UNSPECIFIED
        self._num_dropped = 0
        if present:
            self._complete_header(present[0].hello)
        for worker in present:
            self._write(recording_pb2.RecordingEvent(worker_present=worker))
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()
        log.warning("recording prompts, step plans and step results", file=str(path))

    @property
    def is_whole(self) -> bool:
        """Whether what is recorded builds on nothing that is not."""
        return not self._header.began_in_mid_run

    @property
    def is_recording(self) -> bool:
        """Whether events are still taken."""
        return self._cause == recording_pb2.RECORDING_END_CAUSE_UNSPECIFIED

    def add(self, at_ns: int, encode: Encoder) -> None:
        """Takes one event; never waits for the disk."""
        with self._changed:
            if not self.is_recording:
                self._num_dropped += 1
                return
            if len(self._buffer) >= self._max_buffered:
                self._num_dropped += 1
                self._end(recording_pb2.RECORDING_END_CAUSE_TOO_SLOW)
                log.error("the disk is too slow: the recording has ended", file=str(self.path))
                return
            self._buffer.append((at_ns, encode))
            if len(self._buffer) == 1:
                self._changed.notify()

    def stop(self, *, shut_down: bool = False) -> None:
        """Ends the recording and waits until all of it is written."""
        with self._changed:
            if self.is_recording:
                causes = recording_pb2.RecordingEndCause
                self._end(causes.RECORDING_END_CAUSE_SHUT_DOWN if shut_down else causes.RECORDING_END_CAUSE_STOPPED)
        self._thread.join()

    def _end(self, cause: recording_pb2.RecordingEndCause) -> None:
        self._cause = cause
        self._changed.notify()

    def _write_all(self) -> None:
        """The thread: writes until the recording ends."""
        try:
            with self._file:
                while self._write_some():
                    pass
                event = recording_pb2.RecordingEvent()
                event.recording_ended.cause = self._cause
                event.recording_ended.dropped_events = self._num_dropped
                if self._header.HasField("model"):  # else the file stays empty: there was no worker
                    self._write(event)
        except OSError as error:
            log.error("the recording has ended: it cannot be written", file=str(self.path), why=error.strerror)
        except Exception:
            log.exception("the recording has ended: it cannot be encoded", file=str(self.path))
        finally:
            with self._changed:
                self._buffer.clear()
                if self.is_recording:
                    self._cause = recording_pb2.RECORDING_END_CAUSE_TOO_SLOW
        log.info("recording closed", file=str(self.path), events=self.num_events, bytes=self.num_bytes)

    def _write_some(self) -> bool:
        """Writes what is buffered. False: the recording has ended and all of it is written."""
        with self._changed:
            while not self._buffer and self.is_recording:
                self._changed.wait()
            taken, self._buffer = self._buffer, deque()
        for at_ns, encode in taken:
            event = recording_pb2.RecordingEvent(at_ns=at_ns)
            encode(event)
            if event.WhichOneof("event") == "worker_joined" and not self._header.HasField("model"):
                self._complete_header(event.worker_joined.hello)
            if self._header.HasField("model"):
                self._write(event)
            else:
                self._early.append(event)
        self._file.flush()
        return bool(taken)

    def _complete_header(self, hello: worker_pb2.WorkerHello) -> None:
        """Writes the header, which waits for the first worker: before it nothing can have been planned."""
        self._header.model.CopyFrom(hello.model)
        self._header.block_size = hello.capacity.block_size
        self._header.num_blocks = hello.capacity.num_blocks
        self._header.host_blocks = hello.capacity.host_blocks
        self.num_bytes += self._file.write(frame(self._header))
        for event in self._early:
            self._write(event)
        self._early.clear()

    def _write(self, message: Message) -> None:
        self.num_bytes += self._file.write(frame(message))
        self.num_events += 1


class RecordedDispatcher(Dispatcher):
    """A dispatcher whose calls can be recorded: all that change it."""

    def __init__(
        self,
        config: SchedulerConfig,
        hello_of: Callable[[str], worker_pb2.WorkerHello],
        make_scheduler: Callable[..., Scheduler] = Scheduler,
    ) -> None:
        """`hello_of` gives the introduction of a worker that is being added; `make_scheduler` as in Dispatcher."""
        super().__init__(config, make_scheduler)
        self.recorder: Recorder | None = None
        """Takes the calls; None: nobody does."""
        self._hello_of = hello_of

    def add_worker(self, worker_id: str, capacity: WorkerCapacity, rates: TransferRates, epoch: int, now: int) -> None:
        if self.recorder is not None:
            hello = self._hello_of(worker_id)
            self.recorder.add(
                now,
                lambda event: event.worker_joined.CopyFrom(
                    recording_pb2.RecordedWorkerJoined(hello=hello, epoch=epoch)
                ),
            )
        with self._unrecorded():  # taking out a worker of the same name is part of it
            super().add_worker(worker_id, capacity, rates, epoch, now)

    def remove_worker(self, worker_id: str, now: int) -> None:
        if self.recorder is not None and worker_id in self.workers():
            left = recording_pb2.RecordedWorkerLeft(worker_id=worker_id)
            self.recorder.add(now, lambda event: event.worker_left.CopyFrom(left))
        super().remove_worker(worker_id, now)

    def submit(self, request: Request, now: int) -> Submitted:
        submitted = super().submit(request, now)
        if self.recorder is not None:
            verdict = submitted.admission.value

            def encode(event: recording_pb2.RecordingEvent) -> None:
                event.submitted.submit.CopyFrom(encode_request(request, now))
                event.submitted.verdict = verdict

            self.recorder.add(now, encode)
        return submitted

    def abort(self, request_id: str, reason: FinishReason, now: int) -> bool:
        if self.recorder is not None:
            end = recording_pb2.RecordedRequestEnd(request_id=request_id, finish_reason=reason.value)
            self.recorder.add(now, lambda event: event.request_ended.CopyFrom(end))
        return super().abort(request_id, reason, now)

    def fail(
        self, request_id: str, code: StatusCode, reason: str, message: str, now: int, retry_after_ns: int = 0
    ) -> bool:
        if self.recorder is not None:
            end = recording_pb2.RecordedRequestEnd(request_id=request_id, code=code, reason=reason)
            self.recorder.add(now, lambda event: event.request_ended.CopyFrom(end))
        return super().fail(request_id, code, reason, message, now, retry_after_ns)

    def stop_sequence(self, request_id: str, index: int, num_tokens: int, matched_stop: str, now: int) -> bool:
        if self.recorder is not None:
            stop = recording_pb2.RecordedStop(request_id=request_id, index=index, num_tokens=num_tokens)
            self.recorder.add(now, lambda event: event.sequence_stopped.CopyFrom(stop))
        return super().stop_sequence(request_id, index, num_tokens, matched_stop, now)

    def expire(self, now: int) -> None:
        if self.recorder is not None:
            self.recorder.add(now, lambda event: event.expired.SetInParent())
        with self._unrecorded():  # requests that it ends are part of it
            super().expire(now)

    def park(self, request_id: str, ttl_ns: int, now: int) -> ParkingVerdict:
        verdict = super().park(request_id, ttl_ns, now)
        if self.recorder is not None:
            park = recording_pb2.RecordedPark(request_id=request_id, ttl_ns=ttl_ns, verdict=verdict.value)
            self.recorder.add(now, lambda event: event.parked.CopyFrom(park))
        return verdict

    def resume(self, request_id: str, what: Continuation, now: int) -> Resumed:
        resumed = super().resume(request_id, what, now)
        if self.recorder is not None:
            timeout_ns = None if what.deadline is None else max(0, what.deadline - now)
            recorded = recording_pb2.RecordedContinue(
                request_id=request_id,
                token_ids=what.tokens,
                max_tokens=what.max_tokens,
                timeout_ns=timeout_ns,
                detached=what.detached,
                hold_ns=what.hold_ns,
                verdict=resumed.verdict.value,
            )
            self.recorder.add(now, lambda event: event.continued.CopyFrom(recorded))
        return resumed

    def cut(self, request_id: str, index: int, num_tokens: int, matched_stop: str) -> bool:
        if self.recorder is not None:
            cut = recording_pb2.RecordedStop(request_id=request_id, index=index, num_tokens=num_tokens)
            self.recorder.add(0, lambda event: event.held_cut.CopyFrom(cut))
        return super().cut(request_id, index, num_tokens, matched_stop)

    def pin_prefix(self, tenant: str, tokens: list[int]) -> str | None:
        self._record_pin(tenant, tokens, unpin=False)
        return super().pin_prefix(tenant, tokens)

    def unpin_prefix(self, tenant: str, tokens: list[int]) -> bool:
        self._record_pin(tenant, tokens, unpin=True)
        return super().unpin_prefix(tenant, tokens)

    @contextlib.contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """For calls of the core that the core makes itself."""
        recorder, self.recorder = self.recorder, None
        try:
            yield
        finally:
            self.recorder = recorder

    def _record_pin(self, tenant: str, tokens: list[int], *, unpin: bool) -> None:
        if self.recorder is not None:
            pin = recording_pb2.RecordedPin(tenant=tenant, token_ids=tokens, unpin=unpin)
            self.recorder.add(0, lambda event: event.prefix_pinned.CopyFrom(pin))

    def schedule(self, worker_id: str, now: int) -> StepPlan | None:
        plan = super().schedule(worker_id, now)
        if self.recorder is not None:

            def encode(event: recording_pb2.RecordingEvent) -> None:
                event.scheduled.worker_id = worker_id
                if plan is not None:
                    event.scheduled.step_plan.CopyFrom(
                        worker_pb2.JoinResponse.FromString(codec.encode_plan(plan)).step_plan
                    )
                    event.scheduled.request_ids.extend(row.request.request_id for row in plan.new_sequences)

            self.recorder.add(now, encode)
        return plan

    def apply(self, worker_id: str, result: StepResult, now: int) -> StepOutput:
        if self.recorder is not None:

            def encode(event: recording_pb2.RecordingEvent) -> None:
                event.applied.worker_id = worker_id
                event.applied.step_result.CopyFrom(codec.encode_result(result))

            self.recorder.add(now, encode)
        return super().apply(worker_id, result, now)


def encode_request(request: Request, accepted_at: int) -> scheduler_pb2.Submit:
    """A request as the gateway submitted it, but for its stream number."""
    submit = scheduler_pb2.Submit()
    assert isinstance(request.payload, scheduler_pb2.Submit)
    submit.CopyFrom(request.payload)
    if request.deadline is not None:
        submit.timeout_ns = request.deadline - accepted_at
    return submit
