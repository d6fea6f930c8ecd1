"""Replays a recording on a worker: the recorded plans go to it as a scheduler would send them, and its results are
compared with the recorded ones, token by token.

The worker is any process that joins: this module serves `WorkerService` and knows neither models nor devices. Every
epoch of the recording is a stream of its own, so that each begins on an empty worker, as it did.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from pagewire.recording import PROTOCOL_VERSION, Recording, RecordingError, WorkerRefusedError
from pagewire.runtime.channel import server_options
from pagewire.simulation import batch
from pagewire.v1 import inference_pb2, recording_pb2, worker_pb2, worker_pb2_grpc

MAX_PLANS_IN_FLIGHT = 2
HEARTBEAT_INTERVAL_NS = 500_000_000
POLL_S = 0.2
"""How often a wait looks whether the worker's process still lives."""


@dataclass(frozen=True)
class Row:
    """What a row of a result is: the next token of a sequence."""

    request_id: str
    index: int
    """Of the sequence in its request; of a beam, that of the one from which it descends."""
    position: int
    """Of the token among the sequence's output."""

    def __str__(self) -> str:
        return f"request {self.request_id!r}, sequence {self.index}, output token {self.position}"


@dataclass(slots=True)
class _Sequence(batch.Row):
    """A row of the persistent batch that knows whose it is."""

    request_id: str
    index: int
    num_prompt: int

    def forked(self, index: int) -> _Sequence:
        return replace(self, index=index)


class Rows:
    """Follows a worker's rows, to say which sequence each row of a result belongs to."""

    def __init__(self) -> None:
        self._request_ids: Iterator[str] = iter(())
        self._batch = batch.Batch(self._sequence)

    def of(self, plan: worker_pb2.StepPlan, request_ids: Sequence[str]) -> list[Row]:
        """The rows of a plan's result, in order. Plans must come in order. KeyError, ValueError: it contradicts those
        before it."""
        if len(plan.new_sequences) != len(request_ids):
            raise ValueError("new sequences without a name")
        self._request_ids = iter(request_ids)
        self._batch.execute(plan)
        return [Row(row.request_id, row.index, known - row.num_prompt) for row, known in self._batch.sampling()]

    def _sequence(self, new: worker_pb2.NewSequence) -> _Sequence:
        return _Sequence(len(new.token_ids), new.computed_tokens, next(self._request_ids), new.index, new.prompt_tokens)


@dataclass
class EpochReport:
    """How the replay of one epoch compares."""

    epoch: int
    worker_id: str
    steps: int = 0
    """Plans whose results were compared."""
    tokens: int = 0
    different_tokens: int = 0
    logprobs: int = 0
    different_logprobs: int = 0
    unanswered: int = 0
    """Recorded plans without a recorded result; they were not replayed."""
    first_difference: str = ""
    """One line; empty: the results are equal."""

    def differ(self, step: int, what: object, expected: object, got: object) -> None:
        """Notes a difference, if it is the first."""
        self.first_difference = self.first_difference or f"step {step}, {what}: recorded {expected}, got {got}"


def compare(
    report: EpochReport,
    rows: Sequence[Row],
    expected: worker_pb2.StepResult,
    got: worker_pb2.StepResult,
    tolerance: float,
) -> None:
    """Compares two results of one plan. `tolerance` is the largest difference of two equal log-probabilities."""
    step = expected.step
    report.steps += 1
    report.tokens += len(expected.token_ids)
    if len(expected.token_ids) != len(got.token_ids):
        report.different_tokens += len(expected.token_ids)
        report.differ(step, "number of rows", len(expected.token_ids), len(got.token_ids))
        return
    for name in ("nonfinite_rows", "out_of_memory_slots", "logprob_rows"):
        recorded, answered = list(getattr(expected, name)), list(getattr(got, name))
        if recorded != answered:
            report.different_tokens += 1
            report.differ(step, name, recorded, answered)
    meaningless = {*expected.nonfinite_rows, *got.nonfinite_rows}
    for number, (row, token, other) in enumerate(zip(rows, expected.token_ids, got.token_ids, strict=True)):
        if token != other and number not in meaningless:
            report.different_tokens += 1
            report.differ(step, row, token, other)
    if list(expected.logprob_rows) == list(got.logprob_rows):
        for number, ours, theirs in zip(expected.logprob_rows, expected.logprobs, got.logprobs, strict=True):
            _compare_logprobs(report, step, rows[number], ours, theirs, tolerance)
    for part, other_part in zip(expected.prompt_logprobs, got.prompt_logprobs, strict=False):
        for position, (ours, theirs) in enumerate(zip(part.logprobs, other_part.logprobs, strict=False)):
            what = f"slot {part.slot}, prompt token {part.first_token + position}"
            _compare_logprobs(report, step, what, ours, theirs, tolerance)
    num_prompt = [sum(len(part.logprobs) for part in result.prompt_logprobs) for result in (expected, got)]
    if num_prompt[0] != num_prompt[1]:
        report.different_logprobs += abs(num_prompt[0] - num_prompt[1])
        report.differ(step, "number of prompt log-probabilities", *num_prompt)


def _compare_logprobs(
    report: EpochReport,
    step: int,
    what: object,
    expected: inference_pb2.TokenLogprobs,
    got: inference_pb2.TokenLogprobs,
    tolerance: float,
) -> None:
    report.logprobs += 1
    ours = [expected.logprob, *expected.top_logprobs]
    theirs = [got.logprob, *got.top_logprobs]
    # Ids of the most likely tokens are not compared: two of nearly the same probability may change places.
    if len(ours) == len(theirs) and all(abs(a - b) <= tolerance for a, b in zip(ours, theirs, strict=True)):
        return
    report.different_logprobs += 1
    report.differ(step, f"log-probability of {what}", f"{expected.logprob:.6f}", f"{got.logprob:.6f}")


@dataclass
class Epoch:
    """One worker's stream in a recording."""

    number: int
    hello: worker_pb2.WorkerHello
    num_plans: int = 0
    num_results: int = 0


def epochs_of(recording: Recording) -> list[Epoch]:
    """The epochs of a recording that begin in it, oldest first. Reads the whole file once; raises
    RecordingError where it is damaged."""
    epochs: dict[int, Epoch] = {}
    for event in recording.events():
        kind = event.WhichOneof("event")
        if kind == "worker_joined":
            epochs[event.worker_joined.epoch] = Epoch(event.worker_joined.epoch, event.worker_joined.hello)
        elif kind == "scheduled" and event.scheduled.step_plan.epoch in epochs:
            epochs[event.scheduled.step_plan.epoch].num_plans += 1
        elif kind == "applied" and event.applied.step_result.epoch in epochs:
            epochs[event.applied.step_result.epoch].num_results += 1
    return [epochs[number] for number in sorted(epochs)]


def answered_plans(
    recording: Recording, epoch: int
) -> Iterator[tuple[recording_pb2.RecordedPlan, worker_pb2.StepResult]]:
    """An epoch's plans with their results, in order; those that have none are left out."""
    plans: dict[int, recording_pb2.RecordedPlan] = {}
    early: dict[int, worker_pb2.StepResult] = {}
    following = 1
    for event in recording.events():
        kind = event.WhichOneof("event")
        if kind == "scheduled" and event.scheduled.step_plan.epoch == epoch:
            plans[event.scheduled.step_plan.step] = event.scheduled
        elif kind == "applied" and event.applied.step_result.epoch == epoch:
            result = event.applied.step_result
            if result.step in plans:
                early.setdefault(result.step, result)
            while following in early:
                yield plans.pop(following), early.pop(following)
                following += 1


@dataclass
class Session:
    """A worker that has joined."""

    hello: worker_pb2.WorkerHello
    context: Any
    outbox: queue.Queue[worker_pb2.JoinResponse | None] = field(default_factory=queue.Queue)
    results: queue.Queue[worker_pb2.StepResult | None] = field(default_factory=queue.Queue)
    """None: the worker's stream has ended."""

    def end(self) -> None:
        """Ends the stream from this side; a worker joins again by itself."""
        self.outbox.put(None)


class ReplayServer(worker_pb2_grpc.WorkerServiceServicer):
    """Serves Join to the worker that replays."""

    def __init__(self, address: str, check: Callable[[worker_pb2.WorkerHello], str]) -> None:
        """Listens. `check` says why a worker cannot replay the recording, or nothing.

        Raises RecordingError when the address cannot be bound."""
        self.sessions: queue.Queue[Session] = queue.Queue()
        self.refusals: queue.Queue[str] = queue.Queue()
        """Why workers have been refused."""
        self._check = check
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=server_options(internal=True))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise RecordingError(f"cannot listen on {address}: choose another --listen") from None
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()

    def stop(self) -> None:
        """Ends every stream."""
        self._server.stop(grace=None).wait()

    def Join(self, requests: Iterator[Any], context: Any) -> Iterator[worker_pb2.JoinResponse]:  # noqa: N802
        """One worker's stream."""
        first = next(requests)
        hello = first.hello
        why = self._check(hello)
        if why:
            self.refusals.put(why)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        session = Session(hello, context)
        threading.Thread(target=_read, args=(requests, session), daemon=True).start()
        self.sessions.put(session)
        while (response := session.outbox.get()) is not None:
            yield response


def _read(requests: Iterator[Any], session: Session) -> None:
    try:
        for message in requests:
            if message.WhichOneof("message") == "step_result":
                session.results.put(message.step_result)
    except grpc.RpcError:
        pass  # the worker has gone
    session.results.put(None)
    session.outbox.put(None)


def why_unfit(recording: Recording, epochs: Sequence[Epoch], hello: worker_pb2.WorkerHello) -> str:
    """Why a worker cannot replay a recording, in one line; empty: it can."""
    path, model, capacity = recording.path, recording.header.model, hello.capacity
    if hello.protocol_version != PROTOCOL_VERSION:
        return f"{path}: protocol version {PROTOCOL_VERSION}; the worker speaks {hello.protocol_version}"
    if hello.model.dtype != model.dtype:
        return f"{path}: recorded with {model.dtype}; the worker computes with {hello.model.dtype}: give --dtype"
    if hello.model.fingerprint != model.fingerprint:
        return (
            f"{path}: recorded with the model {model.name!r} (fingerprint {model.fingerprint}); the worker has loaded "
            f"{hello.model.name!r} (fingerprint {hello.model.fingerprint}): give its --model"
        )
    if capacity.block_size != recording.header.block_size:
        return (
            f"{path}: recorded with blocks of {recording.header.block_size} tokens; the worker's have "
            f"{capacity.block_size}"
        )
    for name in ("num_blocks", "host_blocks", "max_slots", "max_step_tokens"):
        needed = max(getattr(epoch.hello.capacity, name) for epoch in epochs)
        has = getattr(capacity, name)
        if has < needed:
            return f"{path}: needs a worker with {name} of {needed} at least; this one has {has}"
    return ""


def replay(
    recording: Recording,
    epochs: Sequence[Epoch],
    server: ReplayServer,
    *,
    tolerance: float,
    is_alive: Callable[[], bool] = lambda: True,
    on_report: Callable[[EpochReport], None] = lambda _report: None,
) -> list[EpochReport]:
    """Replays every epoch that has results, one after the other.

    Args:
        recording: where the plans come from.
        epochs: its epochs.
        server: where the worker joins.
        tolerance: largest difference of two equal log-probabilities, natural logarithm.
        is_alive: whether the worker's process still lives.
        on_report: called after each epoch.

    Raises:
        RecordingError: the worker is refused, or it is lost on the way.
    """
    reports = []
    for epoch in epochs:
        if not epoch.num_results:
            continue
        session = _next_session(recording, server, is_alive)
        welcome = worker_pb2.WorkerWelcome(
            epoch=epoch.number,
            max_plans_in_flight=MAX_PLANS_IN_FLIGHT,
            heartbeat_interval_ns=HEARTBEAT_INTERVAL_NS,
        )
        session.outbox.put(worker_pb2.JoinResponse(welcome=welcome))
        report = EpochReport(epoch.number, epoch.hello.worker_id)
        try:
            _replay_epoch(recording, session, report, tolerance, is_alive)
        finally:
            session.end()
        report.unanswered = epoch.num_plans - report.steps
        reports.append(report)
        on_report(report)
    return reports


def _next_session(recording: Recording, server: ReplayServer, is_alive: Callable[[], bool]) -> Session:
    while True:
        try:
            return server.sessions.get(timeout=POLL_S)
        except queue.Empty:
            pass
        if not server.refusals.empty():
            raise WorkerRefusedError(server.refusals.get())
        if not is_alive():
            raise RecordingError(f"{recording.path}: the worker could not start")


def _replay_epoch(
    recording: Recording, session: Session, report: EpochReport, tolerance: float, is_alive: Callable[[], bool]
) -> None:
    followed = Rows()
    waiting: list[tuple[list[Row], worker_pb2.StepResult]] = []

    def take_one() -> None:
        rows, expected = waiting.pop(0)
        got = _result(recording, session, expected.step, is_alive)
        compare(report, rows, expected, got, tolerance)

    for planned, result in answered_plans(recording, report.epoch):
        try:
            rows = followed.of(planned.step_plan, planned.request_ids)
        except (KeyError, ValueError):
            where = f"epoch {report.epoch}, step {planned.step_plan.step}"
            raise RecordingError(
                f"{recording.path}: damaged: the plan of {where} contradicts those before it"
            ) from None
        waiting.append((rows, result))
        session.outbox.put(worker_pb2.JoinResponse(step_plan=planned.step_plan))
        if len(waiting) == MAX_PLANS_IN_FLIGHT:
            take_one()
    while waiting:
        take_one()


def _result(recording: Recording, session: Session, step: int, is_alive: Callable[[], bool]) -> worker_pb2.StepResult:
    while True:
        try:
            result = session.results.get(timeout=POLL_S)
        except queue.Empty:
            if is_alive():
                continue
            result = None
        if result is None:
            raise RecordingError(f"{recording.path}: the worker was lost in step {step}; its log says why")
        if result.step == step:
            return result
