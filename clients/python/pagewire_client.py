"""A client of `pagewire.v1.InferenceService` made from its protocol alone: grpcio and generated stubs.

    client = Client("127.0.0.1:50051")
    for response in client.stream(GenerateRequest(text="The function returns", stop=StopParams(max_tokens=64))):
        print(response.text, end="", flush=True)

`generate` and `attach` are the calls as they are. `stream` adds what gRPC does not do: it goes on after a broken
connection, without a gap and without a repeat.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from pagewire.v1 import inference_pb2, inference_pb2_grpc

DETACHED = (("pagewire-detach", "true"),)
FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0


@dataclass
class ServiceError(Exception):
    """A call's status with its details. `reason` is empty where no server answered."""

    code: str
    """Name of the gRPC status code, such as `INVALID_ARGUMENT`."""
    message: str
    reason: str = ""
    """`google.rpc.ErrorInfo.reason`, one of docs/errors.md."""
    violations: list[tuple[str, str]] = field(default_factory=list)
    """Path and description of each wrong field, from `google.rpc.BadRequest`."""
    retry_after_s: float | None = None
    """From `google.rpc.RetryInfo`. None: a retry does not help."""

    def __str__(self) -> str:
        return f"{self.code} {self.reason}: {self.message}"


def service_error(error: Any) -> ServiceError:
    """Reads the details out of `grpc-status-details-bin`, a serialized `google.rpc.Status`."""
    result = ServiceError(error.code().name, error.details() or "")
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
                retry = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    result.reason = info.reason
                elif detail.Unpack(bad):
                    result.violations = [(entry.field, entry.description) for entry in bad.field_violations]
                elif detail.Unpack(retry):
                    result.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return result


@contextmanager
def rich_errors() -> Iterator[None]:
    """Turns gRPC's errors into ServiceError."""
    try:
        yield
    except grpc.RpcError as error:
        raise service_error(error) from None


class BrokenPromise(Exception):  # noqa: N818
    """A stream had a gap or a repeat: something between client and model is wrong."""


class Progress:
    """What has arrived of a request's sequences. `positions` is what Attach needs to go on."""

    def __init__(self, sequences: int) -> None:
        self.positions: dict[int, int] = {}
        self._finished: set[int] = set()
        self._sequences = sequences

    @property
    def done(self) -> bool:
        """Whether every sequence has finished."""
        return len(self._finished) == self._sequences

    def accept(self, response: inference_pb2.GenerateResponse) -> bool:
        """Takes a response. False: it only repeats the end of a sequence that had finished before a break."""
        if response.index in self._finished:
            return False
        expected = self.positions.get(response.index, 0)
        if response.first_token != expected:
            raise BrokenPromise(f"sequence {response.index}: token {response.first_token} instead of {expected}")
        self.positions[response.index] = expected + len(response.token_ids)
        if response.HasField("finish"):
            self._finished.add(response.index)
        return True


class Stream:
    """The responses of one Generate or Attach call. Leaving before the end must `drop` it."""

    def __init__(self, call: Any) -> None:  # a grpc.Call that is an iterator too
        self._call = call

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]:
        with rich_errors():
            yield from self._call

    def drop(self) -> None:
        """Ends the call at once. The server cancels the request unless it was opened detached."""
        self._call.cancel()


class Client:
    """One channel to a gateway; safe to use from several threads."""

    def __init__(self, address: str) -> None:
        """
        Args:
            address: `host:port` of a gateway, plaintext.
        """
        self.on_break: Callable[[ServiceError], None] | None = None
        """Called by `stream` before it tries to go on after a break."""
        self._channel = grpc.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def list_models(self) -> list[inference_pb2.Model]:
        """What is served. Raises ServiceError, as every call does."""
        with rich_errors():
            return list(self._stub.ListModels(inference_pb2.ListModelsRequest()).models)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        with rich_errors():
            return list(self._stub.Tokenize(inference_pb2.TokenizeRequest(text=text)).token_ids)

    def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids."""
        with rich_errors():
            return str(self._stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=token_ids)).text)

    def cancel(self, request_id: str) -> bool:
        """Ends a request by name. Returns whether it was live."""
        with rich_errors():
            return bool(self._stub.Cancel(inference_pb2.CancelRequest(request_id=request_id)).found)

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None, detached: bool = False
    ) -> Stream:
        """Starts a request.

        Args:
            timeout_s: the call's deadline, from now. A detached request is not bound to it.
            detached: the request lives on when the stream is dropped, and can be attached to.
        """
        return Stream(self._stub.Generate(request, timeout=timeout_s, metadata=DETACHED if detached else ()))

    def attach(self, request_id: str, positions: dict[int, int] | None = None) -> Stream:
        """Continues a request's stream. `positions`: first token wanted by index; an index not named: from token 0."""
        wanted = [
            inference_pb2.SequencePosition(index=index, first_token=first)
            for index, first in sorted((positions or {}).items())
        ]
        return Stream(self._stub.Attach(inference_pb2.AttachRequest(request_id=request_id, positions=wanted)))

    def stream(
        self, request: inference_pb2.GenerateRequest, resume_s: float = 30.0
    ) -> Generator[inference_pb2.GenerateResponse, None, None]:
        """Generate that survives broken connections. Closing the iterator early cancels the request.

        The request is opened detached under an id of its own. After UNAVAILABLE, Attach asks for the first tokens that
        have not arrived.

        Args:
            resume_s: how long to try without any progress.
        """
        request_id = request.request_id or uuid.uuid4().hex
        opened = inference_pb2.GenerateRequest()
        opened.CopyFrom(request)
        opened.request_id = request_id
        progress = Progress(sequences=max(1, request.sampling.n))
        attaching = retrying = False
        delay_s, since = FIRST_DELAY_S, time.monotonic()
        call: Stream | None = None
        try:
            while not progress.done:
                call = (
                    self.attach(request_id, progress.positions) if attaching else self.generate(opened, detached=True)
                )
                try:
                    for response in call:
                        delay_s, since = FIRST_DELAY_S, time.monotonic()
                        if progress.accept(response):
                            yield response
                    if not progress.done:
                        raise ServiceError("UNAVAILABLE", "the stream ended before its last token")
                except ServiceError as error:
                    if progress.done and error.code == "UNAVAILABLE":
                        return  # nothing is missing
                    attaching = attach_next(error, attaching, retrying, arrived=bool(progress.positions))
                    retrying = True
                    if time.monotonic() - since > resume_s:
                        raise
                    if self.on_break is not None:
                        self.on_break(error)
                    time.sleep(max(delay_s, error.retry_after_s or 0.0))
                    delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        finally:
            if call is not None and not progress.done:
                call.drop()
                with suppress(grpc.RpcError):  # if nobody answers, nobody is there to cancel it either
                    self._stub.Cancel(inference_pb2.CancelRequest(request_id=request_id), timeout=LONGEST_DELAY_S)


def attach_next(error: ServiceError, attaching: bool, retrying: bool, arrived: bool) -> bool:
    """What follows a failed call of `stream`: Attach (True) or Generate (False). Raises the error if neither helps.

    Args:
        attaching: the failed call was Attach.
        retrying: a call had failed before it, so the server may know the request already.
        arrived: some tokens have arrived.
    """
    if error.code == "UNAVAILABLE" and (retrying or arrived or not error.reason):
        return True
    if error.reason == "SLOW_CONSUMER":
        return True
    if error.code == "ALREADY_EXISTS" and retrying:
        return True  # the first Generate had reached the server after all
    if error.code == "NOT_FOUND" and attaching and not arrived:
        return False  # it had not
    raise error
