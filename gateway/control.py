"""ControlService: passed through to the scheduler as bytes, so that a new method or field needs no change here."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from gateway.errors import Reason, unavailable
from gateway.native import abort
from gateway.session import SchedulerLink
from pagewire.v1 import control_pb2

SERVICE = "pagewire.v1.ControlService"
UNARY_TIMEOUT_S = 10.0
DETAILS_KEY = "grpc-status-details-bin"


def handlers(link: SchedulerLink) -> grpc.GenericRpcHandler[Any, Any]:
    """The service for `server.add_generic_rpc_handlers`, with every method that the proto has."""
    methods: dict[str, Any] = {}
    for method in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods:
        path = f"/{SERVICE}/{method.name}"
        if method.server_streaming:
            methods[method.name] = grpc.unary_stream_rpc_method_handler(_streaming(link, path))
        else:
            methods[method.name] = grpc.unary_unary_rpc_method_handler(_unary(link, path))
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _unary(link: SchedulerLink, path: str) -> Any:
    async def handler(data: bytes, context: Any) -> bytes:
        channel: Any = link.channel
        call = channel.unary_unary(path)
        try:
            answer: bytes = await call(data, timeout=UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
            raise
        return answer

    return handler


def _streaming(link: SchedulerLink, path: str) -> Any:
    async def handler(data: bytes, context: Any) -> None:
        channel: Any = link.channel
        call = channel.unary_stream(path)(data)
        try:
            async for message in call:
                await context.write(message)
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        finally:
            call.cancel()

    return handler


async def _pass_on(context: Any, error: grpc.aio.AioRpcError) -> None:
    """Ends the call as the scheduler ended it; a broken connection becomes our own UNAVAILABLE. Does not return."""
    trailing: Any = error.trailing_metadata() or ()
    details = [(key, value) for key, value in trailing if key == DETAILS_KEY]
    if not details and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        await abort(context, unavailable(Reason.NO_SCHEDULER, "the scheduler cannot be reached"))
    known = details or error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)
    message = (error.details() or "") if known else "the scheduler could not answer"
    await context.abort(error.code(), message, tuple(details))
