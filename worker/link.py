"""The stream to the scheduler: dials, introduces the worker, receives plans, sends results and heartbeats.

The thread that calls `run` executes plans. Three others serve one session: one reads plans, one sends (gRPC's own: it
pulls from the outbox, and so also waits for results and encodes them), one beats. When the stream ends, for whatever
reason, every sequence is dropped and a new session begins with a new hello; the scheduler gives it a larger epoch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import grpc

from pagewire.runtime.channel import client_options
from pagewire.runtime.errors import StartError
from pagewire.runtime.fault_points import fault_point
from pagewire.runtime.logs import get_logger
from pagewire.v1 import worker_pb2, worker_pb2_grpc
from worker.codec import plan_from_wire, result_to_wire
from worker.executor import Executor, LaunchedStep
from worker.plan_gate import PlanGate, Verdict
from worker.step import StepPlan
from worker.traces import Traces

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
MAX_QUEUED_PLANS = 64
"""Bound of the inbox. The scheduler keeps at most max_plans_in_flight unanswered; repeats come on top."""
MAX_QUEUED_MESSAGES = 256
"""Bound of the outbox: results of the plans in flight, their repeats, and heartbeats."""
WELCOME_TIMEOUT_S = 30.0

_REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)
"""Answers that trying again does not change."""

Outgoing = worker_pb2.JoinRequest | LaunchedStep | None
log = get_logger("worker.link")


class SessionLostError(Exception):
    """The stream to the scheduler has ended; the message says how."""


class SchedulerLink:
    """Keeps the worker joined to its scheduler and feeds the executor."""

    def __init__(
        self,
        address: str,
        hello: worker_pb2.WorkerHello,
        executor: Executor,
        *,
        on_welcome: Callable[[], None],
        on_failure: Callable[[BaseException], NoReturn],
        traces: Traces | None = None,
    ) -> None:
        """on_welcome is called at every welcome; on_failure ends the process, because a step has failed; traces gets
        the steps of traced requests, None: traces are off."""
        self.address = address
        self.hello = hello
        self.executor = executor
        self.on_welcome = on_welcome
        self.on_failure = on_failure
        self.traces = traces
        self.last_epoch = 0
        self.joined = False
        """Whether a scheduler has this worker now."""
        self.num_sessions = 0
        """Welcomes so far."""
        self._stop = threading.Event()

    def stop(self) -> None:
        """Makes `run` return before it dials again. Does not end a session."""
        self._stop.set()

    def run(self) -> None:
        """Serves plans until `stop`. Raises StartError if the scheduler refuses this worker for good."""
        backoff = FIRST_BACKOFF_S
        while not self._stop.is_set():
            session = _Session(self)
            try:
                session.join()
                backoff = FIRST_BACKOFF_S
                self.joined = True
                self.num_sessions += 1
                self.on_welcome()
                session.serve()
            except SessionLostError as reason:
                if backoff == FIRST_BACKOFF_S:
                    log.info("not joined", scheduler=self.address, why=str(reason))
            finally:
                self.joined = False
                session.close()
                self.executor.reset()
            self._stop.wait(backoff)
            backoff = min(LAST_BACKOFF_S, 2 * backoff)


class _Session:
    """One stream, from hello to its end."""

    def __init__(self, link: SchedulerLink) -> None:
        self.link = link
        self.executor = link.executor
        self.inbox: queue.Queue[tuple[StepPlan, int] | SessionLostError] = queue.Queue(MAX_QUEUED_PLANS)
        """Plans, and when they came, by the host's clock."""
        self.outbox: queue.Queue[Outgoing] = queue.Queue(MAX_QUEUED_MESSAGES)
        self.ended = threading.Event()
        self.channel = grpc.insecure_channel(link.address, options=client_options(internal=True))
        self.welcome = worker_pb2.WorkerWelcome()
        self.call: grpc.Call | None = None

    def join(self) -> None:
        """Says hello and waits for the welcome. SessionLostError: try again; StartError: refused for good."""
        self.outbox.put(worker_pb2.JoinRequest(hello=self.link.hello))
        responses = worker_pb2_grpc.WorkerServiceStub(self.channel).Join(self._outgoing())
        self.call = responses
        # A scheduler that accepts and says nothing must not hold the worker for ever.
        timer = threading.Timer(WELCOME_TIMEOUT_S, responses.cancel)
        timer.daemon = True
        timer.start()
        try:
            first = next(responses)
        except grpc.RpcError as error:
            if error.code() in _REFUSALS:
                raise StartError(
                    f"the scheduler at {self.link.address} refuses this worker: {error.details()}"
                ) from None
            raise SessionLostError(f"{error.code().name}: {error.details()}") from None
        except StopIteration:
            raise SessionLostError("the scheduler ended the stream before its welcome") from None
        finally:
            timer.cancel()
        if first.WhichOneof("message") != "welcome":
            raise SessionLostError("the scheduler's first message is no welcome")
        self.welcome = first.welcome
        if self.welcome.epoch <= self.link.last_epoch:
            raise SessionLostError(f"epoch {self.welcome.epoch} is not larger than {self.link.last_epoch}")
        self.link.last_epoch = self.welcome.epoch
        log.info("joined", scheduler=self.link.address, epoch=self.welcome.epoch)
        for target in (lambda: self._read(responses), self._beat):
            threading.Thread(target=target, daemon=True).start()

    def serve(self) -> NoReturn:
        """Executes plans until the stream ends, which raises SessionLostError."""
        gate: PlanGate[LaunchedStep] = PlanGate(self.welcome.epoch)
        while True:
            received = self.inbox.get()
            if isinstance(received, SessionLostError):
                raise received
            message, came_ns = received
            if self.ended.is_set():
                continue  # nobody waits for its result; the end is behind it in the inbox
            try:
                verdict = gate.judge(message)
                if verdict is Verdict.STALE:
                    log.warning("stale plan ignored", epoch=message.epoch, step=message.step)
                    continue
                if verdict is Verdict.EXECUTE:
                    if self.link.traces is not None:
                        self.link.traces.launching(message)
                    gate.record(message, self.executor.launch(message, time.perf_counter_ns() - came_ns))
            except Exception as error:  # whatever it was, rows and KV blocks may be half changed
                self.link.on_failure(error)
            assert gate.last_answer is not None
            fault_point("worker.step.before_send")
            self._send(gate.last_answer)

    def close(self) -> None:
        """Ends the stream and its threads."""
        self.ended.set()
        if self.call is not None:
            self.call.cancel()  # type: ignore[no-untyped-call]
        self.channel.close()
        # Wakes gRPC's thread in `_outgoing`. In a full outbox it finds something else, and that the session has ended.
        with contextlib.suppress(queue.Full):
            self.outbox.put_nowait(None)

    def _send(self, message: LaunchedStep) -> None:
        try:
            self.outbox.put_nowait(message)
        except queue.Full:
            raise SessionLostError("the scheduler does not read results") from None

    def _outgoing(self) -> Iterator[worker_pb2.JoinRequest]:
        """What gRPC sends, pulled by its own thread: results are waited for and encoded off the executing thread."""
        while (message := self.outbox.get()) is not None and not self.ended.is_set():
            if not isinstance(message, worker_pb2.JoinRequest):
                try:
                    result = message.result()
                    message = worker_pb2.JoinRequest(step_result=result_to_wire(result))
                    log.debug("step done", epoch=result.epoch, step=result.step)
                    if self.link.traces is not None:
                        self.link.traces.finished(result)
                except Exception as error:
                    self.link.on_failure(error)
            yield message

    def _read(self, responses: Iterator[worker_pb2.JoinResponse]) -> None:
        """Moves plans to the inbox until the stream ends, and says how it ended."""
        end = SessionLostError("the scheduler closed the stream")
        try:
            for response in responses:
                if response.WhichOneof("message") != "step_plan":
                    end = SessionLostError("the scheduler sent something that is no plan")
                    break
                self.inbox.put_nowait((plan_from_wire(response.step_plan), time.perf_counter_ns()))
        except grpc.RpcError as error:
            end = SessionLostError(f"{error.code().name}: {error.details()}")
        except queue.Full:
            end = SessionLostError("the scheduler sent more plans than it may")
        except Exception as error:
            self.link.on_failure(error)
        self.ended.set()
        self.inbox.put(end)

    def _beat(self) -> None:
        """Sends heartbeats at the welcome's interval."""
        progress = self.executor.progress
        interval_s = max(0.01, self.welcome.heartbeat_interval_ns / 1e9)
        while not self.ended.wait(interval_s):
            beat = worker_pb2.Heartbeat(epoch=self.welcome.epoch, last_step=progress.last_step, progress=progress.count)
            try:
                self.outbox.put_nowait(worker_pb2.JoinRequest(heartbeat=beat))
            except queue.Full:
                continue  # results are waiting to be sent; they are as good a sign of life
