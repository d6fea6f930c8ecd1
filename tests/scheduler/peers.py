"""A scripted worker and a scripted gateway that speak the protocols through plain generated stubs.

The worker keeps the persistent batch by the letter of worker.proto and "samples" with a function of the whole token
history, so that a stream shows whether the scheduler ever lost, repeated or mixed up a token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import grpc.aio

from pagewire.runtime.channel import client_options
from pagewire.v1 import inference_pb2, scheduler_pb2, scheduler_pb2_grpc, worker_pb2, worker_pb2_grpc
from scheduler.config import SchedulerSettings
from scheduler.server import Serving, serving

LIMIT_S = 20.0
"""How long any wait may last before the test fails; nothing takes a tenth of it."""
VOCAB_SIZE = 1000
EOS = 2


def model(**changes: object) -> worker_pb2.ModelInfo:
    """What a fake worker has loaded."""
    values: dict = {
        "name": "fake",
        "fingerprint": "abc",
        "architecture": "FakeForCausalLM",
        "vocab_size": VOCAB_SIZE,
        "max_model_len": 512,
        "dtype": "float32",
        "eos_token_ids": [EOS],
    }
    return worker_pb2.ModelInfo(**{**values, **changes})


def capacity(**changes: int) -> worker_pb2.WorkerCapacity:
    """What a fake worker can hold."""
    values = {
        "block_size": 4,
        "num_blocks": 256,
        "host_blocks": 16,
        "block_bytes": 4096,
        "max_slots": 64,
        "max_step_tokens": 1024,
    }
    return worker_pb2.WorkerCapacity(**{**values, **changes})


def hello(worker_id: str = "w1", **changes: object) -> worker_pb2.WorkerHello:
    """A fake worker's introduction."""
    values: dict = {
        "protocol_version": 1,
        "worker_id": worker_id,
        "kernel_version": "fake",
        "device": "cpu",
        "model": model(),
        "capacity": capacity(),
    }
    return worker_pb2.WorkerHello(**{**values, **changes})


def next_token(history: Sequence[int], index: int) -> int:
    """What a fake worker samples after a token history, for the sequence `index` of its request. Never EOS."""
    return 10 + (sum(history) * 31 + len(history) * 7 + index * 101) % (VOCAB_SIZE - 10)


def expected(prompt: Sequence[int], count: int, index: int = 0) -> list[int]:
    """The tokens that follow a prompt."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, index))
    return history[len(prompt) :]


async def status_of(call: grpc.aio.StreamStreamCall) -> tuple[grpc.StatusCode, str]:
    """How the scheduler ended a stream. gRPC tells only after every message before the end has been read."""
    async with asyncio.timeout(LIMIT_S):
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code(), await call.details()


@dataclass
class Row:
    """One row of the fake persistent batch."""

    tokens: list[int]
    computed: int
    index: int
    wants_logprobs: bool


@dataclass
class FakeWorker:
    """Dials in, keeps rows, answers plans when told to."""

    call: grpc.aio.StreamStreamCall
    worker_id: str
    welcome: worker_pb2.WorkerWelcome = field(default_factory=worker_pb2.WorkerWelcome)
    sample: Callable[[Sequence[int], int], int] = next_token
    rows: dict[int, Row] = field(default_factory=dict)
    decode_set: list[int] = field(default_factory=list)
    plans: list[worker_pb2.StepPlan] = field(default_factory=list)
    tasks: list[asyncio.Task] = field(default_factory=list)
    progress: int = 0
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def receive(self) -> worker_pb2.JoinResponse:
        async with asyncio.timeout(LIMIT_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF, await self.call.details()
        return message

    async def next_plan(self) -> worker_pb2.StepPlan:
        plan = (await self.receive()).step_plan
        assert plan.epoch == self.welcome.epoch
        assert plan.step == len(self.plans) + 1
        self.plans.append(plan)
        return plan

    def execute(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        """Applies a plan to the rows and makes its result."""
        for slot in plan.release_slots:
            del self.rows[slot]
        self.decode_set = [slot for slot in self.decode_set if slot in self.rows]
        for new in plan.new_sequences:
            assert new.slot not in self.rows
            assert new.computed_tokens < len(new.token_ids)
            self.rows[new.slot] = Row(list(new.token_ids), new.computed_tokens, new.index, new.HasField("logprobs"))
        self.decode_set = [slot for slot in self.decode_set if slot not in plan.decode_remove]
        self.decode_set.extend(plan.decode_add)
        samples = [self.rows[slot] for slot in self.decode_set]
        for row in samples:
            row.computed += 1
            assert row.computed == len(row.tokens)
        for slot, count in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            row = self.rows[slot]
            row.computed += count
            if row.computed == len(row.tokens):
                samples.append(row)
        for fork in plan.forks:
            parent = self.rows[fork.parent_slot]
            self.rows[fork.slot] = Row(list(parent.tokens), parent.computed, fork.index, parent.wants_logprobs)
            samples.append(self.rows[fork.slot])
        result = worker_pb2.StepResult(epoch=plan.epoch, step=plan.step)
        for number, row in enumerate(samples):
            token = self.sample(row.tokens, row.index)
            row.tokens.append(token)
            result.token_ids.append(token)
            if row.wants_logprobs:
                result.logprob_rows.append(number)
                result.logprobs.add(logprob=-float(token) / VOCAB_SIZE, rank=1, top_ids=[token], top_logprobs=[-1.0])
        result.timings.forward_ns = 1000
        return result

    async def send(self, **message: object) -> None:
        async with self.writing:  # gRPC takes one write at a time
            await self.call.write(worker_pb2.JoinRequest(**message))

    async def step(self) -> worker_pb2.StepPlan:
        """Executes the next plan and sends its result."""
        plan = await self.next_plan()
        await self.send(step_result=self.execute(plan))
        return plan

    async def beat(self) -> None:
        self.progress += 1
        await self.send(
            heartbeat=worker_pb2.Heartbeat(epoch=self.welcome.epoch, last_step=len(self.plans), progress=self.progress)
        )

    def run(self) -> None:
        """Answers every plan as it comes, from now on."""

        async def forever() -> None:
            while True:
                message = await self.call.read()
                if message is grpc.aio.EOF:
                    return
                self.plans.append(message.step_plan)
                await self.send(step_result=self.execute(message.step_plan))

        self.background(forever)

    def keep_beating(self, interval_s: float = 0.05) -> None:
        async def forever() -> None:
            while True:
                await self.beat()
                await asyncio.sleep(interval_s)

        self.background(forever)

    def background(self, work: Callable[[], Awaitable[None]]) -> None:
        async def quietly() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await work()

        self.tasks.append(asyncio.create_task(quietly()))

    async def stop(self) -> None:
        """Breaks the stream, as a dying process does."""
        self.call.cancel()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the scheduler ended the stream."""
        return await status_of(self.call)


@dataclass
class Heard:
    """What a gateway has heard on one stream number."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    admitted: scheduler_pb2.StreamAdmitted | None = None
    attached: scheduler_pb2.StreamAttached | None = None
    finished: scheduler_pb2.StreamFinished | None = None
    failed: scheduler_pb2.StreamFailed | None = None

    @property
    def finish(self) -> inference_pb2.Finish:
        assert self.finished is not None
        return self.finished.finish


@dataclass
class FakeGateway:
    """One session. `heard` collects by stream number; `steps` keeps every step message."""

    call: grpc.aio.StreamStreamCall
    gives_credit: bool = True
    heard: dict[int, Heard] = field(default_factory=dict)
    steps: list[scheduler_pb2.SessionStep] = field(default_factory=list)
    states: list[scheduler_pb2.ModelState] = field(default_factory=list)
    welcome: scheduler_pb2.SessionWelcome | None = None

    def on(self, stream: int) -> Heard:
        return self.heard.setdefault(stream, Heard())

    async def receive(self) -> scheduler_pb2.SessionResponse:
        async with asyncio.timeout(LIMIT_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF, await self.call.details()
        kind = message.WhichOneof("message")
        if kind == "step":
            self._hear(message.step)
            if self.gives_credit:
                await self.send(credit=scheduler_pb2.SessionCredit(steps=1))
        elif kind == "model_state":
            self.states.append(message.model_state)
        else:
            self.welcome = message.welcome
        return message

    def _hear(self, step: scheduler_pb2.SessionStep) -> None:
        self.steps.append(step)
        for attached in step.attached:
            self.on(attached.stream).attached = attached
            for index, state in enumerate(attached.sequences):
                self.on(attached.stream + index).tokens = list(state.token_ids)
        for admitted in step.admitted:
            self.on(admitted.stream).admitted = admitted
        for stream, token in zip(step.streams, step.token_ids, strict=True):
            assert self.on(stream).finished is None, "a token after the finish of its stream"
            self.on(stream).tokens.append(token)
        for row, logprobs in zip(step.logprob_rows, step.logprobs, strict=True):
            self.on(step.streams[row]).logprobs.append(logprobs)
        for finished in step.finished:
            heard = self.on(finished.stream)
            assert heard.finished is None, "two finishes"
            heard.finished = finished
        for failed in step.failed:
            self.on(failed.stream).failed = failed

    async def step(self) -> scheduler_pb2.SessionStep:
        """The next step message."""
        while True:
            message = await self.receive()
            if message.WhichOneof("message") == "step":
                return message.step

    async def until(self, condition: Callable[[], object]) -> None:
        """Reads until the condition holds."""
        while not condition():
            await self.receive()

    async def finish(self, *streams: int) -> list[list[int]]:
        """Reads until the streams have ended; returns their tokens."""
        await self.until(lambda: all(self.on(stream).finished or self.on(stream).failed for stream in streams))
        return [self.on(stream).tokens for stream in streams]

    async def send(self, **message: object) -> None:
        await self.call.write(scheduler_pb2.SessionRequest(**message))

    async def submit(self, stream: int, prompt: Sequence[int], max_tokens: int = 8, **changes: object) -> None:
        await self.send(submit=submission(stream, prompt, max_tokens, **changes))

    async def attach(self, stream: int, request_id: str) -> None:
        await self.send(attach=scheduler_pb2.AttachStream(stream=stream, request_id=request_id))

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the scheduler ended the session."""
        return await status_of(self.call)


def submission(
    stream: int,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    request_id: str | None = None,
    n: int = 1,
    ignore_eos: bool = True,
    logprobs: int | None = None,
    **changes: object,
) -> scheduler_pb2.Submit:
    """A greedy request."""
    return scheduler_pb2.Submit(
        stream=stream,
        request_id=f"r{stream}" if request_id is None else request_id,
        token_ids=prompt,
        sampling=inference_pb2.SamplingParams(temperature=0, seed=1, n=n),
        stop=inference_pb2.StopParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
        output=inference_pb2.OutputOptions(logprobs=logprobs),
        **changes,
    )


@dataclass
class Pool:
    """A real scheduler on a loopback port, and ways to dial it."""

    serving: Serving
    channel: grpc.aio.Channel
    workers: list[FakeWorker] = field(default_factory=list)
    gateways: list[FakeGateway] = field(default_factory=list)

    async def dial(self, introduction: worker_pb2.WorkerHello) -> FakeWorker:
        """Opens Join and says hello."""
        call = worker_pb2_grpc.WorkerServiceStub(self.channel).Join()
        worker = FakeWorker(call, introduction.worker_id)
        self.workers.append(worker)
        with contextlib.suppress(asyncio.InvalidStateError):  # refused before the write was done
            await worker.send(hello=introduction)
        return worker

    async def worker(self, worker_id: str = "w1", **changes: object) -> FakeWorker:
        """A worker that has been welcomed."""
        worker = await self.dial(hello(worker_id, **changes))
        worker.welcome = (await worker.receive()).welcome
        assert worker.welcome.epoch
        return worker

    async def gateway(self, credit: int = 64, *, gives_credit: bool = True) -> FakeGateway:
        """A session that has been welcomed and told the model state."""
        call = scheduler_pb2_grpc.SchedulerServiceStub(self.channel).Session()
        gateway = FakeGateway(call, gives_credit)
        self.gateways.append(gateway)
        await gateway.send(hello=scheduler_pb2.GatewayHello(protocol_version=1, gateway_id="g", credit=credit))
        await gateway.until(lambda: gateway.welcome and gateway.states)
        return gateway

    @property
    def stub(self) -> scheduler_pb2_grpc.SchedulerServiceStub:
        return scheduler_pb2_grpc.SchedulerServiceStub(self.channel)

    async def abort(self, request_id: str) -> bool:
        return (await self.stub.Abort(scheduler_pb2.AbortRequest(request_id=request_id))).found

    async def read(self, url_path: str = "/metrics") -> str:
        """The Prometheus page."""
        assert self.serving.metrics_address is not None
        host, port = self.serving.metrics_address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {url_path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        page = await reader.read()
        writer.close()
        await writer.wait_closed()
        return page.decode()


@contextlib.asynccontextmanager
async def pool(**settings: object) -> AsyncIterator[Pool]:
    """A scheduler for the length of a `with` block; at its end the core's books must balance."""
    values: dict = {"listen": "127.0.0.1:0", "metrics_port": 0}
    async with (
        serving(SchedulerSettings(**{**values, **settings})) as now,
        grpc.aio.insecure_channel(now.addresses[0], options=client_options(internal=True)) as channel,
    ):
        made = Pool(now, channel)
        try:
            yield made
            now.engine.dispatcher.check_integrity()
            assert not now.engine.failed.done()
        finally:
            for worker in made.workers:
                await worker.stop()
            for gateway in made.gateways:
                gateway.call.cancel()
