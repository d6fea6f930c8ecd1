"""What the console watches: the scheduler's WatchBlocks as server-sent events.

    event: blocks      data: a WatchBlocksResponse as JSON (below); the first one after any break is a snapshot
    event: problem     data: {"message": "..."}, when the scheduler cannot be watched; it is tried again

Nothing is kept here. The next message is read from the scheduler when the browser's connection has taken the one
before, so a slow browser makes the scheduler leave out messages, and nothing grows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.openai.answer import EVENT_STREAM, ClientGoneError, while_connected
from gateway.session import SchedulerLink
from pagewire.runtime.logs import get_logger
from pagewire.v1 import control_pb2

METHOD = "/pagewire.v1.ControlService/WatchBlocks"
MAX_REQUESTS = 200
"""Requests that a page lists: more than anybody reads."""
RETRY_S = 1.0
MEMORIES = {control_pb2.BLOCK_MEMORY_KV_POOL: "kv_pool", control_pb2.BLOCK_MEMORY_HOST_ARENA: "host_arena"}
STATES = {value: name.removeprefix("REQUEST_STATE_").lower() for name, value in control_pb2.RequestState.items()}
LOAD_FIELDS = tuple(field.name for field in control_pb2.WorkerLoad.DESCRIPTOR.fields)

log = get_logger(__name__)


class BlockEvents(Response):
    """A stream of events for as long as the browser listens and the gateway runs."""

    def __init__(self, link: SchedulerLink, stopping: Callable[[], bool], write_timeout_s: float) -> None:
        """
        Args:
            link: the way to the scheduler.
            stopping: whether the gateway is being stopped.
            write_timeout_s: seconds for one write before the browser counts as gone.
        """
        super().__init__()
        self._link = link
        self._stopping = stopping
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._write_timeout_s):
                    await send({"type": "http.response.body", "body": data, "more_body": more})
            except TimeoutError:
                scope["state"]["abort"]()
                raise ClientGoneError from None

        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            while not self._stopping():
                try:
                    await self._follow(write)
                except grpc.aio.AioRpcError as error:
                    if not self._stopping():
                        await write(event("problem", {"message": why(error)}))
                        await asyncio.sleep(RETRY_S)
            await write(b"", more=False)

        with suppress(ClientGoneError):
            await while_connected(receive, stream())

    async def _follow(self, write: Callable[[bytes], Any]) -> None:
        """Passes on one stream of the scheduler's. Raises AioRpcError when it ends."""
        channel: Any = self._link.channel
        request = control_pb2.WatchBlocksRequest(max_requests=MAX_REQUESTS)
        call = channel.unary_stream(
            METHOD,
            request_serializer=control_pb2.WatchBlocksRequest.SerializeToString,
            response_deserializer=control_pb2.WatchBlocksResponse.FromString,
        )(request)
        try:
            async for message in call:
                await write(event("blocks", blocks(message)))
                if self._stopping():
                    return
        finally:
            call.cancel()


def event(kind: str, content: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks of its own."""
    return b"event: " + kind.encode() + b"\ndata: " + to_json(content) + b"\n\n"


def why(error: grpc.aio.AioRpcError) -> str:
    """One line for the page."""
    if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED):
        return error.details() or "the scheduler refuses"
    return "the scheduler cannot be reached"


def blocks(message: control_pb2.WatchBlocksResponse) -> dict[str, Any]:
    """The event's content: the fields of control.proto by name, owners as [number, request_id, index]."""
    loads = message.loads
    return {
        "snapshot": message.snapshot,
        "gone_workers": list(message.gone_workers),
        "owners": [(owner.number, owner.request_id, owner.index) for owner in message.owners],
        "pools": [_pool(pool) for pool in message.pools],
        "ended_owners": list(message.ended_owners),
        "now_ns": loads.now_ns,
        "draining": loads.draining,
        "live_requests": loads.live_requests,
        "unassigned_requests": loads.unassigned_requests,
        "workers": [{name: getattr(load, name) for name in LOAD_FIELDS} for load in loads.loads],
        "requests": [_request(request) for request in loads.requests],
    }


def _pool(pool: control_pb2.PoolChange) -> dict[str, Any]:
    content: dict[str, Any] = {
        "worker_id": pool.worker_id,
        "memory": MEMORIES[pool.memory],
        "skips": list(pool.skips),
        "lengths": list(pool.lengths),
        "owners": list(pool.owners),
        "references": list(pool.references),
    }
    if pool.whole:
        content["total_blocks"] = pool.total_blocks
    return content


def _request(request: control_pb2.RequestLoad) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "worker_id": request.worker_id,
        "state": STATES[request.state],
        "priority": request.priority,
        "tenant": request.tenant,
        "sequences": request.sequences,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "output_tokens": request.output_tokens,
        "max_tokens": request.max_tokens,
        "blocks": request.blocks,
        "preemptions": request.preemptions,
        "age_ns": request.age_ns,
    }
