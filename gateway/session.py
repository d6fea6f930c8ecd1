"""The one session with the scheduler: every request of this gateway shares it.

Up go submits, attaches, detaches, stops and credit; down comes one message per step, which is fanned out here. When the
session breaks it is opened again with backoff, and every live request attaches again by its id: the scheduler answers
with everything so far, and a listener takes what it has not seen. Clients notice a pause, not a gap.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc.aio

from gateway.ceilings import MAX_N
from gateway.errors import Reason, RequestError, unavailable
from pagewire.runtime.channel import client_options
from pagewire.runtime.logs import get_logger
from pagewire.runtime.rich_status import decode
from pagewire.v1 import inference_pb2, scheduler_pb2, scheduler_pb2_grpc

PROTOCOL_VERSION = 1
# Step messages that may be under way. Two would do for a quick gateway; 64 ride out a pause of a second at 15 ms steps.
CREDIT = 64
WELCOME_TIMEOUT_S = 10.0
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0
# Attempts in vain, some seconds long, after which an operator should know.
FAILURES_TO_WARN = 8
ABORT_TIMEOUT_S = 5.0
LAST_STREAM = (1 << 32) - 1
# Tokens of attach snapshots that are taken before other work gets its turn on the event loop.
SNAPSHOT_SLICE = 2048

log = get_logger(__name__)


class Listener(Protocol):
    """What the session tells one request. All calls come from the event loop; `wake` follows each group of them."""

    request_id: str
    acknowledged: bool
    """The scheduler has said something about the request, so it surely knows it."""

    @property
    def n(self) -> int:
        """Sequences; 0 until an attach has been answered."""
        ...

    @property
    def done(self) -> bool:
        """Nothing more is expected."""
        ...

    def to_submit(self) -> scheduler_pb2.Submit | None:
        """The message that starts the request, with the time left; None for a request that somebody else started."""
        ...

    def to_resume(self) -> scheduler_pb2.ContinueStream | None:
        """The message that takes a parked request up again, with the time left; None for any other request."""
        ...

    def attached(self, answer: scheduler_pb2.StreamAttached) -> None: ...

    def admitted(self, prompt: inference_pb2.PromptInfo) -> None: ...

    def token(self, index: int, token_id: int, logprobs: inference_pb2.TokenLogprobs | None) -> None: ...

    def finished(self, index: int, finish: inference_pb2.Finish) -> None: ...

    def failed(self, error: RequestError) -> None: ...

    def wake(self) -> None: ...


@dataclass(eq=False)
class _Entry:
    """One listener and its stream numbers in the present session."""

    listener: Listener
    attaches: bool
    """Its streams began, or will begin, with AttachStream."""
    first: int = 0
    """First of its stream numbers; 0: none in this session."""
    submitted: bool = False
    """Submit has been queued in some session, so the scheduler may know the request."""
    looked_for: bool = False
    """After a break: this session asks by attach whether the scheduler knows the request."""


class SchedulerLink:
    """Owns the session, the stream numbers and the scheduler's channel."""

    def __init__(self, address: str, gateway_id: str, reattach_timeout_s: float) -> None:
        """
        Args:
            address: the scheduler's.
            gateway_id: name of this process in the scheduler's log.
            reattach_timeout_s: seconds that live requests wait for a lost scheduler.
        """
        self.channel = grpc.aio.insecure_channel(address, options=client_options(internal=True))
        self._stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(self.channel)
        self._address = address
        self._gateway_id = gateway_id
        self._reattach_timeout_s = reattach_timeout_s
        self._entries: dict[Listener, _Entry] = {}
        self._streams: dict[int, tuple[_Entry, int]] = {}
        self._next_stream = 1
        self._outgoing: deque[scheduler_pb2.SessionRequest] = deque()
        self._outgoing_ready = asyncio.Event()
        self._give_up: asyncio.TimerHandle | None = None
        self._state_listeners: list[Callable[[], None]] = []
        self._unacknowledged_steps = 0
        self.connected = False
        """A session is welcomed."""
        self.state: scheduler_pb2.ModelState | None = None
        """What the scheduler said last; kept while it is away, because a model's limits rarely change."""

    @property
    def ready(self) -> bool:
        """New requests can be run now."""
        return self.connected and self.state is not None and self.state.ready and not self.state.draining

    @property
    def live_requests(self) -> int:
        """Requests that are listened to."""
        return len(self._entries)

    def is_live(self, request_id: str) -> bool:
        """Whether this gateway listens to a request of that name."""
        return any(listener.request_id == request_id for listener in self._entries)

    def on_state(self, callback: Callable[[], None]) -> None:
        """Calls `callback` at every change of `connected` or `state`."""
        self._state_listeners.append(callback)

    # What requests ask for.

    def submit(self, listener: Listener) -> None:
        """Starts the listener's request."""
        self._begin(_Entry(listener, attaches=False))

    def attach(self, listener: Listener) -> None:
        """Listens to a request that exists."""
        self._begin(_Entry(listener, attaches=True))

    def resume(self, listener: Listener) -> None:
        """Takes the listener's parked request up again."""
        self._begin(_Entry(listener, attaches=False))

    def detach(self, listener: Listener) -> None:
        """Stops listening. The scheduler cancels the request if nobody else listens and it is not detached."""
        entry = self._entries.pop(listener, None)
        if entry is None:
            return
        if entry.first:
            self._send(detach=scheduler_pb2.DetachStream(stream=entry.first))
        self._forget_streams(entry)

    def stop(self, listener: Listener, index: int, num_tokens: int, matched_stop: str) -> None:
        """Ends one sequence after `num_tokens` output tokens. Lost with the session; said again after attaching."""
        entry = self._entries.get(listener)
        if entry is not None and entry.first:
            stop = scheduler_pb2.StopSequence(
                stream=entry.first + index,
                num_tokens=num_tokens,
                matched_stop=matched_stop,
                request_id=listener.request_id,
                index=index,
            )
            self._send(stop=stop)

    async def abort(self, request_id: str) -> bool:
        """Ends a request by name. Returns whether there was one. Raises RequestError without a scheduler."""
        request = scheduler_pb2.AbortRequest(request_id=request_id)
        try:
            answer = await self._stub.Abort(request, timeout=ABORT_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            raise unavailable(Reason.NO_SCHEDULER, "the scheduler cannot be reached") from None
        return bool(answer.found)

    async def park(self, request_id: str, ttl_seconds: int) -> scheduler_pb2.ParkLiveResponse:
        """Parks a request by name. Raises RequestError if that cannot be, or without a scheduler."""
        request = scheduler_pb2.ParkLiveRequest(request_id=request_id, ttl_seconds=ttl_seconds)
        try:
            answer: scheduler_pb2.ParkLiveResponse = await self._stub.ParkLive(request, timeout=ABORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            details = decode(error)
            if not details.reason:
                raise unavailable(Reason.NO_SCHEDULER, "the scheduler cannot be reached") from None
            raise RequestError(details.code, details.reason, details.message) from None
        return answer

    # The session.

    async def run(self) -> None:
        """Keeps a session open until cancelled."""
        backoff = FIRST_BACKOFF_S
        failures = 0
        try:
            while True:
                try:
                    await self._session()
                except grpc.aio.AioRpcError as error:
                    code = error.code().name
                except (TimeoutError, EOFError):
                    code = "no answer"
                if self.connected:
                    log.warning("session lost", code=code, live_requests=len(self._entries))
                    self._disconnected()
                    backoff, failures = FIRST_BACKOFF_S, 0
                else:
                    failures += 1
                    say = log.warning if failures == FAILURES_TO_WARN else log.debug
                    say("the scheduler does not answer: is it running there?", scheduler=self._address, code=code)
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF_S)
        finally:
            if self._give_up is not None:
                self._give_up.cancel()
            await self.channel.close(None)

    async def _session(self) -> NoReturn:
        """One session, from hello to its end, which is an exception."""
        call = self._stub.Session()
        writer: asyncio.Task[None] | None = None
        try:
            hello = scheduler_pb2.GatewayHello(
                protocol_version=PROTOCOL_VERSION, gateway_id=self._gateway_id, credit=CREDIT
            )
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(scheduler_pb2.SessionRequest(hello=hello))
                first = await call.read()
            if first is EOF or first.WhichOneof("message") != "welcome":
                raise EOFError
            self._connected(first.welcome.session_id)
            writer = asyncio.create_task(self._write(call))
            while (message := await call.read()) is not EOF:
                kind = message.WhichOneof("message")
                if kind == "step":
                    await self._apply(message.step)
                elif kind == "model_state":
                    self.state = message.model_state
                    self._state_changed()
            raise EOFError
        finally:
            if writer is not None:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await writer
            call.cancel()

    async def _write(self, call: Any) -> None:
        """Writes what is queued, in order. The queue is bounded by the number of live requests."""
        while True:
            while self._outgoing:
                await call.write(self._outgoing.popleft())
            self._outgoing_ready.clear()
            await self._outgoing_ready.wait()

    def _connected(self, session_id: str) -> None:
        log.info("session opened", session_id=session_id, live_requests=len(self._entries))
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None
        self._outgoing.clear()
        self._streams.clear()
        self._next_stream = 1
        self._unacknowledged_steps = 0
        self.connected = True
        for entry in list(self._entries.values()):
            entry.first = 0
            self._open_streams(entry)
        self._state_changed()

    def _disconnected(self) -> None:
        self.connected = False
        loop = asyncio.get_running_loop()
        self._give_up = loop.call_later(self._reattach_timeout_s, self._mourn_scheduler)
        self._state_changed()

    def say_farewell(self) -> None:
        """Ends every stream because this gateway stops. The requests go on for a while, for whoever attaches."""
        self._fail_all(unavailable(Reason.DRAINING, "this gateway is stopping; resume with Attach"))

    def _mourn_scheduler(self) -> None:
        message = "the scheduler was lost and has not come back; resume with Attach"
        self._fail_all(unavailable(Reason.NO_SCHEDULER, message))

    def _fail_all(self, error: RequestError) -> None:
        for listener in list(self._entries):
            listener.failed(error)
            listener.wake()
        self._entries.clear()

    def _state_changed(self) -> None:
        for callback in self._state_listeners:
            callback()

    def _send(self, **message: Any) -> None:
        if self.connected:
            self._outgoing.append(scheduler_pb2.SessionRequest(**message))
            self._outgoing_ready.set()

    # Stream numbers.

    def _begin(self, entry: _Entry) -> None:
        self._entries[entry.listener] = entry
        if self.connected:
            self._open_streams(entry)

    def _open_streams(self, entry: _Entry) -> None:
        """Gives the entry stream numbers of this session and says what it wants."""
        listener = entry.listener
        begins = not (entry.attaches or entry.submitted or listener.acknowledged)
        submit = listener.to_submit() if begins else None
        resume = listener.to_resume() if begins else None
        # An attach leaves room for the most sequences there can be.
        span = listener.n if submit is not None else MAX_N
        if self._next_stream + span > LAST_STREAM:
            listener.failed(unavailable(Reason.NO_SCHEDULER, "the session has run out of numbers; try again"))
            listener.wake()
            self._entries.pop(listener, None)
            return
        entry.first = self._next_stream
        self._next_stream += span
        if submit is not None:
            submit.stream = entry.first
            entry.submitted, entry.looked_for = True, False
            self._send(submit=submit)
        elif resume is not None:
            resume.stream = entry.first
            entry.submitted = True
            self._send(resume=resume)
        elif entry.submitted and not listener.acknowledged and listener.to_resume() is not None:
            # Perhaps it went on, and nobody here knows from where.
            message = "the session broke while the request was being continued; Attach to it, or continue it again"
            listener.failed(unavailable(Reason.NO_SCHEDULER, message))
            listener.wake()
            self._entries.pop(listener, None)
            return
        else:
            entry.looked_for = entry.submitted
            self._send(attach=scheduler_pb2.AttachStream(stream=entry.first, request_id=listener.request_id))
        for index in range(max(1, listener.n)):
            self._streams[entry.first + index] = (entry, index)

    def _forget_streams(self, entry: _Entry) -> None:
        for index in range(max(1, entry.listener.n)):
            self._streams.pop(entry.first + index, None)

    # Steps.

    async def _apply(self, step: scheduler_pb2.SessionStep) -> None:
        """Fans one step message out, in the order that scheduler.proto lays down."""
        touched: dict[Listener, _Entry] = {}
        taken = 0
        for answer in step.attached:
            entry = self._apply_attached(answer)
            if entry is not None:
                touched[entry.listener] = entry
            taken += sum(len(sequence.token_ids) for sequence in answer.sequences)
            if taken > SNAPSHOT_SLICE:
                taken = 0
                await asyncio.sleep(0)
        for admitted in step.admitted:
            if (found := self._streams.get(admitted.stream)) is not None:
                entry = found[0]
                entry.listener.acknowledged = True
                entry.listener.admitted(admitted.prompt)
                touched[entry.listener] = entry
        self._apply_tokens(step, touched)
        for finished in step.finished:
            if (found := self._streams.get(finished.stream)) is not None:
                entry, index = found
                entry.listener.finished(index, finished.finish)
                touched[entry.listener] = entry
        for failed in step.failed:
            if (found := self._streams.get(failed.stream)) is not None:
                entry = found[0]
                if self._submit_again(entry, failed):
                    continue
                entry.listener.failed(_as_error(failed))
                touched[entry.listener] = entry
        for listener, entry in touched.items():
            listener.wake()
            if listener.done and self._entries.pop(listener, None) is not None:
                self._forget_streams(entry)
        self._acknowledge_step()

    def _apply_attached(self, answer: scheduler_pb2.StreamAttached) -> _Entry | None:
        found = self._streams.get(answer.stream)
        if found is None:
            return None
        entry = found[0]
        entry.listener.attached(answer)
        entry.listener.acknowledged = True
        if entry.listener in self._entries:  # it may have refused and detached
            for index in range(entry.listener.n):
                self._streams[entry.first + index] = (entry, index)
        return entry

    def _apply_tokens(self, step: scheduler_pb2.SessionStep, touched: dict[Listener, _Entry]) -> None:
        logprobs = dict(zip(step.logprob_rows, step.logprobs, strict=False)) if step.logprob_rows else None
        streams = self._streams
        for row, (stream, token_id) in enumerate(zip(step.streams, step.token_ids, strict=False)):
            found = streams.get(stream)
            if found is None:
                continue  # detached a moment ago
            entry, index = found
            listener = entry.listener
            listener.acknowledged = True
            listener.token(index, token_id, None if logprobs is None else logprobs.get(row))
            touched[listener] = entry

    def _submit_again(self, entry: _Entry, failed: scheduler_pb2.StreamFailed) -> bool:
        """After a break, a request that the scheduler never heard of is submitted once more; it cannot run twice."""
        listener = entry.listener
        if failed.code != grpc.StatusCode.NOT_FOUND.value[0] or not entry.looked_for or listener.acknowledged:
            return False
        self._forget_streams(entry)
        entry.submitted = False
        self._open_streams(entry)
        return True

    def _acknowledge_step(self) -> None:
        self._unacknowledged_steps += 1
        if self._unacknowledged_steps >= CREDIT // 2:
            self._send(credit=scheduler_pb2.SessionCredit(steps=self._unacknowledged_steps))
            self._unacknowledged_steps = 0


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _as_error(failed: scheduler_pb2.StreamFailed) -> RequestError:
    code = _CODES.get(failed.code, grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.OK:
        code = grpc.StatusCode.INTERNAL
    reason = failed.reason or Reason.GENERATION_FAILED
    return RequestError(code, reason, failed.message, retry_after_ns=failed.retry_after_ns)
