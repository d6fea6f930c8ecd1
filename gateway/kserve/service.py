"""inference.GRPCInferenceService: the Open Inference Protocol's six calls and Triton's ModelStreamInfer.

On a stream every request is answered by itself: responses carry its id, and what goes wrong with one is said in-band,
unless the call's metadata ask for a real status with `triton_grpc_error: true`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from gateway.errors import Reason, RequestError, Violation, invalid
from gateway.generation import Generation
from gateway.kserve import tensors, translate
from gateway.kserve.translate import Ask
from gateway.native import answering, parse, timeout_ns
from gateway.openai.forms import finite
from gateway.requests import RequestPath
from pagewire import __version__
from pagewire.v1 import inference_pb2
from pagewire.v1 import open_inference_pb2 as oip

SERVICE = "inference.GRPCInferenceService"
VERSION = "1"
STATUS_WANTED = "triton_grpc_error"
REQUESTS_PER_STREAM = 256
"""Requests of one stream that are worked on at a time; what comes beyond waits in the client's connection."""
REASONS = {
    inference_pb2.FINISH_REASON_STOP: b"stop",
    inference_pb2.FINISH_REASON_LENGTH: b"length",
    inference_pb2.FINISH_REASON_CANCELLED: b"cancelled",
    inference_pb2.FINISH_REASON_DEADLINE: b"deadline",
    inference_pb2.FINISH_REASON_ERROR: b"error",
    inference_pb2.FINISH_REASON_PARKED: b"parked",
}
INPUTS = {
    translate.TEXT: "BYTES",
    translate.TOKEN_IDS: "INT32",
    translate.SAMPLING: "BYTES",
    "stream": "BOOL",
    "exclude_input_in_output": "BOOL",
}


class OpenInferenceServicer:
    """Handlers of GRPCInferenceService."""

    def __init__(self, path: RequestPath, ready: Callable[[], bool], write_timeout_s: float) -> None:
        """
        Args:
            path: what all front doors share.
            ready: whether requests can be served now.
            write_timeout_s: seconds for one write before the client counts as slow.
        """
        self._path = path
        self._ready = ready
        self._write_timeout_s = write_timeout_s

    @answering
    async def server_live(self, data: bytes, context: Any) -> oip.ServerLiveResponse:
        """ServerLive."""
        parse(oip.ServerLiveRequest, data)
        return oip.ServerLiveResponse(live=True)

    @answering
    async def server_ready(self, data: bytes, context: Any) -> oip.ServerReadyResponse:
        """ServerReady: the scheduler is there and a worker can run requests."""
        parse(oip.ServerReadyRequest, data)
        return oip.ServerReadyResponse(ready=self._ready())

    @answering
    async def model_ready(self, data: bytes, context: Any) -> oip.ModelReadyResponse:
        """ModelReady: false for a model that is not served."""
        request = parse(oip.ModelReadyRequest, data)
        try:
            self._model(request.name, request.version)
        except RequestError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=self._ready())

    @answering
    async def server_metadata(self, data: bytes, context: Any) -> oip.ServerMetadataResponse:
        """ServerMetadata."""
        parse(oip.ServerMetadataRequest, data)
        return oip.ServerMetadataResponse(name="pagewire", version=__version__)

    @answering
    async def model_metadata(self, data: bytes, context: Any) -> oip.ModelMetadataResponse:
        """ModelMetadata: names, types and shapes of the tensors."""
        request = parse(oip.ModelMetadataRequest, data)
        response = oip.ModelMetadataResponse(
            name=self._model(request.name, request.version), versions=[VERSION], platform="pagewire"
        )
        for name, datatype in INPUTS.items():
            response.inputs.add(name=name, datatype=datatype, shape=[-1 if name == translate.TOKEN_IDS else 1])
        for name, datatype in translate.OUTPUTS.items():
            response.outputs.add(name=name, datatype=datatype, shape=[-1])
        return response

    @answering
    async def model_infer(self, data: bytes, context: Any) -> oip.ModelInferResponse:
        """ModelInfer: the whole output at once."""
        ask, generation = await self._begin(parse(oip.ModelInferRequest, data), context)
        try:
            if ask.stream:
                raise invalid([Violation("stream", "must be false in ModelInfer: ModelStreamInfer streams")])
            return await _whole(ask, generation)
        finally:
            generation.close()

    @answering
    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """ModelStreamInfer: many requests on one stream, each answered as its tokens come."""
        real_status = _metadata(context).get(STATUS_WANTED, "").lower() == "true"
        writer = _Writer(context, self._write_timeout_s)
        places = asyncio.Semaphore(REQUESTS_PER_STREAM)

        async def serve(message: oip.ModelInferRequest) -> None:
            try:
                await self._answer(message, context, writer)
            except RequestError as error:
                if real_status or error.reason == Reason.SLOW_CONSUMER:
                    raise
                await writer.write(_in_band(message, error))
            finally:
                places.release()

        failure: RequestError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                async for data in requests:
                    await places.acquire()
                    group.create_task(serve(parse(oip.ModelInferRequest, data)))
        except* RequestError as failures:
            # One request's end is the stream's: the first says why, the others were cancelled.
            first = failures.exceptions[0]
            assert isinstance(first, RequestError)
            failure = first
        if failure is not None:
            raise failure

    # Inside.

    async def _begin(self, message: oip.ModelInferRequest, context: Any) -> tuple[Ask, Generation]:
        """Starts a request. Raises RequestError with the names of this protocol."""
        self._model(message.model_name, message.model_version)
        ask = translate.read(message, self._path.model(message.model_name))
        try:
            limits = [limit for limit in (timeout_ns(context), ask.timeout_ns) if limit is not None]
            generation = await self._path.generate(
                ask.request,
                timeout_ns=min(limits, default=None),
                traceparent=_metadata(context).get("traceparent", "")[:128],
            )
        except RequestError as error:
            raise translate.renamed(error, ask.request) from None
        return ask, generation

    async def _answer(self, message: oip.ModelInferRequest, context: Any, writer: _Writer) -> None:
        """Answers one request of a stream."""
        ask, generation = await self._begin(message, context)
        generation.on_overflow = writer.give_up
        try:
            if ask.stream is False:
                response = await _whole(ask, generation)
                response.parameters[translate.FINAL].bool_param = not ask.empty_final
                await writer.write(oip.ModelStreamInferResponse(infer_response=response))
            else:
                left = generation.n
                while (piece := await generation.next()) is not None:
                    left -= piece.HasField("finish")
                    response = _piece(ask, piece)
                    ended = left == 0 and not ask.empty_final and piece.finish.reason not in _ERRORS
                    response.parameters[translate.FINAL].bool_param = ended
                    await writer.write(oip.ModelStreamInferResponse(infer_response=response))
        finally:
            generation.close()
        if ask.empty_final:
            response = _response(ask)
            response.parameters[translate.FINAL].bool_param = True
            await writer.write(oip.ModelStreamInferResponse(infer_response=response))

    def _model(self, name: str, version: str) -> str:
        """The served name. Raises RequestError for another model or version."""
        served = self._path.model(name).name
        if version not in ("", VERSION):
            text = f"model_version: there is only version {VERSION!r} of {served!r}"
            raise RequestError(grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, text)
        return served

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service for `server.add_generic_rpc_handlers`."""

        def serialize(message: Message) -> bytes:
            return message.SerializeToString()

        calls = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(handler, response_serializer=serialize)
            for name, handler in calls.items()
        }
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer, response_serializer=serialize
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


_ERRORS = (inference_pb2.FINISH_REASON_ERROR, inference_pb2.FINISH_REASON_DEADLINE)
"""Reasons behind which an error follows, which is then the last response."""


def _metadata(context: Any) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _response(ask: Ask) -> oip.ModelInferResponse:
    return oip.ModelInferResponse(model_name=ask.model, model_version=VERSION, id=ask.id)


def _in_band(message: oip.ModelInferRequest, error: RequestError) -> oip.ModelStreamInferResponse:
    """An error as Triton says it, with code and reason where programs find them."""
    response = oip.ModelInferResponse(model_name=message.model_name, id=message.id)
    response.parameters[translate.FINAL].bool_param = True
    response.parameters["code"].string_param = error.code.name
    response.parameters["reason"].string_param = str(error.reason)
    return oip.ModelStreamInferResponse(error_message=f"{error.reason}: {error.message}", infer_response=response)


class _Writer:
    """Writes to one stream for all of its requests, one message at a time."""

    def __init__(self, context: Any, timeout_s: float) -> None:
        """
        Args:
            context: the call's.
            timeout_s: seconds for one write before the client counts as slow.
        """
        self._context = context
        self._timeout_s = timeout_s
        self._writing = asyncio.Lock()
        self._limit: asyncio.Timeout | None = None
        self._stuck = False
        """A write was given up: gRPC still holds it and takes no other."""

    async def write(self, message: oip.ModelStreamInferResponse) -> None:
        """One message, after those before it. Raises RequestError if the client does not read."""
        async with self._writing:
            if not self._stuck:
                try:
                    async with asyncio.timeout(self._timeout_s) as self._limit:
                        await self._context.write(message)
                except TimeoutError:
                    self._stuck = True
                finally:
                    self._limit = None
            if self._stuck:
                text = "the stream was not read fast enough"
                raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_CONSUMER, text)

    def give_up(self) -> None:
        """Ends a write that is stuck: as much as may be waits for the client, whichever request it belongs to."""
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())


class _Sequence:
    """What has come of one sequence."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[inference_pb2.TokenLogprobs] = []
        self.finish = inference_pb2.Finish()


async def _whole(ask: Ask, generation: Generation) -> oip.ModelInferResponse:
    """One response with all sequences. Raises RequestError if the request fails."""
    sequences = [_Sequence() for _ in range(generation.n)]
    while (piece := await generation.next()) is not None:
        sequence = sequences[piece.index]
        sequence.text.append(piece.text)
        sequence.ids.extend(piece.token_ids)
        sequence.logprobs.extend(piece.logprobs)
        if piece.HasField("finish"):
            sequence.finish.CopyFrom(piece.finish)
    longest = max(len(sequence.ids) for sequence in sequences)
    count = len(sequences)
    usages = [sequence.finish.usage for sequence in sequences]
    ids = [token_id for sequence in sequences for token_id in sequence.ids + [-1] * (longest - len(sequence.ids))]
    return _filled(
        ask,
        {
            "text_output": ((count,), ["".join(sequence.text).encode() for sequence in sequences]),
            "output_ids": ((longest,) if count == 1 else (count, longest), ids),
            "finish_reason": ((count,), [REASONS.get(sequence.finish.reason, b"") for sequence in sequences]),
            "index": ((count,), list(range(count))),
            "num_input_tokens": ((count,), [usage.prompt_tokens for usage in usages]),
            "num_output_tokens": ((count,), [usage.completion_tokens for usage in usages]),
            "logprobs": ((count,), [_logprobs(sequence.ids, sequence.logprobs) for sequence in sequences]),
            "cumulative_logprob": ((count,), [sequence.finish.cumulative_logprob for sequence in sequences]),
        },
    )


def _piece(ask: Ask, piece: inference_pb2.GenerateResponse) -> oip.ModelInferResponse:
    """One piece of one sequence. Counts and the sum of log-probabilities are there with the finish, and 0 before."""
    usage = piece.finish.usage
    return _filled(
        ask,
        {
            "text_output": ((1,), [piece.text.encode()]),
            "output_ids": ((len(piece.token_ids),), piece.token_ids),
            "finish_reason": ((1,), [REASONS.get(piece.finish.reason, b"")]),
            "index": ((1,), [piece.index]),
            "num_input_tokens": ((1,), [usage.prompt_tokens]),
            "num_output_tokens": ((1,), [usage.completion_tokens]),
            "logprobs": ((1,), [_logprobs(piece.token_ids, piece.logprobs)]),
            "cumulative_logprob": ((1,), [piece.finish.cumulative_logprob]),
        },
    )


def _logprobs(token_ids: Sequence[int], entries: Sequence[inference_pb2.TokenLogprobs]) -> bytes:
    """JSON as Triton's vLLM backend writes it: a list with one object per token, of what is known by token id."""
    rows: list[dict[int, dict[str, float]]] = []
    for token_id, entry in zip(token_ids, entries, strict=False):
        top = enumerate(zip(entry.top_ids, entry.top_logprobs, strict=False), 1)
        row = {top_id: {"logprob": finite(logprob), "rank": rank} for rank, (top_id, logprob) in top}
        row.setdefault(token_id, {"logprob": finite(entry.logprob), "rank": entry.rank})
        rows.append(row)
    return json.dumps(rows).encode()


def _filled(ask: Ask, outputs: dict[str, tuple[tuple[int, ...], Any]]) -> oip.ModelInferResponse:
    response = _response(ask)
    for name in ask.outputs:
        shape, values = outputs[name]
        tensors.add(response, name, translate.OUTPUTS[name], shape, values, ask.raw)
    return response
