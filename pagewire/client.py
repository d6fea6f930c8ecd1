"""The synchronous client.

    from pagewire import Client

    with Client("127.0.0.1:50051") as client:
        for piece in client.generate("Once upon a time", max_tokens=64, temperature=0.8, seed=7):
            print(piece.text, end="", flush=True)

Streams survive a lost connection: see `pagewire.resume`. What it raises is in `pagewire.errors`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from pagewire import errors
from pagewire.requests import Message, Options, Prompt, chat_prompt, continue_request, generate_request, known_request
from pagewire.resume import NS_PER_S, Call, StreamState, ended_early
from pagewire.runtime.channel import client_options
from pagewire.runtime.rich_status import StatusDetails, decode
from pagewire.types import Model, Piece, PromptInfo, model_from
from pagewire.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_RESUME_S = 30.0
CONNECT_LIMIT_S = 10.0
CANCEL_LIMIT_S = 2.0

_unanswered: set[Any] = set()
"""Calls that nobody waits for; gRPC ends a call whose object is dropped."""


class Client:
    """A connection to a gateway. Safe to use from several threads.

    Args:
        address: `host:port` or `unix:PATH` of a gateway.
        resume_s: seconds for which a stream tries to go on after a break without getting anywhere; 0: never. Requests
            are then also cancelled by the server as soon as the connection is lost.
        on_break: called once per break of a stream, when it begins to try to go on; for telling a waiting person.
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
        self._channel = grpc.insecure_channel(address, options=client_options(internal=False))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._connected = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection. Streams that are still open end with CANCELLED; close them first to cancel them."""
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Continues a prompt.

        Args:
            prompt: text, or token ids.
            timeout: seconds for the whole stream; the server ends the request then. None: no limit.
            options: see `pagewire.requests.Options`.

        Returns:
            The stream of pieces. The request starts at once.

        Raises:
            StatusError: no server is there. Everything else is raised by the stream.
        """
        return self._open(generate_request(prompt, options), timeout)

    def chat(self, messages: Sequence[Message], *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Answers a chat: messages are {"role": ..., "content": ...}, oldest first. The rest is as in `generate`."""
        request = generate_request("", options)
        request.chat.CopyFrom(chat_prompt(messages))
        return self._open(request, timeout)

    def attach(self, request_id: str, *, timeout: float | None = None, n: int = 1) -> Stream:
        """The whole stream of a live or recently finished request, from its beginning; `n` is the request's own.

        Closing this stream does not cancel the request.
        """
        request = known_request(request_id, n)
        self._connect()
        return Stream(self._stub, StreamState(request, self._resume_ns, self._on_break), timeout, Call.ATTACH)

    def park(self, request_id: str, *, ttl_seconds: int = 0) -> dict[int, int]:
        """Takes a live request off the worker until `continue_request`; its streams end with reason "parked".

        Args:
            request_id: of a live request.
            ttl_seconds: for how long it stays parked; then it is cancelled. 0: the server's ceiling.

        Returns:
            The position of the next output token, by sequence.
        """
        answer = self._unary(self._stub.Park, inference_pb2.ParkRequest(request_id=request_id, ttl_seconds=ttl_seconds))
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
    ) -> Stream:
        """Takes a parked or held request up again, behind `more` (text or token ids) if that is given.

        The stream begins at the next output token. `n` is the number of sequences that go on.
        """
        resumed = continue_request(request_id, more, max_tokens, hold_seconds)
        request = known_request(request_id, n)
        self._connect()
        state = StreamState(request, self._resume_ns, self._on_break, resumed)
        return Stream(self._stub, state, timeout, Call.CONTINUE)

    def cancel(self, request_id: str) -> bool:
        """Ends a request in whatever state it is. False: no live request has that id."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        return bool(self._unary(self._stub.Cancel, request).found)

    def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """The token ids that the model sees for a text or a chat."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat_prompt(prompt))
        return list(self._unary(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """The text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return str(self._unary(self._stub.Detokenize, request).text)

    def models(self) -> list[Model]:
        """What the server serves."""
        answer = self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest())
        return [model_from(message) for message in answer.models]

    def _open(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Stream:
        self._connect()
        return Stream(self._stub, StreamState(request, self._resume_ns, self._on_break), timeout, Call.GENERATE)

    def _connect(self) -> None:
        """Connects once, so that a server that was never there is an error at once and not after `resume_s`."""
        if self._connected:
            return
        changed = threading.Event()
        states: list[grpc.ChannelConnectivity] = []

        def observe(state: grpc.ChannelConnectivity) -> None:
            if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                states.append(state)
                changed.set()

        self._channel.subscribe(observe, try_to_connect=True)
        changed.wait(CONNECT_LIMIT_S)
        self._channel.unsubscribe(observe)
        if grpc.ChannelConnectivity.READY not in states:
            raise errors.UnavailableError(StatusDetails(grpc.StatusCode.UNAVAILABLE, f"no server at {self.address}"))
        self._connected = True

    def _unary(self, method: Callable[..., Any], request: Any) -> Any:
        self._connect()
        try:
            return method(request)
        except grpc.RpcError as error:
            raise errors.from_details(decode(error)) from None


class Stream:
    """The output of one request, piece by piece, across reconnects.

    Iterate over it to the end, or close it: a stream that is closed or dropped before its end cancels the request.
    """

    def __init__(self, stub: Any, state: StreamState, timeout: float | None, first_call: Call) -> None:
        self._stub = stub
        self._state = state
        self._deadline_ns = None if timeout is None else time.monotonic_ns() + int(timeout * NS_PER_S)
        self._cancel_on_close = first_call is not Call.ATTACH
        self._closed = False
        self._prompt: PromptInfo | None = None
        state.next_call = first_call
        self._call = self._start()

    @property
    def request_id(self) -> str:
        """The request's name, for `Client.attach` and `Client.cancel` from elsewhere."""
        return self._state.request_id

    @property
    def prompt(self) -> PromptInfo | None:
        """What the server made of the prompt; None until the first piece."""
        return self._prompt

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while True:
            if self._closed:
                raise StopIteration
            response = self._next_response()
            if isinstance(response, StatusDetails):
                self._recover(response)
                continue
            if response is None:
                self._closed = True
                raise StopIteration
            try:
                piece = self._state.accept(response)
            except errors.StreamError:
                self.close()
                raise
            if piece is not None:
                self._prompt = self._prompt or piece.prompt
                return piece

    def _next_response(self) -> inference_pb2.GenerateResponse | StatusDetails | None:
        """What comes next: a response, the status of a call that failed, or None after the end."""
        try:
            response: inference_pb2.GenerateResponse = next(self._call)
        except StopIteration:
            return None if self._state.done else ended_early(self.request_id)
        except grpc.RpcError as error:
            return None if self._state.complete else decode(error)
        return response

    def text(self) -> str:
        """Reads the stream to its end and returns the text of sequence 0."""
        return "".join(piece.text for piece in self if piece.index == 0)

    def close(self) -> None:
        """Ends the stream; cancels the request unless it has ended. Waits for the server's answer for a short time."""
        self._end(wait=True)

    def _end(self, *, wait: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._call.cancel()
        if self._cancel_on_close and not self._state.done:
            request = inference_pb2.CancelRequest(request_id=self.request_id)
            # A failure means that the server or the channel has gone, and the request with it or soon after.
            with contextlib.suppress(grpc.RpcError, ValueError):
                answer = self._stub.Cancel.future(request, timeout=CANCEL_LIMIT_S)
                if wait:
                    answer.result()
                else:
                    _unanswered.add(answer)
                    answer.add_done_callback(_unanswered.discard)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Without waiting: this may run in any thread. A constructor that failed leaves no call to end.
        if getattr(self, "_call", None) is not None:
            self._end(wait=False)

    def _start(self) -> Any:
        timeout = None
        if self._deadline_ns is not None:
            timeout = max(0.0, (self._deadline_ns - time.monotonic_ns()) / NS_PER_S)
        if self._state.next_call is Call.CONTINUE:
            return self._stub.Continue(self._state.resumed, timeout=timeout, metadata=self._state.metadata())
        if self._state.next_call is Call.GENERATE:
            return self._stub.Generate(self._state.request, timeout=timeout, metadata=self._state.metadata())
        return self._stub.Attach(self._state.attach_request(), timeout=timeout, metadata=self._state.metadata())

    def _recover(self, details: StatusDetails) -> None:
        """Waits as long as the state says and calls again, or raises and ends the stream."""
        try:
            delay_ns = self._state.broke(details, time.monotonic_ns())
        except errors.PagewireError:
            self._closed = True
            raise
        time.sleep(delay_ns / NS_PER_S)
        if not self._closed:  # by another thread, meanwhile
            self._call = self._start()
