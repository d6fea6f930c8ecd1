"""One bidirectional gRPC stream of raw messages: what both links have in common.

Messages are parsed by the links themselves, not by gRPC: a message that cannot be parsed is then INVALID_ARGUMENT,
while gRPC would answer UNKNOWN with the text of a Python exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from pagewire.runtime import logs, rich_status

log = logs.get_logger("scheduler.duplex")

Parsed = TypeVar("Parsed", bound=Message)
Answer = TypeVar("Answer")


class Refusal(Exception):  # noqa: N818  (an outcome that the peer is told, not a fault of ours)
    """Ends a call with a status. The message is one clear line for the peer's operator."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str,
        violations: Sequence[tuple[str, str]] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = rich_status.status(code, message, reason=reason, violations=violations, metadata=metadata)


def wrong_field(path: str, description: str) -> Refusal:
    """INVALID_ARGUMENT for a field: what is expected of it."""
    message, violations = f"{path}: {description}", [(path, description)]
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, message, reason="INVALID_FIELD", violations=violations)


def parse(message_class: type[Parsed], raw: bytes) -> Parsed:
    """Parses one message. Raises Refusal (INVALID_ARGUMENT, MALFORMED_MESSAGE) when the bytes are none."""
    try:
        return message_class.FromString(raw)
    except DecodeError:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{len(raw)} bytes are not a {message_class.DESCRIPTOR.name}",
            reason="MALFORMED_MESSAGE",
        ) from None


async def read_first(context: Any, timeout_s: float) -> bytes:
    """The peer's first message. Raises Refusal when none comes in time or the peer has nothing to say."""
    try:
        async with asyncio.timeout(timeout_s):
            raw = await context.read()
    except TimeoutError:
        raise Refusal(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {timeout_s:g} s", reason="HELLO_MISSING"
        ) from None
    if not isinstance(raw, bytes):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "the stream ended without a hello", reason="HELLO_MISSING")
    return raw


async def converse(
    context: Any, receive: Callable[[bytes], None], outgoing: Callable[[], Awaitable[bytes]], ended: Awaitable[None]
) -> None:
    """Reads and writes at once until the peer closes its side, either direction fails, or `ended` is done.

    Args:
        context: the call's aio servicer context, with raw bytes both ways.
        receive: takes each message that arrives, in order. What it raises ends the stream.
        outgoing: waits for the next message to write. It is asked again only after the write before was taken by gRPC,
            so what piles up for a slow peer piles up at the caller, who bounds it.
        ended: ends the stream from outside; its exception says with which status.

    Raises:
        Refusal: from `receive`, `outgoing` or `ended`.
    """

    async def read() -> None:
        while isinstance(raw := await context.read(), bytes):
            receive(raw)

    async def write() -> None:
        while True:
            await context.write(await outgoing())

    ending = asyncio.ensure_future(ended)
    tasks = [asyncio.ensure_future(read()), asyncio.ensure_future(write())]
    try:
        done, _ = await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answer(context: Any, conversation: Awaitable[Answer]) -> Answer | None:
    """Runs a handler and turns what it raises into a status: a Refusal into its own, a defect into bare INTERNAL.

    Returns what the handler returns, or None when the call has failed.
    """
    try:
        return await conversation
    except Refusal as refusal:
        await context.abort_with_status(rich_status.to_grpc(refusal.status))
    except (grpc.RpcError, ConnectionError):
        pass  # the peer is gone; there is nobody to tell
    except Exception:
        log.exception("a handler failed")
        internal = rich_status.status(grpc.StatusCode.INTERNAL, "the scheduler failed here", reason="INTERNAL")
        await context.abort_with_status(rich_status.to_grpc(internal))
    return None
