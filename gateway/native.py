"""InferenceService: the native gRPC front door. Handlers parse, call and reply; they decide nothing.

Methods are registered with bytes and parsed inside, because a message that does not parse would otherwise reach the
client as UNKNOWN with a Python exception's text (measured with grpc.aio 1.85).
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from gateway.errors import Reason, RequestError
from gateway.generation import Generation
from gateway.requests import RequestPath
from pagewire.runtime import rich_status
from pagewire.runtime.logs import get_logger
from pagewire.v1 import inference_pb2

SERVICE = "pagewire.v1.InferenceService"
DETACH_KEY = "pagewire-detach"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Deadlines beyond this are none: gRPC reports an absent one as a very large number.
LONGEST_DEADLINE_S = 365 * 24 * 3600.0

log = get_logger(__name__)

Context = grpc.aio.ServicerContext[bytes, Message]
Handler = Callable[[Any, Any, Any], Awaitable[Any]]
Parsed = TypeVar("Parsed", bound=Message)


def parse(kind: type[Parsed], data: bytes) -> Parsed:
    """The message in `data`. Raises RequestError if there is none."""
    try:
        return kind.FromString(data)
    except (DecodeError, UnicodeDecodeError, ValueError):
        message = f"the bytes are no {kind.DESCRIPTOR.name} message"
        raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE, message) from None


async def abort(context: Any, error: RequestError) -> None:
    """Ends a call with an error and its details; does not return."""
    status = rich_status.to_grpc(error.to_status())
    if error.retry_after_ns:
        # What retrying clients obey by themselves (gRFC A6).
        pushback = (PUSHBACK_KEY, str(max(1, error.retry_after_ns // 1_000_000)))
        context.set_trailing_metadata((pushback,))
        status = status._replace(trailing_metadata=(*status.trailing_metadata, pushback))  # type: ignore[attr-defined]
    await context.abort_with_status(status)


def answering(handler: Handler) -> Handler:
    """Maps what a handler raises to a status. Anything unforeseen is INTERNAL, logged by place and kind only."""

    async def guarded(self: Any, data: Any, context: Any) -> Any:
        try:
            return await handler(self, data, context)
        except RequestError as error:
            await abort(context, error)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            # An exception's text may hold a piece of a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request failed unforeseen", kind=type(error).__name__, frames=frames)
            await abort(context, RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))
        return None

    return guarded


class InferenceServicer:
    """Handlers of InferenceService."""

    def __init__(self, path: RequestPath, write_timeout_s: float) -> None:
        """
        Args:
            path: what all front doors share.
            write_timeout_s: seconds for one write before the client counts as slow.
        """
        self._path = path
        self._write_timeout_s = write_timeout_s

    @answering
    async def generate(self, data: bytes, context: Any) -> None:
        """Generate: streams until the request ends or the client goes."""
        request = parse(inference_pb2.GenerateRequest, data)
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        generation = await self._path.generate(
            request,
            timeout_ns=timeout_ns(context),
            detached=detached(context),
            traceparent=metadata.get("traceparent", "")[:128],
        )
        await self._deliver(generation, context)

    @answering
    async def attach(self, data: bytes, context: Any) -> None:
        """Attach: streams from the wanted positions."""
        await self._deliver(self._path.attach(parse(inference_pb2.AttachRequest, data)), context)

    @answering
    async def park(self, data: bytes, context: Any) -> inference_pb2.ParkResponse:
        """Park."""
        return await self._path.park(parse(inference_pb2.ParkRequest, data))

    @answering
    async def resume(self, data: bytes, context: Any) -> None:
        """Continue: streams from the next token on until the request ends or the client goes."""
        request = parse(inference_pb2.ContinueRequest, data)
        generation = await self._path.resume(request, timeout_ns=timeout_ns(context), detached=detached(context))
        await self._deliver(generation, context)

    @answering
    async def cancel(self, data: bytes, context: Any) -> inference_pb2.CancelResponse:
        """Cancel."""
        request = parse(inference_pb2.CancelRequest, data)
        return inference_pb2.CancelResponse(found=await self._path.cancel(request.request_id))

    @answering
    async def tokenize(self, data: bytes, context: Any) -> inference_pb2.TokenizeResponse:
        """Tokenize."""
        request = parse(inference_pb2.TokenizeRequest, data)
        return inference_pb2.TokenizeResponse(token_ids=await self._path.tokenize(request))

    @answering
    async def detokenize(self, data: bytes, context: Any) -> inference_pb2.DetokenizeResponse:
        """Detokenize."""
        request = parse(inference_pb2.DetokenizeRequest, data)
        return inference_pb2.DetokenizeResponse(text=self._path.detokenize(request))

    @answering
    async def list_models(self, data: bytes, context: Any) -> inference_pb2.ListModelsResponse:
        """ListModels."""
        parse(inference_pb2.ListModelsRequest, data)
        return inference_pb2.ListModelsResponse(models=self._path.models())

    async def _deliver(self, generation: Generation, context: Any) -> None:
        """Writes a generation's responses. One write at a time, and none for longer than the client may take."""
        loop = asyncio.get_running_loop()
        try:
            while (response := await generation.next()) is not None:
                try:
                    async with asyncio.timeout(self._write_timeout_s) as limit:
                        generation.on_overflow = lambda limit=limit: limit.reschedule(loop.time())
                        await context.write(response)
                except TimeoutError:
                    message = "the stream was not read fast enough; resume with Attach"
                    raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_CONSUMER, message) from None
                finally:
                    generation.on_overflow = None
        finally:
            # Before the status goes out: a client that does not read would hold the request's memory with it.
            generation.close()

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service for `server.add_generic_rpc_handlers`."""

        def serialize(message: Message) -> bytes:
            return message.SerializeToString()

        streams = {"Generate": self.generate, "Attach": self.attach, "Continue": self.resume}
        calls = {
            "Cancel": self.cancel,
            "Park": self.park,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
            "ListModels": self.list_models,
        }
        methods: dict[str, Any] = {
            name: grpc.unary_stream_rpc_method_handler(handler, response_serializer=serialize)
            for name, handler in streams.items()
        }
        methods |= {
            name: grpc.unary_unary_rpc_method_handler(handler, response_serializer=serialize)
            for name, handler in calls.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


def detached(context: Any) -> bool:
    """Whether the call asks for a request that outlives it."""
    return any(key == DETACH_KEY and str(value).lower() == "true" for key, value in context.invocation_metadata() or ())


def timeout_ns(context: Any) -> int | None:
    """Nanoseconds to the call's deadline, at least 1; None without one."""
    remaining = context.time_remaining()
    if remaining is None or remaining > LONGEST_DEADLINE_S:
        return None
    return max(1, int(remaining * 1e9))
