"""The asyncio client: the same verbs as `pagewire.client`, awaited.

from pagewire.aio import AsyncClient

async with AsyncClient("127.0.0.1:50051") as client:
    async for piece in client.generate("Once upon a time", max_tokens=64):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc
import grpc.aio

from pagewire import errors
from pagewire.client import CANCEL_LIMIT_S, CONNECT_LIMIT_S, DEFAULT_ADDRESS, DEFAULT_RESUME_S
from pagewire.requests import Message, Options, Prompt, chat_prompt, continue_request, generate_request, known_request
from pagewire.resume import NS_PER_S, Call, StreamState, ended_early
from pagewire.runtime.channel import client_options
from pagewire.runtime.rich_status import StatusDetails, decode
from pagewire.types import Model, Piece, model_from
from pagewire.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """A connection to a gateway, for one event loop. Make it inside the loop.

    Args:
        address: `host:port` or `unix:PATH` of a gateway.
        resume_s: seconds for which a stream tries to go on after a break without getting anywhere; 0: never.
        on_break: called once per break of a stream, when it begins to try to go on.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        resume_s: float = DEFAULT_RESUME_S,
        on_break: Callable[[], None] | None = None,
    ) -> None:
        self.address = address
        self._on_break = on_break
        self._resume_ns = int(resume_s * NS_PER_S)
        self._channel = grpc.aio.insecure_channel(address, options=client_options(internal=False))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._connected = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection. Streams that are still open end."""
        await self._channel.close(None)

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Piece]:
        """Continues a prompt; arguments as in `Client.generate`. The request starts with the first iteration.

        Leaving the loop early cancels the request; to do it at once, `await stream.aclose()`.
        """
        return self._stream(generate_request(prompt, options), timeout, Call.GENERATE)

    def chat(
        self, messages: Sequence[Message], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Piece]:
        """Answers a chat; arguments as in `Client.chat`."""
        request = generate_request("", options)
        request.chat.CopyFrom(chat_prompt(messages))
        return self._stream(request, timeout, Call.GENERATE)

    def attach(self, request_id: str, *, timeout: float | None = None, n: int = 1) -> AsyncGenerator[Piece]:
        """The whole stream of a live or recently finished request. Leaving the loop early does not cancel it."""
        request = known_request(request_id, n)
        return self._stream(request, timeout, Call.ATTACH)

    async def park(self, request_id: str, *, ttl_seconds: int = 0) -> dict[int, int]:
        """Takes a live request off the worker; as `Client.park`."""
        request = inference_pb2.ParkRequest(request_id=request_id, ttl_seconds=ttl_seconds)
        answer = await self._unary(self._stub.Park, request)
        return {position.index: position.first_token for position in answer.positions}

    def continue_request(
        self,
        request_id: str,
        more: Prompt | None = None,
        *,
        max_tokens: int | None = None,
        hold_seconds: int | None = None,
        timeout: float | None = None,
        n: int = 1,
    ) -> AsyncGenerator[Piece]:
        """Takes a parked or held request up again; as `Client.continue_request`, from the first iteration on."""
        resumed = continue_request(request_id, more, max_tokens, hold_seconds)
        request = known_request(request_id, n)
        return self._stream(request, timeout, Call.CONTINUE, resumed)

    async def cancel(self, request_id: str) -> bool:
        """Ends a request in whatever state it is. False: no live request has that id."""
        return bool((await self._unary(self._stub.Cancel, inference_pb2.CancelRequest(request_id=request_id))).found)

    async def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """The token ids that the model sees for a text or a chat."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat_prompt(prompt))
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return str((await self._unary(self._stub.Detokenize, request)).text)

    async def models(self) -> list[Model]:
        """What the server serves."""
        answer = await self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest())
        return [model_from(message) for message in answer.models]

    async def _unary(self, method: Any, request: Any) -> Any:
        await self._connect()
        try:
            return await method(request)
        except grpc.aio.AioRpcError as error:
            raise errors.from_details(decode(error)) from None

    async def _connect(self) -> None:
        """Connects once, so that a server that was never there is an error at once and not after `resume_s`."""
        if self._connected:
            return
        deadline = time.monotonic() + CONNECT_LIMIT_S
        state = self._channel.get_state(try_to_connect=True)
        while state not in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._channel.wait_for_state_change(state)
            except TimeoutError:
                break
            state = self._channel.get_state(try_to_connect=True)
        if state is not grpc.ChannelConnectivity.READY:
            raise errors.UnavailableError(StatusDetails(grpc.StatusCode.UNAVAILABLE, f"no server at {self.address}"))
        self._connected = True

    async def _stream(
        self,
        request: inference_pb2.GenerateRequest,
        timeout: float | None,
        first_call: Call,
        resumed: inference_pb2.ContinueRequest | None = None,
    ) -> AsyncGenerator[Piece]:
        await self._connect()
        state = StreamState(request, self._resume_ns, self._on_break, resumed)
        state.next_call = first_call
        deadline_ns = None if timeout is None else time.monotonic_ns() + int(timeout * NS_PER_S)
        call: Any = None
        given_up = False
        try:
            while not state.done:
                call = self._start(state, deadline_ns)
                details = ended_early(state.request_id)
                try:
                    async for response in call:
                        piece = state.accept(response)
                        if piece is not None:
                            yield piece
                except grpc.aio.AioRpcError as error:
                    if state.complete:
                        break
                    details = decode(error)
                else:
                    if state.done:
                        break
                try:
                    delay_ns = state.broke(details, time.monotonic_ns())
                except errors.PagewireError:
                    given_up = True
                    raise
                await asyncio.sleep(delay_ns / NS_PER_S)
        finally:
            if not state.done and not given_up:
                await self._abandon(call, state, cancel=first_call is not Call.ATTACH)

    def _start(self, state: StreamState, deadline_ns: int | None) -> Any:
        timeout = None if deadline_ns is None else max(0.0, (deadline_ns - time.monotonic_ns()) / NS_PER_S)
        if state.next_call is Call.CONTINUE:
            return self._stub.Continue(state.resumed, timeout=timeout, metadata=state.metadata())
        if state.next_call is Call.GENERATE:
            return self._stub.Generate(state.request, timeout=timeout, metadata=state.metadata())
        return self._stub.Attach(state.attach_request(), timeout=timeout, metadata=state.metadata())

    async def _abandon(self, call: Any, state: StreamState, *, cancel: bool) -> None:
        if call is not None:
            call.cancel()
        if cancel:
            try:
                request = inference_pb2.CancelRequest(request_id=state.request_id)
                await self._stub.Cancel(request, timeout=CANCEL_LIMIT_S)
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError):
                pass  # the server, the channel or the loop has gone, and the request with it or soon after
