"""The HTTP application: routes, and around them the request id, API keys, the body's limits and the last resort."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import traceback
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.console import pages
from gateway.errors import Reason, RequestError, unavailable
from gateway.openai import errors, translate
from gateway.openai.answer import Answer, ClientGoneError
from gateway.openai.api_keys import ApiKeys
from gateway.openai.fields import parse_object
from gateway.openai.token_texts import TokenTexts
from gateway.openai.translate import Ask, Caller
from gateway.requests import RequestPath
from gateway.validator import ModelLimits
from pagewire.runtime.logs import get_logger

log = get_logger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""What needs no API key: a probe has none. The console's files come to it: a browser asks for its key there."""
REQUEST_ID = b"x-request-id"
LONGEST_REQUEST_ID = 100
BODY_TIMEOUT_S = 30.0
"""Seconds for a whole body; 8 MiB at 3 Mbit/s."""
LINGER_S = 2.0
LINGER_BYTES = 64 << 20
"""How long, and how much, of a body that is too large is still taken and thrown away."""
Translate = Callable[[dict[str, Any], ModelLimits, Caller], Ask]


@dataclass(frozen=True)
class Door:
    """What the application needs of the gateway."""

    path: RequestPath
    texts: TokenTexts
    keys: ApiKeys | None
    """None: no API key is asked for."""
    ready: Callable[[], bool]
    """Whether requests can be served now."""
    started: int
    """Unix time at which the gateway was started: the models' `created`."""
    max_body_bytes: int
    write_timeout_s: float
    console: Callable[[], Response] | None = None
    """Makes the answer to /console/events; None: there is no console."""


def make_app(door: Door) -> ASGIApp:
    """The application for uvicorn."""
    app = FastAPI(title="Pagewire", docs_url=None, redoc_url=None, openapi_url=None)

    async def health() -> Response:
        return Response(status_code=200 if door.ready() else 503)

    async def models() -> Response:
        return _json({"object": "list", "data": _models(door)})

    async def model(name: str) -> Response:
        served = door.path.model(name).name
        return _json(next(entry for entry in _models(door) if entry["id"] == served))

    async def completions(request: Request) -> Response:
        return await answer(request, translate.completion)

    async def chat_completions(request: Request) -> Response:
        return await answer(request, translate.chat)

    async def answer(request: Request, translated: Translate) -> Response:
        data = parse_object(await _body(request, door.max_body_bytes))
        name = data.get("model")
        limits = door.path.model(name if isinstance(name, str) else "")
        ask = translated(data, limits, request.state.caller)
        traceparent = request.headers.get("traceparent", "")[:128]
        return Answer(door.path, ask, door.texts, door.write_timeout_s, traceparent)

    app.add_api_route("/health", health, methods=["GET", "HEAD"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"], response_model=None)
    files = pages.load_files() if door.console is not None else {}
    for path, file in files.items():
        app.add_api_route(path, _file(file), methods=["GET", "HEAD"], response_model=None)
    if door.console is not None:
        app.add_api_route("/", _to_console, methods=["GET", "HEAD"], response_model=None)
        app.add_api_route("/console/events", _console_events(door.console), methods=["GET"], response_model=None)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(Exception, _unforeseen)
    return Edge(app, door, OPEN_PATHS | files.keys() | {"/"})


class Edge:
    """Around every request: its id, its key, its size as announced, and an answer whatever happens."""

    def __init__(self, app: ASGIApp, door: Door, open_paths: frozenset[str]) -> None:
        self._app = app
        self._open_paths = open_paths
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request_id, unique = _request_id(headers.get(REQUEST_ID, b""))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id.encode())]
            await send(message)

        try:
            tenant = self._tenant(scope["path"], headers)
            _check_length(headers, self._door.max_body_bytes)
            scope.setdefault("state", {})["caller"] = Caller(request_id=unique, tenant=tenant)
            await self._app(scope, receive, send_with_id)
        except RequestError as error:
            await _error_response(error)(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not started:
                stopping = unavailable(Reason.DRAINING, "the gateway is stopping; send the request again")
                await _error_response(stopping)(scope, receive, send_with_id)
            raise
        except Exception as error:
            # An exception's text may hold a piece of a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request failed unforeseen", kind=type(error).__name__, frames=frames)
            if not started:
                await _error_response(_internal())(scope, receive, send_with_id)

    def _tenant(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        if self._door.keys is None or path in self._open_paths:
            return None
        return self._door.keys.tenant_of(headers.get(b"authorization", b"").decode("latin-1"))


def _request_id(given: bytes) -> tuple[str, str]:
    """The id that the answer carries, and the request's own name in the scheduler.

    A client's x-request-id comes back, but several requests may carry the same one: services pass theirs on. So it is
    only the beginning of the name. One that is no short printable text is replaced: it is for logs, not worth an error.
    """
    text = given.decode("latin-1")
    if 0 < len(text) <= LONGEST_REQUEST_ID and all(" " <= char <= "~" for char in text):
        return text, f"{text}-{secrets.token_hex(4)}"
    fresh = uuid.uuid4().hex
    return fresh, fresh


def _check_length(headers: dict[bytes, bytes], limit: int) -> None:
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > limit:
        raise _too_large(limit)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body. Raises RequestError if it is too large or too slow."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                data += message.get("body", b"")
                if len(data) > limit:
                    raise _too_large(limit)
                if not message.get("more_body", False):
                    return bytes(data)
    except TimeoutError:
        text = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, Reason.BODY_TIMEOUT, text) from None


def _too_large(limit: int) -> RequestError:
    message = f"the body is larger than {limit} bytes"
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.BODY_TOO_LARGE, message)


def _internal() -> RequestError:
    return RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error")


def _models(door: Door) -> list[dict[str, Any]]:
    return [
        {
            "id": model.name,
            "object": "model",
            "created": door.started,
            "owned_by": "pagewire",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }
        for model in door.path.models()
    ]


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json")


class _LingeringResponse(Response):
    """Answers at once and goes on reading for a while: closing a socket that is still sent to would destroy the answer
    on its way (RFC 9112, section 9.6)."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        taken = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while taken < LINGER_BYTES:
                    message = await receive()
                    taken += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b""})


def _error_response(error: RequestError) -> Response:
    kind = _LingeringResponse if error.reason == Reason.BODY_TOO_LARGE else Response
    return kind(
        errors.encoded(error),
        status_code=errors.status_of(error),
        headers=errors.headers_of(error),
        media_type="application/json",
    )


def _file(file: pages.File) -> Callable[[Request], Awaitable[Response]]:
    headers = {**pages.HEADERS, "etag": file.etag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return answer


def _console_events(make: Callable[[], Response]) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return make()

    return answer


async def _to_console() -> Response:
    return Response(status_code=307, headers={"location": pages.PAGE.removeprefix("/")})


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error_response(error)


async def _no_route(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        wrong = RequestError(grpc.StatusCode.UNIMPLEMENTED, Reason.METHOD_NOT_ALLOWED, "another HTTP method is needed")
    else:
        wrong = RequestError(grpc.StatusCode.NOT_FOUND, Reason.NO_SUCH_PATH, "there is no such path here")
    response = _error_response(wrong)
    response.headers.update(error.headers or {})
    return response


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unforeseen(_request: Request, _error: Exception) -> Response:
    return _error_response(_internal())
