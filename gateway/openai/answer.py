"""Runs what an HTTP request asks for and writes the answer, while the client is there.

The status line waits for the first response, so what the queue or the template refuses is a proper status, in streams
too. The socket is watched all the time, because a client that closes it wants its request to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, NoReturn

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.errors import Reason, RequestError, unavailable
from gateway.generation import Generation
from gateway.openai import errors
from gateway.openai.forms import Form, Piece, Reader, form_for
from gateway.openai.token_texts import TokenTexts
from gateway.openai.translate import Ask
from gateway.requests import RequestPath
from pagewire.runtime.logs import get_logger
from pagewire.v1 import inference_pb2

log = get_logger(__name__)

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would collect the stream leave it alone
]
DONE = b"data: [DONE]\n\n"
LAST_WORD_S = 0.5
"""Seconds that a stopping gateway waits for a client to take the news."""


class ClientGoneError(Exception):
    """The client has closed its connection, or has not read for too long; there is nobody to tell anything."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it when the client closes its connection. The body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        await working
    finally:
        watching.cancel()
        working.cancel()
        # What `work` holds is given back before anybody goes on.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, inference_pb2.GenerateResponse]]:
    """The responses of all generations as they come, each with its generation's place."""
    if len(generations) == 1:
        while (response := await generations[0].next()) is not None:
            yield 0, response
        return
    waiting = {asyncio.create_task(generation.next()): place for place, generation in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                next_response = task.result()
                if next_response is not None:
                    yield place, next_response
                    waiting[asyncio.create_task(generations[place].next())] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


class Answer(Response):
    """The answer to an Ask. Raises RequestError while nothing has been sent; later it is the stream's last event."""

    def __init__(
        self, path: RequestPath, ask: Ask, texts: TokenTexts, write_timeout_s: float, traceparent: str = ""
    ) -> None:
        """
        Args:
            path: what all front doors share.
            ask: what is asked for.
            texts: for log-probabilities.
            write_timeout_s: seconds for one write before the client counts as slow.
            traceparent: W3C trace context; empty: none.
        """
        super().__init__()
        self._path = path
        self._ask = ask
        self._texts = texts
        self._form: Form = form_for(ask, texts)
        self._reader = Reader(ask)
        self._write_timeout_s = write_timeout_s
        self._traceparent = traceparent
        self._generations: list[Generation] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._stream(scope, send) if self._ask.stream else self._whole(scope, send)
        try:
            await while_connected(receive, self._closing(work))
        except ClientGoneError:
            log.debug("client gone", requests=len(self._ask.requests))

    async def _closing(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            for generation in self._generations:
                generation.close()

    async def _start(self) -> None:
        """Starts a generation for each prompt."""
        for place, request in enumerate(self._ask.requests):
            try:
                self._generations.append(await self._path.generate(request, traceparent=self._traceparent))
            except RequestError as error:
                raise self._ask.renamed(error, place) from None

    async def _pieces(self) -> AsyncGenerator[Piece]:
        await self._start()
        async with aclosing(merged(self._generations)) as responses:
            async for place, response in responses:
                piece = self._reader.read(place, response)
                if self._ask.prompt_only and piece.prompt is not None:
                    piece.text = self._texts.decode(piece.prompt.token_ids)
                yield piece

    async def _whole(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                self._form.add(piece)
        body = to_json(self._form.whole(self._reader.tally.usage()))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._write(scope, send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(scope, send, {"type": "http.response.body", "body": body})

    async def _stream(self, scope: Scope, send: Send) -> None:
        started = False

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                start = {"type": "http.response.start", "status": 200, "headers": EVENT_STREAM}
                await self._write(scope, send, start)
            await self._write(scope, send, {"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if events := b"".join(map(_event, self._form.chunks(piece))):
                        await write(events)
            if self._ask.include_usage:
                await write(_event(self._form.usage_chunk(self._reader.tally.usage())))
            await write(DONE, more=False)
        except RequestError as error:
            if error.reason == Reason.SLOW_CONSUMER:
                self._cut(scope)
            if not started:
                raise
            await write(_event(errors.body_of(error)), more=False)
        except asyncio.CancelledError:
            if started:  # the gateway stops; to a client that has gone nothing is sent
                stopping = unavailable(Reason.DRAINING, "the gateway is stopping; send the request again")
                with suppress(TimeoutError, ClientGoneError):
                    async with asyncio.timeout(LAST_WORD_S):
                        await write(_event(errors.body_of(stopping)), more=False)
            raise

    async def _write(self, scope: Scope, send: Send, message: Message) -> None:
        """Sends within the time that a client may take; beyond it the connection is cut, with what it has not read."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._write_timeout_s) as limit:
                for generation in self._generations:
                    generation.on_overflow = lambda: limit.reschedule(loop.time())
                await send(message)
        except TimeoutError:
            self._cut(scope)
        finally:
            for generation in self._generations:
                generation.on_overflow = None

    @staticmethod
    def _cut(scope: Scope) -> NoReturn:
        """Ends a connection whose client does not read: what waits to be sent would never let it close by itself."""
        log.info("connection cut: the stream was not read fast enough")
        abort: Callable[[], None] | None = scope.get("state", {}).get("abort")
        if abort is not None:
            abort()
        raise ClientGoneError


def _event(content: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks of its own."""
    return b"data: " + to_json(content) + b"\n\n"
