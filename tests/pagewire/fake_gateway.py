"""An InferenceService whose answers are known: token i of every sequence is i, its text is "<i>"."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from pagewire.runtime import rich_status
from pagewire.runtime.channel import bind, server_options
from pagewire.v1 import inference_pb2, inference_pb2_grpc


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Keeps requests by id, so that Attach can continue them.

    Args:
        break_after: after that many responses of a call, the call is broken like a lost connection is; per call, in
            order. Calls beyond the list are not broken. -1: broken before the request is taken in.
    """

    def __init__(self, *, break_after: tuple[int, ...] = ()) -> None:
        self.break_after = list(break_after)
        self.requests: dict[str, inference_pb2.GenerateRequest] = {}
        self.calls: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled: list[str] = []
        self.cancel_seen = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        self.calls.append("Generate")
        self.metadata.append(dict(context.invocation_metadata()))
        if self.break_after and self.break_after[0] == -1:
            self.break_after.pop(0)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        said = request.chat.messages[-1].content if request.chat.messages else request.text
        if said == "refuse":
            status = rich_status.status(
                grpc.StatusCode.INVALID_ARGUMENT,
                "the request is wrong",
                reason="FIELD_OUT_OF_RANGE",
                violations=[("sampling.temperature", "must be at most 100")],
            )
            await context.abort_with_status(rich_status.to_grpc(status))
        if said == "no worker":
            status = rich_status.status(
                grpc.StatusCode.UNAVAILABLE, "no worker is ready", reason="NO_WORKER", retry_after_ns=1_000_000_000
            )
            await context.abort_with_status(rich_status.to_grpc(status))
        if request.request_id in self.requests:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "a live request has that id")
        self.requests[request.request_id] = request
        await self._stream(request, {}, context)

    async def Attach(self, request: inference_pb2.AttachRequest, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        self.calls.append("Attach")
        if request.request_id not in self.requests:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such request")
        positions = {position.index: position.first_token for position in request.positions}
        await self._stream(self.requests[request.request_id], positions, context)

    async def Cancel(self, request: inference_pb2.CancelRequest, context: grpc.aio.ServicerContext) -> object:  # noqa: N802
        self.cancelled.append(request.request_id)
        self.cancel_seen.set()
        return inference_pb2.CancelResponse(found=request.request_id in self.requests)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext) -> object:  # noqa: N802
        text = request.text or "|".join(f"{message.role}:{message.content}" for message in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=text.encode())

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext) -> object:  # noqa: N802
        return inference_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext) -> object:  # noqa: N802
        model = inference_pb2.Model(name="fake", max_model_len=128, vocab_size=256, block_size=16, ready=True)
        return inference_pb2.ListModelsResponse(models=[model])

    async def _stream(
        self, request: inference_pb2.GenerateRequest, positions: dict[int, int], context: grpc.aio.ServicerContext
    ) -> None:
        limit = self.break_after.pop(0) if self.break_after else None
        sent = 0
        total = request.stop.max_tokens
        for token in range(total):
            for index in range(max(1, request.sampling.n)):
                if token < positions.get(index, 0):
                    continue
                if limit is not None and sent == limit:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                if sent == 1:
                    await self.hold.wait()
                response = inference_pb2.GenerateResponse(
                    request_id=request.request_id, index=index, first_token=token, token_ids=[token], text=f"<{token}>"
                )
                if sent == 0:
                    response.prompt.prompt_tokens = 3
                if token == total - 1:
                    response.finish.reason = inference_pb2.FINISH_REASON_LENGTH
                    response.finish.usage.completion_tokens = total
                await context.write(response)
                sent += 1


@asynccontextmanager
async def serving(gateway: FakeGateway) -> AsyncIterator[str]:
    """Serves on a free loopback port; gives the address."""
    server = grpc.aio.server(options=server_options(internal=False))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(gateway, server)
    address = await bind(server, "127.0.0.1:0")
    await server.start()
    try:
        yield address
    finally:
        gateway.hold.set()
        await server.stop(None)
