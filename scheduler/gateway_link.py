"""SchedulerService: a gateway's session, and ending a request by name.

A session gets one SessionStep per step with everything that is new for its streams. When the gateway's credit is used
up, or gRPC is still busy with the message before, later steps are merged into the one that waits.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from pagewire.runtime import logs
from pagewire.runtime.fault_points import async_fault_point
from pagewire.v1 import inference_pb2, scheduler_pb2
from scheduler.duplex import Refusal, answer, converse, parse, read_first
from scheduler.sequence import SequenceGroup

if TYPE_CHECKING:
    from scheduler.engine import Engine

PROTOCOL_VERSION = 1
HELLO_TIMEOUT_S = 10.0
MAX_CREDIT = 1 << 16
MAX_GATEWAY_ID = 128
MAX_STREAM = (1 << 32) - 1
EVENT_TOKENS = 16
"""An event that waits for credit counts as that many tokens."""

log = logs.get_logger("scheduler.gateway_link")


@dataclass(eq=False, slots=True)
class Listener:
    """One session's interest in one request: its sequence i is the session's stream `stream + i`."""

    session: Session
    group: SequenceGroup
    stream: int


class Session:
    """One gateway's stream, as the engine sees it: who listens to what, and what waits to be sent."""

    def __init__(self, session_id: str, hello: scheduler_pb2.GatewayHello, backlog_tokens: int) -> None:
        """`backlog_tokens` bounds what may wait for credit."""
        self.session_id = session_id
        self.gateway_id = hello.gateway_id
        self.credit = min(hello.credit, MAX_CREDIT)
        """Step messages that may still be sent."""
        self.listeners: dict[int, Listener] = {}
        """By the first of their stream numbers."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to end the stream from this side."""
        self.streams: list[int] = []
        """Of the step in the making: one stream number per token."""
        self.token_ids: list[int] = []
        """Parallel to streams."""
        self.logprob_rows: list[int] = []
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.attached: list[scheduler_pb2.StreamAttached] = []
        self.admitted: list[scheduler_pb2.StreamAdmitted] = []
        self.finished: list[scheduler_pb2.StreamFinished] = []
        self.failed: list[scheduler_pb2.StreamFailed] = []
        self._sequence_streams: dict[int, Listener] = {}
        self._snapshot_tokens = 0
        self._backlog_tokens = backlog_tokens
        self._news = asyncio.Event()
        self._welcome: bytes | None = None
        self._model_state: scheduler_pb2.ModelState | None = None

    # Who listens

    def listen(self, group: SequenceGroup, stream: int) -> Listener:
        """Adds a listener. Raises Refusal when its stream numbers are taken: the gateway has lost count."""
        numbers = range(stream, stream + group.request.n)
        self.check_free(stream, group.request.n)
        listener = Listener(self, group, stream)
        self.listeners[stream] = listener
        self._sequence_streams.update(dict.fromkeys(numbers, listener))
        return listener

    def check_free(self, stream: int, count: int) -> None:
        """Raises Refusal unless `count` stream numbers from `stream` on are free."""
        numbers = range(stream, stream + count)
        if numbers.stop > MAX_STREAM or not self._sequence_streams.keys().isdisjoint(numbers):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, f"stream {stream} is in use or too large", reason="STREAM_IN_USE"
            )

    def forget(self, listener: Listener) -> None:
        """Removes a listener; its numbers count as unknown from now on."""
        del self.listeners[listener.stream]
        for number in range(listener.stream, listener.stream + listener.group.request.n):
            del self._sequence_streams[number]

    def sequence(self, stream: int) -> tuple[SequenceGroup, int] | None:
        """The group and the index that a sequence's own stream number stands for; None: nobody's."""
        listener = self._sequence_streams.get(stream)
        return None if listener is None else (listener.group, stream - listener.stream)

    # What waits

    def welcome(self) -> None:
        """Makes the first message."""
        message = scheduler_pb2.SessionResponse(welcome=scheduler_pb2.SessionWelcome(session_id=self.session_id))
        self._welcome = message.SerializeToString()
        self._news.set()

    def tell(self, state: scheduler_pb2.ModelState) -> None:
        """Has the newest model state sent; it needs no credit, and one that was not sent yet is replaced."""
        self._model_state = state
        self._news.set()

    def snapshot(self, attached: scheduler_pb2.StreamAttached) -> None:
        """Has everything so far of a request sent."""
        self.attached.append(attached)
        self._snapshot_tokens += len(attached.request.token_ids) + sum(len(s.token_ids) for s in attached.sequences)
        self.flush()

    def flush(self) -> None:
        """Wakes the writer if there is something to send. Ends the session when too much waits for credit."""
        events = len(self.finished) + len(self.failed) + len(self.admitted)
        if len(self.streams) + self._snapshot_tokens + EVENT_TOKENS * events > self._backlog_tokens:
            self.end(
                Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"more than {self._backlog_tokens} tokens waited for this session's credit",
                    reason="SLOW_CONSUMER",
                )
            )
        elif self.credit and self._has_step():
            self._news.set()

    def add_credit(self, steps: int) -> None:
        """Allows further step messages, up to a bound."""
        self.credit = min(self.credit + steps, MAX_CREDIT)
        self.flush()

    def end(self, refusal: Refusal) -> None:
        """Ends the stream from this side."""
        if not self.ended.done():
            self.ended.set_exception(refusal)
            self.ended.exception()  # the stream may have ended by itself meanwhile; then nobody else looks

    def _has_step(self) -> bool:
        return bool(self.streams or self.attached or self.admitted or self.finished or self.failed)

    async def outgoing(self) -> bytes:
        """The next message to write."""
        while True:
            if self._welcome is not None:
                raw, self._welcome = self._welcome, None
                return raw
            if self._model_state is not None:
                state, self._model_state = self._model_state, None
                return scheduler_pb2.SessionResponse(model_state=state).SerializeToString()
            if self.credit and self._has_step():
                self.credit -= 1
                return self._take_step()
            self._news.clear()
            await self._news.wait()

    def _take_step(self) -> bytes:
        response = scheduler_pb2.SessionResponse()
        step = response.step
        step.SetInParent()
        if self.streams:
            step.streams.extend(self.streams)
            step.token_ids.extend(self.token_ids)
            self.streams, self.token_ids = [], []
        if self.logprob_rows:
            step.logprob_rows.extend(self.logprob_rows)
            step.logprobs.extend(self.logprobs)
            self.logprob_rows, self.logprobs = [], []
        if self.attached:
            step.attached.extend(self.attached)
            self.attached = []
            self._snapshot_tokens = 0
        if self.admitted:
            step.admitted.extend(self.admitted)
            self.admitted = []
        if self.finished:
            step.finished.extend(self.finished)
            self.finished = []
        if self.failed:
            step.failed.extend(self.failed)
            self.failed = []
        return response.SerializeToString()


class SchedulerServicer:
    """Serves Session, Abort and ParkLive."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service for `server.add_generic_rpc_handlers`; messages stay bytes."""
        return grpc.method_handlers_generic_handler(
            "pagewire.v1.SchedulerService",
            {
                "Session": grpc.stream_stream_rpc_method_handler(self._session),
                "Abort": grpc.unary_unary_rpc_method_handler(self._abort),
                "ParkLive": grpc.unary_unary_rpc_method_handler(self._park),
            },
        )

    async def _abort(self, raw: bytes, context: Any) -> bytes | None:
        async def abort() -> bytes:
            request = parse(scheduler_pb2.AbortRequest, raw)
            found = self._engine.abort(request.request_id)
            return scheduler_pb2.AbortResponse(found=found).SerializeToString()

        return await answer(context, abort())

    async def _park(self, raw: bytes, context: Any) -> bytes | None:
        async def park() -> bytes:
            request = parse(scheduler_pb2.ParkLiveRequest, raw)
            return self._engine.park(request.request_id, request.ttl_seconds).SerializeToString()

        return await answer(context, park())

    async def _session(self, _requests: Any, context: Any) -> None:
        await answer(context, self._converse(context))

    async def _converse(self, context: Any) -> None:
        engine = self._engine
        hello = self._hello(await read_first(context, HELLO_TIMEOUT_S))
        session = Session(f"session-{next(self._numbers)}", hello, engine.settings.session_backlog_tokens)
        session.welcome()
        engine.open(session)
        try:
            await async_fault_point("scheduler.after_session")
            await converse(context, lambda raw: self._receive(session, raw), session.outgoing, session.ended)
        finally:
            engine.close(session)

    def _hello(self, raw: bytes) -> scheduler_pb2.GatewayHello:
        first = parse(scheduler_pb2.SessionRequest, raw)
        if first.WhichOneof("message") != "hello":
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the hello", reason="HELLO_MISSING"
            )
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the gateway speaks protocol version {hello.protocol_version}, this scheduler {PROTOCOL_VERSION}: "
                "install the same Pagewire on both",
                reason="PROTOCOL_VERSION",
                metadata={"gateway": str(hello.protocol_version), "scheduler": str(PROTOCOL_VERSION)},
            )
        if not 1 <= hello.credit <= MAX_CREDIT:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, f"credit must be 1 to {MAX_CREDIT}", reason="CREDIT_OUT_OF_RANGE"
            )
        if len(hello.gateway_id) > MAX_GATEWAY_ID:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "gateway_id is too long", reason="GATEWAY_ID")
        return hello

    def _receive(self, session: Session, raw: bytes) -> None:
        message = parse(scheduler_pb2.SessionRequest, raw)
        kind = message.WhichOneof("message")
        engine = self._engine
        if kind == "submit":
            engine.submit(session, message.submit)
        elif kind == "credit":
            session.add_credit(message.credit.steps)
        elif kind == "attach":
            engine.attach(session, message.attach.stream, message.attach.request_id)
        elif kind == "detach":
            engine.detach(session, message.detach.stream)
        elif kind == "stop":
            engine.stop(session, message.stop)
        elif kind == "resume":
            engine.resume(session, message.resume)
        elif kind == "hello":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "hello comes once", reason="HELLO_REPEATED")
