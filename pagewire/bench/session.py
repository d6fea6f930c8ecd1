"""A client of the scheduler's token-level session: what a gateway does, without text.

The messages of a set are encoded before the clock starts, and a step message costs one parse and a few list operations,
so that the service is measured and not this process. Every stream is checked at its end: all tokens came, none twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from pagewire.bench.workloads import Job
from pagewire.runtime.channel import client_options
from pagewire.v1 import control_pb2, scheduler_pb2

SESSION = "/pagewire.v1.SchedulerService/Session"
ABORT = "/pagewire.v1.SchedulerService/Abort"
GET_LOADS = "/pagewire.v1.ControlService/GetLoads"
CREDIT = 1 << 16
"""The most that a scheduler takes: steps are never merged because this client reads slowly."""
START_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 5.0


class BenchError(Exception):
    """A row cannot be measured; the message is one line."""


@dataclass
class Times:
    """When one request's tokens came: nanoseconds of the monotonic clock."""

    due: int = 0
    """When it was to be sent."""
    sent: int = 0
    """When it was sent."""
    arrivals: list[int] = field(default_factory=list)
    """One entry per message with tokens."""
    tokens: int = 0
    error: str = ""
    """Empty: it ended as it should."""


@dataclass
class _Stream:
    request_id: str
    job: Job
    times: Times
    finished: bool = False


class Session:
    """One open session. Use as an async context manager; leaving it cancels what is unfinished."""

    def __init__(self, address: str, run_name: str) -> None:
        """
        Args:
            address: of the scheduler, host:port or unix:PATH.
            run_name: begins every request id, and is the tenant, so that no run finds another's prefixes cached.
        """
        self._address = address
        self._run_name = run_name
        self._channel = grpc.aio.insecure_channel(address, options=client_options(internal=True))
        self._call: Any = None
        self._streams: list[_Stream] = []
        self._unfinished = 0
        self._unacknowledged = 0
        self.model = scheduler_pb2.ModelState()
        """What the scheduler said last about the model."""
        self.num_tokens = 0
        """Output tokens received."""
        self.steps = 0
        """Step messages received."""
        self.ended_at = 0
        """When the last message arrived."""

    async def __aenter__(self) -> Session:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._open()
        except TimeoutError:
            await self._channel.close(None)
            raise BenchError(f"no worker is ready at the scheduler {self._address}") from None
        except grpc.RpcError as error:
            await self._channel.close(None)
            raise BenchError(_line(error)) from None
        except BaseException:
            await self._channel.close(None)
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        # By name and not on the session: a read that was cut short has cancelled the session's call.
        abort = self._channel.unary_unary(ABORT, None, None)
        unfinished = [stream.request_id for stream in self._streams if not stream.finished]
        with contextlib.suppress(grpc.RpcError, TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                for request_id in unfinished:
                    await abort(scheduler_pb2.AbortRequest(request_id=request_id).SerializeToString())
        self._call.cancel()
        await self._channel.close(None)

    async def _open(self) -> None:
        self._call = self._channel.stream_stream(SESSION, None, None)(None)
        hello = scheduler_pb2.GatewayHello(
            protocol_version=1, gateway_id=f"bench-{os.getpid()}-{self._run_name}", credit=CREDIT
        )
        await self._write(scheduler_pb2.SessionRequest(hello=hello))
        while not self.model.ready:
            await self._receive()

    # Sending.

    def prepare(self, jobs: Sequence[Job], name: str = "") -> list[bytes]:
        """The encoded messages that submit the jobs; their streams are expected from now on."""
        messages = []
        for job in jobs:
            number = len(self._streams)
            submit = scheduler_pb2.Submit(
                stream=number,
                request_id=f"{self._run_name}-{name}{number}",
                token_ids=job.prompt,
                tenant=self._run_name + name,
            )
            submit.sampling.temperature = 0.0
            submit.sampling.n = 1
            submit.sampling.seed = number
            submit.stop.max_tokens = job.max_tokens
            submit.stop.ignore_eos = True
            submit.output.token_ids_only = True
            messages.append(scheduler_pb2.SessionRequest(submit=submit).SerializeToString())
            self._streams.append(_Stream(submit.request_id, job, Times()))
        self._unfinished += len(jobs)
        return messages

    async def submit(self, messages: Sequence[bytes]) -> None:
        """Sends prepared messages."""
        for raw in messages:
            await self._call.write(raw)

    async def submit_at(self, messages: Sequence[bytes], arrivals: Sequence[float], begin: int) -> None:
        """Sends prepared messages when each is due, in seconds after `begin`. They must be those prepared last."""
        streams = self._streams[len(self._streams) - len(messages) :]
        for stream, raw, arrival in zip(streams, messages, arrivals, strict=True):
            stream.times.due = begin + int(arrival * 1e9)
            wait = (stream.times.due - time.monotonic_ns()) / 1e9
            if wait > 0:
                await asyncio.sleep(wait)
            stream.times.sent = time.monotonic_ns()
            await self._call.write(raw)

    # Receiving.

    async def drain(self, *, timed: bool = False) -> list[Times]:
        """Reads until everything that was prepared has ended.

        Args:
            timed: note when each stream's tokens came; costs a loop over the tokens.

        Raises:
            BenchError: a request failed or ended early, or the session broke.
        """
        while self._unfinished:
            try:
                await self._receive(timed)
            except grpc.RpcError as error:
                raise BenchError(_line(error)) from None
        return [stream.times for stream in self._streams]

    async def drain_while(self, sending: Coroutine[Any, Any, None], *, timed: bool = False) -> list[Times]:
        """`drain`, beside the coroutine that sends."""
        task = asyncio.create_task(sending)
        try:
            return await self.drain(timed=timed)
        finally:
            task.cancel()
            # What breaks the sending breaks the reading too, which tells it better.
            with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError, grpc.RpcError):
                await task

    async def _receive(self, timed: bool = False) -> None:
        raw = await self._call.read()
        if not isinstance(raw, bytes):
            raise BenchError("the scheduler ended the session: " + str(await self._call.details()))
        response = scheduler_pb2.SessionResponse.FromString(raw)
        if response.HasField("step"):
            self.ended_at = time.monotonic_ns()
            self._take(response.step, timed)
            await self._acknowledge()
        elif response.HasField("model_state"):
            self.model = response.model_state
            if self._unfinished and not self.model.workers:
                raise BenchError("the worker was lost")

    def _take(self, step: scheduler_pb2.SessionStep, timed: bool) -> None:
        self.steps += 1
        self.num_tokens += len(step.streams)
        streams, now = self._streams, self.ended_at
        if timed:
            for number in step.streams:
                times = streams[number].times
                times.tokens += 1
                if not times.arrivals or times.arrivals[-1] != now:
                    times.arrivals.append(now)
        for finished in step.finished:
            stream = streams[finished.stream]
            if stream.finished or finished.num_tokens != stream.job.max_tokens:
                raise BenchError(
                    f"a request ended with {finished.num_tokens} of {stream.job.max_tokens} tokens, "
                    f"finish reason {finished.finish.reason}"
                )
            stream.finished = True
            self._unfinished -= 1
        for failed in step.failed:
            raise BenchError(f"a request failed: {failed.reason}: {failed.message}")

    async def _acknowledge(self) -> None:
        self._unacknowledged += 1
        if self._unacknowledged >= CREDIT // 2:
            credit = scheduler_pb2.SessionCredit(steps=self._unacknowledged)
            self._unacknowledged = 0
            await self._write(scheduler_pb2.SessionRequest(credit=credit))

    async def _write(self, message: scheduler_pb2.SessionRequest) -> None:
        await self._call.write(message.SerializeToString())


async def loads(address: str, timeout_s: float = 5.0) -> control_pb2.GetLoadsResponse:
    """What the workers of a scheduler carry. Raises BenchError when it does not answer."""
    async with grpc.aio.insecure_channel(address, options=client_options(internal=True)) as channel:
        try:
            raw = await channel.unary_unary(GET_LOADS, None, None)(
                control_pb2.GetLoadsRequest().SerializeToString(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise BenchError(_line(error)) from None
    return control_pb2.GetLoadsResponse.FromString(raw)


def _line(error: grpc.RpcError) -> str:
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    return f"{code().name if code else type(error).__name__}: {details() if details else error}"
