"""What a stranger's client in any language relies on, shown with plain grpcio and the protocol alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool as pools
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests import tiny_models
from tests.service import service

CONTEXT = 256
GENERATE = "/pagewire.v1.InferenceService/Generate"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[service.Service]:
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_models.make_tiny_model("llama", folder / "model", max_position_embeddings=CONTEXT)
    arguments = ["--model", str(model), "--block-size", "4", "--num-blocks", "256", "--max-num-seqs", "8"]
    async with service.running(folder / "up", *arguments) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, tiny_models.VOCAB_SIZE) for _ in range(length)]


def details_of(error: grpc.aio.AioRpcError) -> tuple[str, list[str], bool]:
    """The ErrorInfo reason, the violated field paths, and whether a retry delay is given."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    reason, fields, retry = "", [], False
    for detail in status.details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(request):
            fields = [violation.field for violation in request.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = True
    return reason, fields, retry


async def refusal(channel: grpc.aio.Channel, request: inference_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.generate(channel, request)
    return caught.value


async def test_a_client_without_stubs_finds_and_calls_the_service_by_reflection(up: service.Service) -> None:
    async with up.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
            async for answer in stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)])):
                return answer
            raise AssertionError("no answer")

        services = {entry.name for entry in (await ask(list_services="")).list_services_response.service}
        assert {"pagewire.v1.InferenceService", "pagewire.v1.ControlService", "grpc.health.v1.Health"} <= services
        answer = await ask(file_containing_symbol="pagewire.v1.InferenceService")
        pool = pools.DescriptorPool()
        for blob in answer.file_descriptor_response.file_descriptor_proto:
            pool.Add(FileDescriptorProto.FromString(blob))
        method = pool.FindServiceByName("pagewire.v1.InferenceService").FindMethodByName("ListModels")
        call = channel.unary_unary(
            f"/pagewire.v1.InferenceService/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        (model,) = (await call(GetMessageClass(method.input_type)())).models
        assert (model.max_model_len, model.vocab_size, model.block_size) == (CONTEXT, tiny_models.VOCAB_SIZE, 4)
        assert (model.kv_blocks, model.ready) == (256, True)


async def test_health_says_serving_for_the_server_and_the_service(up: service.Service) -> None:
    async with up.channel() as channel:
        for name in ("", "pagewire.v1.InferenceService"):
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_first_response_has_prompt_info_and_the_last_has_usage(up: service.Service) -> None:
    async with up.channel() as channel:
        completion = await service.generate(channel, service.greedy(prompt(10, seed=1), 12))
        assert completion.prompt is not None
        assert completion.prompt.prompt_tokens == 10
        assert completion.finish is not None
        assert completion.finish.reason == inference_pb2.FINISH_REASON_LENGTH
        usage = completion.finish.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (10, 12)
        assert 0 <= usage.queue_ns <= usage.first_token_ns <= usage.total_ns


async def test_parallel_samples_are_separate_streams_with_one_prompt(up: service.Service) -> None:
    request = service.greedy(prompt(13, seed=2), 9)
    request.sampling.CopyFrom(inference_pb2.SamplingParams(temperature=1.0, seed=7, n=4))
    async with up.channel() as channel:
        first = await service.collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
        again = await service.collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
        assert sorted(first) == [0, 1, 2, 3]
        assert all(len(completion.token_ids) == 9 for completion in first.values())
        assert len({tuple(completion.token_ids) for completion in first.values()}) > 1
        assert {i: c.token_ids for i, c in first.items()} == {i: c.token_ids for i, c in again.items()}
        assert (await service.wait_until_idle(channel)).free_blocks == 256


async def test_a_deadline_ends_the_call_and_frees_its_blocks(up: service.Service) -> None:
    async with up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.Generate(service.greedy(prompt(20, seed), 230), timeout=0.15) for seed in range(12)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.gather(*(service.collect(call) for call in calls))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await service.wait_until_idle(channel)


async def test_dropping_the_stream_cancels_the_request(up: service.Service) -> None:
    async with up.channel() as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            service.greedy(prompt(20, seed=3), 230, request_id="dropped")
        )
        await call.read()
        call.cancel()
        await service.wait_until_idle(channel)
        answer = await inference_pb2_grpc.InferenceServiceStub(channel).Cancel(
            inference_pb2.CancelRequest(request_id="dropped")
        )
        assert not answer.found


async def test_cancel_by_name_ends_the_stream_with_cancelled(up: service.Service) -> None:
    async with up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = aiter(stub.Generate(service.greedy(prompt(20, seed=4), 230, request_id="named")))
        first = await anext(call)
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="named"))).found
        reason = None
        delivered = len(first.token_ids)
        async for response in call:
            assert response.first_token == delivered
            delivered += len(response.token_ids)
            if response.HasField("finish"):
                reason = response.finish.reason
        assert reason == inference_pb2.FINISH_REASON_CANCELLED
        assert delivered < 230
        await service.wait_until_idle(channel)


async def test_a_detached_request_lives_on_and_attach_continues_it(up: service.Service) -> None:
    async with up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = service.greedy(prompt(20, seed=5), 60, request_id="detached")
        expected = (await service.generate(channel, service.greedy(prompt(20, seed=5), 60))).token_ids
        call = stub.Generate(request, metadata=(("pagewire-detach", "true"),))
        first = await call.read()
        call.cancel()
        seen = list(first.token_ids)
        position = inference_pb2.SequencePosition(index=0, first_token=len(seen))
        attached = stub.Attach(inference_pb2.AttachRequest(request_id="detached", positions=[position]))
        async for response in attached:
            assert response.first_token == len(seen)
            seen.extend(response.token_ids)
        assert seen == expected
        whole = await service.collect(stub.Attach(inference_pb2.AttachRequest(request_id="detached")))
        assert whole[0].token_ids == expected, "a finished request can be read again"


async def test_a_live_request_id_is_not_taken_twice_and_an_unknown_one_is_not_found(up: service.Service) -> None:
    async with up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(service.greedy(prompt(20, seed=6), 200, request_id="twice"))
        await call.read()
        error = await refusal(channel, service.greedy(prompt(20, seed=6), 5, request_id="twice"))
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.collect(stub.Attach(inference_pb2.AttachRequest(request_id="nobody")))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


NAN, INFINITY = float("nan"), float("inf")
BAD_SAMPLING = {
    "sampling.temperature": [NAN, INFINITY, -1.0, 101.0],
    "sampling.top_p": [NAN, 0.0, 1.5, -0.1],
    "sampling.min_p": [NAN, -0.1, 1.1],
    "sampling.repetition_penalty": [NAN, 0.0, -1.0, INFINITY],
    "sampling.presence_penalty": [NAN, INFINITY, 1e9],
    "sampling.frequency_penalty": [NAN, -INFINITY, -1e9],
    "sampling.n": [1_000_000],
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in BAD_SAMPLING.items() for value in values]
)
async def test_a_bad_sampling_value_is_refused_with_its_field(up: service.Service, path: str, value: float) -> None:
    request = service.greedy(prompt(5), 4)
    setattr(request.sampling, path.removeprefix("sampling."), value)
    async with up.channel() as channel:
        error = await refusal(channel, request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert path in details_of(error)[1]


async def test_bad_prompts_are_refused_with_their_field(up: service.Service) -> None:
    bad = {
        "prompt": inference_pb2.GenerateRequest(),
        "prompt.token_ids": service.greedy([], 4),
        "prompt.token_ids.ids[1]": service.greedy([5, tiny_models.VOCAB_SIZE], 4),
        "token_ids": service.greedy(prompt(CONTEXT), 4),
    }
    async with up.channel() as channel:
        for path, request in bad.items():
            error = await refusal(channel, request)
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, path
            assert any(path in field for field in details_of(error)[1]), (path, details_of(error))
        error = await refusal(channel, service.greedy(prompt(5), 4, model="another"))
        assert error.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("payload", [b"\x0a\xff", b"\x1a\x02\xff\xfe", b"\xff" * 100], ids=["cut", "utf8", "noise"])
async def test_bytes_that_are_no_request_are_an_invalid_argument_without_python_text(
    up: service.Service, payload: bytes
) -> None:
    async with up.channel() as channel:
        call = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)(payload)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Error" not in (caught.value.details() or "")


async def test_bad_requests_leave_a_running_stream_untouched(up: service.Service) -> None:
    async with up.channel() as channel:
        expected = (await service.generate(channel, service.greedy(prompt(20, seed=8), 100))).token_ids
        running = asyncio.create_task(service.generate(channel, service.greedy(prompt(20, seed=8), 100)))
        for _ in range(20):
            await refusal(channel, service.greedy([5, 2**32 - 1], 4))
        assert (await running).token_ids == expected
