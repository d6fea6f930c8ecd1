"""Where clients of a gateway come in: gRPC and OpenAI-compatible HTTP. Both send the same requests and note when tokens
arrive; answers are parsed after the last one has come, so that parsing delays no other stream."""

from __future__ import annotations

import asyncio
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from pagewire.bench.session import BenchError, Times
from pagewire.bench.workloads import Job
from pagewire.runtime.channel import client_options, split_address
from pagewire.v1 import inference_pb2

GENERATE = "/pagewire.v1.InferenceService/Generate"
STREAMS_PER_CHANNEL = 64
"""Below the gateway's limit of streams on one connection."""
MAX_CHANNELS = 64


class Door(ABC):
    """Sends prepared requests. Use as an async context manager.

    Args:
        addresses: of the gateways, host:port; requests go to them in turn.
        run_name: begins every request's name, and is the tenant, so that no run finds another's prefixes cached.
        text: have the gateway decode the tokens.
    """

    def __init__(self, addresses: Sequence[str], jobs: Sequence[Job], run_name: str, *, text: bool) -> None:
        if not addresses:
            raise BenchError("no gateway is there to measure at")
        self.addresses = addresses
        self.jobs = jobs
        self.run_name = run_name
        self.text = text

    @abstractmethod
    async def __aenter__(self) -> Door:
        """Connects."""

    @abstractmethod
    async def __aexit__(self, *error: object) -> None:
        """Disconnects."""

    @abstractmethod
    async def send(self, number: int, times: Times) -> None:
        """Sends the job of that number and reads its answer to the end. Raises BenchError when it fails."""

    def check(self, number: int, tokens: int) -> None:
        """Raises BenchError unless every token has come."""
        if tokens != self.jobs[number].max_tokens:
            raise BenchError(f"a request ended with {tokens} of {self.jobs[number].max_tokens} tokens")


class GrpcDoor(Door):
    """InferenceService.Generate."""

    async def __aenter__(self) -> GrpcDoor:
        per_gateway = min(MAX_CHANNELS, -(-len(self.jobs) // (STREAMS_PER_CHANNEL * len(self.addresses))))
        # Channels with equal options share one connection unless they are told not to.
        options: list[Any] = [*client_options(internal=False), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options)
            for address in self.addresses
            for _ in range(per_gateway)
        ]
        self._requests = [self._request(number, job) for number, job in enumerate(self.jobs)]
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return self

    async def __aexit__(self, *error: object) -> None:
        for channel in self._channels:
            await channel.close(None)

    def _request(self, number: int, job: Job) -> bytes:
        return inference_pb2.GenerateRequest(
            request_id=f"{self.run_name}-{number}",
            token_ids=inference_pb2.TokenIds(ids=job.prompt),
            sampling=inference_pb2.SamplingParams(temperature=0.0),
            stop=inference_pb2.StopParams(max_tokens=job.max_tokens, ignore_eos=True),
            output=inference_pb2.OutputOptions(token_ids_only=not self.text),
            tenant=self.run_name,
        ).SerializeToString()

    async def send(self, number: int, times: Times) -> None:
        method: Any = self._channels[number % len(self._channels)].unary_stream(GENERATE, None, None)
        messages: list[bytes] = []
        times.sent = time.monotonic_ns()
        try:
            call = method(self._requests[number])
            while isinstance(raw := await call.read(), bytes):
                messages.append(raw)
                times.arrivals.append(time.monotonic_ns())
        except grpc.RpcError as error:
            code, details = getattr(error, "code", None), getattr(error, "details", None)
            raise BenchError(f"{code().name if code else error}: {details() if details else ''}") from None
        responses = [inference_pb2.GenerateResponse.FromString(raw) for raw in messages]
        times.arrivals = [now for now, response in zip(times.arrivals, responses, strict=True) if response.token_ids]
        times.tokens = sum(len(response.token_ids) for response in responses)
        self.check(number, times.tokens)


class OpenAIDoor(Door):
    """POST /v1/completions with `stream`, over connections that are kept. A key is taken from OPENAI_API_KEY."""

    async def __aenter__(self) -> OpenAIDoor:
        self._idle: dict[str, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = {
            address: [] for address in self.addresses
        }
        self._requests = [self._request(number, job) for number, job in enumerate(self.jobs)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for connections in self._idle.values():
            for _reader, writer in connections:
                writer.close()

    def _request(self, number: int, job: Job) -> bytes:
        body = json.dumps(
            {
                "prompt": job.prompt,
                "max_tokens": job.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                "user": self.run_name,
            }
        ).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"host: {self.addresses[number % len(self.addresses)]}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {self.run_name}-{number}",
        ]
        if key := os.environ.get("OPENAI_API_KEY"):
            lines.append(f"authorization: Bearer {key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def send(self, number: int, times: Times) -> None:
        address = self.addresses[number % len(self.addresses)]
        times.sent = time.monotonic_ns()
        reader, writer = self._idle[address].pop() if self._idle[address] else await _connect(address)
        chunks: list[tuple[int, bytes]] = []
        try:
            writer.write(self._requests[number])
            await writer.drain()
            status, headers = await _head(reader)
            if "chunked" not in headers.get("transfer-encoding", ""):
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                raise BenchError(f"HTTP {status}: {body[:300].decode(errors='replace')}")
            while size := int(await reader.readline(), 16):
                data = await reader.readexactly(size + 2)
                chunks.append((time.monotonic_ns(), data[:-2]))
            await reader.readline()
        except (OSError, EOFError, ValueError) as error:
            writer.close()
            raise BenchError(f"the connection to {address} broke: {error}") from None
        except BaseException:
            writer.close()
            raise
        self._idle[address].append((reader, writer))
        for arrived, event in events(chunks):
            tokens = num_tokens(event)
            if tokens:
                times.arrivals.append(arrived)
                times.tokens += tokens
        self.check(number, times.tokens)


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = split_address(address)
    try:
        return await asyncio.open_connection(host.strip("[]"), port)
    except OSError as error:
        raise BenchError(f"nothing answers at http://{address}: {os.strerror(error.errno or 0)}") from None


async def _head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """Status and headers of an answer, names in small letters."""
    first = (await reader.readline()).decode("latin-1").split(" ", 2)
    if len(first) < 2:
        raise EOFError("it was closed")
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return first[1], headers


def events(chunks: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Server-sent events out of chunks: each with the arrival of the chunk that completed it."""
    found: list[tuple[int, bytes]] = []
    rest = b""
    for arrived, data in chunks:
        *whole, rest = (rest + data).split(b"\n\n")
        found += [(arrived, event) for event in whole]
    return found


def num_tokens(event: bytes) -> int:
    """Tokens in one event of a completion. Raises BenchError for an event that tells an error."""
    data = event.removeprefix(b"data:").strip()
    if not data or data == b"[DONE]":
        return 0
    content = json.loads(data)
    if "error" in content:
        raise BenchError(f"a stream failed: {content['error'].get('message', content['error'])}")
    return sum(len(choice.get("token_ids") or ()) for choice in content["choices"])


DOORS: dict[str, type[Door]] = {"gateway": GrpcDoor, "openai": OpenAIDoor}
"""By the name of the place in rows."""
