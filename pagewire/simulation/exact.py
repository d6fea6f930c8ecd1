"""Calls the core again as a recording says, and compares every answer with the recorded one.

The core has no clock and no randomness, so the same calls at the same times give the same plans. A difference means
another version of the core, or a defect that makes it depend on something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pagewire.recording import Recording, RecordingError
from pagewire.v1 import recording_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.dispatcher import Admission, Continuation, Dispatcher, Event, ResultError, SchedulerConfig, StepOutput
from scheduler.events import StatusCode
from scheduler.sequence import FinishReason, Request
from scheduler.step_plan import StepPlan, StepResult

MAX_SHOWN = 60
"""Characters of a differing value that are shown."""


@dataclass
class ExactReport:
    """How far the simulated scheduling is the recorded one."""

    calls: int = 0
    """Calls of the core that were made again."""
    plans: int = 0
    """Step plans that are equal to the recorded ones."""
    results: int = 0
    """Step results that were fed to the core."""
    requests: int = 0
    """Submissions, refused ones included."""
    first_ns: int = 0
    """When the first call was made, by the recorded clock."""
    last_ns: int = 0
    """When the last one was."""
    first_difference: str = ""
    """One line; empty: everything is equal. Nothing behind it was simulated."""


class Watch:
    """Sees what happens in a simulation; this one does not look."""

    def joined(self, hello: worker_pb2.WorkerHello, epoch: int) -> None:
        """A worker has joined."""

    def called(self, event: recording_pb2.RecordingEvent, dispatcher: Dispatcher) -> None:
        """A call is about to be made."""

    def submitted(self, request: Request, admission: Admission, now: int) -> None:
        """A request was submitted, with the recorded verdict."""

    def planned(self, worker_id: str, plan: StepPlan, now: int) -> None:
        """A plan was made, equal to the recorded one."""

    def applied(self, worker_id: str, result: StepResult, output: StepOutput, now: int) -> None:
        """A result was given to the core."""

    def happened(self, event: Event, now: int) -> None:
        """The core tells of an event."""


def config_of(recording: Recording) -> SchedulerConfig:
    """The core's settings in a recording. Raises RecordingError for one that this version does not know."""
    known = {field.name for field in fields(SchedulerConfig)}
    said: dict[str, Any] = {name: json.loads(value) for name, value in recording.header.policy.items()}
    unknown = sorted(said.keys() - known)
    if unknown:
        raise RecordingError(
            f"{recording.path}: made by Pagewire {recording.header.pagewire_version}, whose scheduler has settings "
            f"that this one does not know: {', '.join(unknown)}"
        )
    return SchedulerConfig(**said)


def simulate(recording: Recording, watch: Watch | None = None) -> ExactReport:
    """Makes the recorded calls again, up to the first difference. Raises RecordingError for a recording that does not
    hold what that needs."""
    if recording.header.began_in_mid_run:
        raise RecordingError(
            f"{recording.path}: began in mid-run, so what the scheduler held then is not in it: it cannot be "
            "simulated; record from the scheduler's start with --record"
        )
    return _Simulation(recording, watch or Watch()).run()


class _DifferenceError(Exception):
    """An answer is not the recorded one. The message says what was recorded and what came."""


class _Simulation:
    def __init__(self, recording: Recording, watch: Watch) -> None:
        self.recording = recording
        self.watch = watch
        self.report = ExactReport()
        self.dispatcher = Dispatcher(config_of(recording))
        self.limits = codec.limits_of(recording.header.model)
        self.calls: dict[str, Callable[[Any, int], None]] = {
            "worker_joined": self._joined,
            "worker_left": self._left,
            "submitted": self._submitted,
            "request_ended": self._request_ended,
            "sequence_stopped": self._sequence_stopped,
            "expired": self._expired,
            "prefix_pinned": self._prefix_pinned,
            "scheduled": self._scheduled,
            "applied": self._applied,
            "parked": self._parked,
            "continued": self._continued,
            "held_cut": self._held_cut,
        }

    def run(self) -> ExactReport:
        report = self.report
        for event in self.recording.events():
            kind = event.WhichOneof("event")
            if kind is None:
                raise RecordingError(
                    f"{self.recording.path}: Pagewire {self.recording.header.pagewire_version} has recorded calls that "
                    "this version does not know: simulate it with that version"
                )
            now = event.at_ns or report.last_ns  # calls that depend on no time are given none
            report.first_ns = report.first_ns or now
            report.last_ns = now
            report.calls += 1
            self.watch.called(event, self.dispatcher)
            try:
                self.calls[kind](getattr(event, kind), now)
            except _DifferenceError as difference:
                report.first_difference = f"{difference}{self._excuse()}"
                break
            except codec.SubmitError as error:
                raise RecordingError(
                    f"{self.recording.path}: damaged: no scheduler would have taken a request that it holds: {error}"
                ) from None
            for happened in self.dispatcher.take_events():
                self.watch.happened(happened, now)
        return report

    def _excuse(self) -> str:
        """Why a difference may be expected."""
        if self.recording.header.format_revision == 0:
            return " (the recording is older than records of parked requests: if any was parked, this is why)"
        return ""

    def _joined(self, joined: recording_pb2.RecordedWorkerJoined, now: int) -> None:
        hello = joined.hello
        self.dispatcher.add_worker(hello.worker_id, codec.capacity_of(hello), codec.rates_of(hello), joined.epoch, now)
        self.watch.joined(hello, joined.epoch)

    def _left(self, left: recording_pb2.RecordedWorkerLeft, now: int) -> None:
        self.dispatcher.remove_worker(left.worker_id, now)

    def _submitted(self, submitted: recording_pb2.RecordedSubmission, now: int) -> None:
        self.report.requests += 1
        submit = scheduler_pb2.Submit()
        submit.CopyFrom(submitted.submit)  # decoding takes its prompt out
        request = codec.decode_submit(submit, self.limits, now)
        answer = self.dispatcher.submit(request, now)
        _compare(f"verdict on request {request.request_id!r}", submitted.verdict, answer.admission.value)
        self.watch.submitted(request, answer.admission, now)

    def _request_ended(self, ended: recording_pb2.RecordedRequestEnd, now: int) -> None:
        if ended.finish_reason:
            self.dispatcher.abort(ended.request_id, FinishReason(ended.finish_reason), now)
        else:
            self.dispatcher.fail(ended.request_id, StatusCode(ended.code), ended.reason, "", now)

    def _sequence_stopped(self, stop: recording_pb2.RecordedStop, now: int) -> None:
        self.dispatcher.stop_sequence(stop.request_id, stop.index, stop.num_tokens, "", now)

    def _held_cut(self, stop: recording_pb2.RecordedStop, now: int) -> None:
        self.dispatcher.cut(stop.request_id, stop.index, stop.num_tokens, "")

    def _expired(self, _expired: recording_pb2.RecordedExpiry, now: int) -> None:
        self.dispatcher.expire(now)

    def _prefix_pinned(self, pin: recording_pb2.RecordedPin, now: int) -> None:
        if pin.unpin:
            self.dispatcher.unpin_prefix(pin.tenant, pin.token_ids[:])
        else:
            self.dispatcher.pin_prefix(pin.tenant, pin.token_ids[:])

    def _parked(self, park: recording_pb2.RecordedPark, now: int) -> None:
        verdict = self.dispatcher.park(park.request_id, park.ttl_ns, now)
        _compare(f"verdict on parking request {park.request_id!r}", park.verdict, verdict.value)

    def _continued(self, continued: recording_pb2.RecordedContinue, now: int) -> None:
        what = continuation_of(continued, self.limits, now)
        resumed = self.dispatcher.resume(continued.request_id, what, now)
        _compare(f"verdict on continuing request {continued.request_id!r}", continued.verdict, resumed.verdict.value)

    def _scheduled(self, recorded: recording_pb2.RecordedPlan, now: int) -> None:
        plan = self.dispatcher.schedule(recorded.worker_id, now)
        expected = recorded.step_plan if recorded.HasField("step_plan") else None
        got = None if plan is None else worker_pb2.JoinResponse.FromString(codec.encode_plan(plan)).step_plan
        if expected != got:
            raise _DifferenceError(_first_difference(recorded.worker_id, expected, got))
        if plan is not None:
            self.report.plans += 1
            self.watch.planned(recorded.worker_id, plan, now)

    def _applied(self, recorded: recording_pb2.RecordedResult, now: int) -> None:
        self.report.results += 1
        result = codec.decode_result(recorded.step_result)
        try:
            output = self.dispatcher.apply(recorded.worker_id, result, now)
        except ResultError:
            return  # as it did when it was recorded: the worker leaves next
        self.watch.applied(recorded.worker_id, result, output, now)


def continuation_of(continued: recording_pb2.RecordedContinue, limits: codec.ModelLimits, now: int) -> Continuation:
    """What a recorded request went on with."""
    return Continuation(
        tokens=continued.token_ids[:],
        max_tokens=continued.max_tokens,
        max_model_len=limits.max_model_len,
        deadline=now + continued.timeout_ns if continued.HasField("timeout_ns") else None,
        detached=continued.detached,
        hold_ns=continued.hold_ns,
    )


def _compare(what: str, recorded: str, got: str) -> None:
    if recorded != got:
        raise _DifferenceError(f"{what}: recorded {recorded!r}, got {got!r}")


def _first_difference(worker_id: str, expected: worker_pb2.StepPlan | None, got: worker_pb2.StepPlan | None) -> str:
    """Where two plans differ, in one line."""
    if expected is None or got is None:
        known = expected or got
        assert known is not None
        where = f"epoch {known.epoch}, step {known.step}, worker {worker_id!r}"
        return f"{where}: " + ("recorded no plan, got one" if expected is None else "recorded a plan, got none")
    where = f"epoch {expected.epoch}, step {expected.step}, worker {worker_id!r}"
    for field in expected.DESCRIPTOR.fields:
        one, other = getattr(expected, field.name), getattr(got, field.name)
        if one != other:
            return f"{where}, {field.name}: recorded {_shortened(one)}, got {_shortened(other)}"
    return f"{where}: fields that this version does not know"


def _shortened(value: object) -> str:
    text = " ".join(str(value).split()) or "nothing"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
