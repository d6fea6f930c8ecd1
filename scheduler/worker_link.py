"""WorkerService.Join: how a worker comes, is watched, and is lost.

A link lives as long as its stream. When it ends, for whatever reason, the engine takes the worker's sequences back and
clients notice nothing. A worker that comes back is a new one, with a larger epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from pagewire.runtime import logs
from pagewire.runtime.fault_points import async_fault_point
from pagewire.v1 import worker_pb2
from scheduler.duplex import Refusal, answer, converse, parse, read_first

if TYPE_CHECKING:
    from scheduler.engine import Engine

PROTOCOL_VERSION = 1
MAX_PLANS_IN_FLIGHT = 2
HEARTBEATS_PER_TIMEOUT = 5
HELLO_TIMEOUT_S = 10.0
MAX_WORKER_ID = 128
# Above these a capacity is a mistake, and the core's tables would be sized by it.
MAX_BLOCKS = 1 << 28
MAX_SLOTS = 1 << 16
MAX_STEP_TOKENS = 1 << 22
MAX_MODEL_LEN = 1 << 24

log = logs.get_logger("scheduler.worker_link")


class WorkerLink:
    """One worker's stream, as the engine sees it."""

    def __init__(self, hello: worker_pb2.WorkerHello, epoch: int, clock: Callable[[], int]) -> None:
        """`clock` gives nanoseconds of a monotonic clock."""
        self.hello = hello
        self.worker_id = hello.worker_id
        self.epoch = epoch
        self.last_step = 0
        """Last step whose result has arrived."""
        self.heard_at = clock()
        """When the last message arrived."""
        self.progress_at = self.heard_at
        """When the last sign of work arrived: a result, or a heartbeat whose progress has grown."""
        self.result_at = 0
        """When the last result arrived; 0: none yet."""
        self.sent: dict[int, int] = {}
        """When each unanswered plan was handed to gRPC, by step; at most MAX_PLANS_IN_FLIGHT."""
        self.busy_ns = 0
        """What its steps have taken, as it says."""
        self.idle_ns = 0
        """How long its device has waited for plans, as it says."""
        self.stalled = False
        """Owes a result and has made no progress for a while: not ready, but still waited for."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to end the stream from this side."""
        self._progress = 0
        self._clock = clock
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(MAX_PLANS_IN_FLIGHT + 1)

    def send(self, raw: bytes) -> None:
        """Hands a message to the writer. The core's limit on plans in flight bounds the queue; overflow is a defect."""
        self._outbox.put_nowait(raw)

    def plan_sent(self, step: int) -> None:
        """Notes that a plan is on its way."""
        now = self._clock()
        if not self.sent:
            self.progress_at = now
        self.sent[step] = now

    def heard(self) -> None:
        """Notes that a message has arrived."""
        self.heard_at = self._clock()

    def result_arrived(self, step: int) -> int | None:
        """Notes a result. Returns when its plan was sent, or None if no such plan is unanswered."""
        self.progress_at = self.heard_at
        self.last_step = max(self.last_step, step)
        return self.sent.pop(step, None)

    def heartbeat(self, beat: worker_pb2.Heartbeat) -> None:
        """Notes how far the worker is. A heartbeat of another epoch says nothing."""
        if beat.epoch == self.epoch and beat.progress > self._progress:
            self._progress = beat.progress
            self.progress_at = self.heard_at

    def end(self, refusal: Refusal) -> None:
        """Ends the stream from this side."""
        if not self.ended.done():
            self.ended.set_exception(refusal)
            self.ended.exception()  # the stream may have ended by itself meanwhile; then nobody else looks

    def outgoing(self) -> Awaitable[bytes]:
        """The next message to write."""
        return self._outbox.get()


class Watchdog:
    """Declares a worker lost when it falls silent or stops working. Sleeps until the earliest moment for that."""

    def __init__(self, link: WorkerLink, engine: Engine) -> None:
        settings = engine.settings
        self._link = link
        self._engine = engine
        self._silence_ns = int(settings.heartbeat_timeout_s * 1e9)
        self._step_ns = int(settings.step_timeout_s * 1e9)
        self._stall_ns = int(settings.stall_s * 1e9)
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0
        self._arm(min(self._silence_ns, self._step_ns, self._stall_ns))

    def stop(self) -> None:
        """Ends the watch."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, wait_ns: int) -> None:
        self._due_at = self._engine.clock() + wait_ns
        self._timer = asyncio.get_running_loop().call_later(wait_ns / 1e9, self._look)

    def _look(self) -> None:
        link, now = self._link, self._engine.clock()
        grace = self._silence_ns // HEARTBEATS_PER_TIMEOUT
        if now - self._due_at > grace:
            # This process slept (stopped, swapped out, a long pause): what the worker sent meanwhile is still unread.
            self._arm(grace)
            return
        silent_for = now - link.heard_at
        if silent_for >= self._silence_ns:
            self._lose("HEARTBEAT_LOST", f"nothing heard for {silent_for / 1e9:.1f} s")
            return
        wait = self._silence_ns - silent_for
        idle_for = now - link.progress_at if link.sent else 0
        if idle_for >= self._step_ns:
            self._lose("STEP_TIMEOUT", f"a step made no progress for {idle_for / 1e9:.1f} s")
            return
        stalled = idle_for >= self._stall_ns
        if stalled != link.stalled:
            link.stalled = stalled
            self._engine.state_changed()
        wait = min(wait, self._step_ns - idle_for)
        if not stalled:
            wait = min(wait, self._stall_ns - idle_for)
        self._arm(max(wait, 1_000_000))

    def _lose(self, reason: str, why: str) -> None:
        self._timer = None
        self._link.end(Refusal(grpc.StatusCode.UNAVAILABLE, f"declared lost: {why}", reason=reason))
        self._engine.leave(self._link, f"{reason}: {why}")


class WorkerServicer:
    """Serves Join."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service for `server.add_generic_rpc_handlers`; messages stay bytes."""
        return grpc.method_handlers_generic_handler(
            "pagewire.v1.WorkerService", {"Join": grpc.stream_stream_rpc_method_handler(self._join)}
        )

    async def _join(self, _requests: Any, context: Any) -> None:
        await answer(context, self._work(context))

    async def _work(self, context: Any) -> None:
        engine = self._engine
        hello = self._hello(await read_first(context, HELLO_TIMEOUT_S))
        check_hello(hello)
        engine.check_pool(hello)
        link = WorkerLink(hello, engine.next_epoch(), engine.clock)
        interval_ns = int(engine.settings.heartbeat_timeout_s * 1e9) // HEARTBEATS_PER_TIMEOUT
        welcome = worker_pb2.WorkerWelcome(
            epoch=link.epoch, max_plans_in_flight=MAX_PLANS_IN_FLIGHT, heartbeat_interval_ns=interval_ns
        )
        link.send(worker_pb2.JoinResponse(welcome=welcome).SerializeToString())
        engine.join(link)
        watchdog = Watchdog(link, engine)
        try:
            await async_fault_point("scheduler.after_join")
            await converse(context, lambda raw: self._receive(link, raw), link.outgoing, link.ended)
        finally:
            watchdog.stop()
            engine.leave(link, "its stream ended")

    def _hello(self, raw: bytes) -> worker_pb2.WorkerHello:
        first = parse(worker_pb2.JoinRequest, raw)
        if first.WhichOneof("message") != "hello":
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the hello", reason="HELLO_MISSING"
            )
        return first.hello

    def _receive(self, link: WorkerLink, raw: bytes) -> None:
        message = parse(worker_pb2.JoinRequest, raw)
        link.heard()
        kind = message.WhichOneof("message")
        if kind == "step_result":
            self._engine.result(link, message.step_result)
        elif kind == "heartbeat":
            link.heartbeat(message.heartbeat)
        elif kind == "hello":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "hello comes once", reason="HELLO_REPEATED")
        if link.stalled and link.progress_at == link.heard_at:
            link.stalled = False
            self._engine.state_changed()


def check_hello(hello: worker_pb2.WorkerHello) -> None:
    """Refuses (FAILED_PRECONDITION) a worker of another protocol or of a size that cannot be; names both values."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise _refuse(
            "PROTOCOL_VERSION",
            f"the worker speaks protocol version {hello.protocol_version}, this scheduler {PROTOCOL_VERSION}: "
            "install the same Pagewire on both",
            worker=str(hello.protocol_version),
            scheduler=str(PROTOCOL_VERSION),
        )
    if hello.world_size > 1:
        raise _refuse(
            "WORLD_SIZE",
            f"the worker is rank {hello.rank} of {hello.world_size}; groups of several ranks are not supported yet",
            worker=str(hello.world_size),
            scheduler="1",
        )
    if not 1 <= len(hello.worker_id) <= MAX_WORKER_ID or not hello.worker_id.isprintable():
        raise _refuse("WORKER_ID", f"worker_id must be 1 to {MAX_WORKER_ID} printable characters")
    capacity, model = hello.capacity, hello.model
    sizes = [
        ("block_size", capacity.block_size, 1, 256),
        ("num_blocks", capacity.num_blocks, 1, MAX_BLOCKS),
        ("host_blocks", capacity.host_blocks, 0, MAX_BLOCKS),
        ("block_bytes", capacity.block_bytes, 1, 1 << 40),
        ("max_slots", capacity.max_slots, 1, MAX_SLOTS),
        ("max_step_tokens", capacity.max_step_tokens, 1, MAX_STEP_TOKENS),
        ("vocab_size", model.vocab_size, 1, 1 << 31),
        ("max_model_len", model.max_model_len, 2, MAX_MODEL_LEN),
    ]
    for name, value, low, high in sizes:
        if not low <= value <= high:
            raise _refuse("CAPACITY", f"{name} is {value}, expected {low} to {high}", worker=str(value))
    if capacity.block_size & (capacity.block_size - 1):
        raise _refuse("CAPACITY", f"block_size is {capacity.block_size}, expected a power of two")
    if any(token_id >= model.vocab_size for token_id in model.eos_token_ids):
        raise _refuse("CAPACITY", f"an end-of-sequence id is not below the vocabulary size {model.vocab_size}")


def _refuse(reason: str, message: str, **metadata: str) -> Refusal:
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, message, reason=reason, metadata=metadata)
