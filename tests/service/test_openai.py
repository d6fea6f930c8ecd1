"""The OpenAI-compatible door of the whole service: `pagewire up` with the bundled model, used with `openai`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, OpenAI

from pagewire.bundled import BUNDLED_NAME
from pagewire.v1 import inference_pb2, inference_pb2_grpc, open_inference_pb2_grpc
from pagewire.v1 import open_inference_pb2 as oip
from tests.service import service

PROMPT = "The function returns"
MESSAGES: Any = [{"role": "user", "content": "What does the function return?"}]
LIMIT_S = 60


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[service.Service]:
    folder = tmp_path_factory.mktemp("openai")
    async with service.running(folder / "up", "--num-blocks", "512", "--max-num-seqs", "16") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(up: service.Service) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://{up.ready['http']}/v1", api_key="none", max_retries=0) as client:
        yield client


pytestmark = pytest.mark.asyncio(loop_scope="module")


def greedy(max_tokens: int, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopParams(max_tokens=max_tokens),
        **fields,
    )


async def test_the_door_is_where_the_ready_file_and_the_log_say(up: service.Service, client: AsyncOpenAI) -> None:
    assert up.ready["http"].startswith("127.0.0.1:")
    assert f"HTTP on http://{up.ready['http']}/v1" in up.log.read_text()
    (model,) = (await client.models.list()).data
    assert model.id == BUNDLED_NAME


async def test_completions_equal_those_over_grpc_whole_and_streamed(up: service.Service, client: AsyncOpenAI) -> None:
    async with up.channel() as channel:
        expected = await service.generate(channel, greedy(24, text=PROMPT))
    assert expected.finish is not None
    assert expected.prompt is not None
    arguments: Any = {"model": BUNDLED_NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = await client.completions.create(**arguments, extra_body={"return_token_ids": True})
    (choice,) = whole.choices
    assert choice.text == expected.text
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected.token_ids
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        expected.prompt.prompt_tokens,
        expected.finish.usage.completion_tokens,
    )
    stream = await client.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_chats_equal_those_over_grpc_and_the_synchronous_client_streams_them(
    up: service.Service, client: AsyncOpenAI
) -> None:
    chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(**message) for message in MESSAGES])
    async with up.channel() as channel:
        expected = await service.generate(channel, greedy(16, chat=chat))
    arguments: Any = {"model": BUNDLED_NAME, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = await client.chat.completions.create(**arguments)
    assert whole.choices[0].message.content == expected.text

    def streamed() -> str:
        with OpenAI(base_url=str(client.base_url), api_key="none") as synchronous:
            chunks = synchronous.chat.completions.create(**arguments, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert await asyncio.to_thread(streamed) == expected.text


async def test_seeded_samples_equal_those_over_grpc(up: service.Service, client: AsyncOpenAI) -> None:
    request = greedy(12, text=PROMPT)
    request.sampling.CopyFrom(inference_pb2.SamplingParams(temperature=1, top_p=0.9, seed=7, n=3))
    async with up.channel() as channel:
        expected = await service.collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
    answer = await client.completions.create(
        model=BUNDLED_NAME, prompt=PROMPT, max_tokens=12, temperature=1, top_p=0.9, seed=7, n=3
    )
    assert [choice.text for choice in answer.choices] == [expected[index].text for index in range(3)]


async def test_echoed_logprobs_score_the_prompt_as_grpc_does(up: service.Service, client: AsyncOpenAI) -> None:
    request = greedy(1, text=PROMPT)
    request.output.prompt_logprobs = 2
    async with up.channel() as channel:
        expected = await service.generate(channel, request)
    assert expected.prompt is not None
    answer = await client.completions.create(model=BUNDLED_NAME, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == PROMPT
    told = choice.logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert "".join(told.tokens) == "<|endoftext|>" + PROMPT, "the tokenizer begins a text with a special token"
    assert told.text_offset is not None
    assert told.text_offset[:2] == [0, 0], "which is not part of the text"
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx([entry.logprob for entry in expected.prompt.logprobs[1:]])


async def test_a_repeated_prompt_is_told_as_cached(up: service.Service, client: AsyncOpenAI) -> None:
    prompt = "A dictionary maps keys to values. " * 12
    for _ in range(2):
        answer = await client.completions.create(model=BUNDLED_NAME, prompt=prompt, max_tokens=1, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert 0 < (answer.usage.prompt_tokens_details.cached_tokens or 0) < answer.usage.prompt_tokens


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_the_socket_frees_the_blocks(up: service.Service, client: AsyncOpenAI, stream: bool) -> None:
    arguments: Any = {"model": BUNDLED_NAME, "prompt": PROMPT, "max_tokens": 900, "n": 4, "stream": stream}
    calls = [
        asyncio.create_task(client.completions.create(**arguments, extra_body={"ignore_eos": True})) for _ in range(3)
    ]
    async with up.channel() as channel:
        async with asyncio.timeout(LIMIT_S):
            while (await service.loads(channel))[0].running < 12:
                await asyncio.sleep(0.01)
        if stream:
            for answer in await asyncio.gather(*calls):
                await answer.close()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        load = await service.wait_until_idle(channel)
    assert load.free_blocks == 512


async def test_bad_requests_raise_and_leave_a_running_stream_untouched(client: AsyncOpenAI) -> None:
    arguments: Any = {"model": BUNDLED_NAME, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    expected = (await client.completions.create(**arguments)).choices[0].text
    stream = await client.completions.create(**arguments, stream=True)
    for _ in range(10):
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.completions.create(model=BUNDLED_NAME, prompt=PROMPT, temperature=-1)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected


async def test_a_killed_gateway_ends_every_doors_stream_and_by_name_each_request_goes_on(
    up: service.Service, client: AsyncOpenAI
) -> None:
    """What a client sees depends on its protocol; what it loses does not: the scheduler keeps all three requests."""
    (gateway,) = up.ready["pids"]["gateways"]
    prompt = [5, 6, 7]
    async with up.channel() as channel:
        expected = (await service.generate(channel, service.greedy(prompt, 300))).token_ids
        native = inference_pb2_grpc.InferenceServiceStub(channel).Generate(
            service.greedy(prompt, 300, request_id="native")
        )
        first = await native.read()
        kserve = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        await kserve.write(kserve_request(prompt, 300, "kserve"))
        await kserve.read()
        stream = await client.completions.create(
            model=BUNDLED_NAME,
            prompt=prompt,
            max_tokens=300,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "request_id": "openai"},
        )
        await anext(stream)
        os.kill(gateway, signal.SIGKILL)
        for call in (native, kserve):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(openai.APIConnectionError):
            async for _ in stream:
                pass
    await replaced(up, client, gateway)
    async with up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        seen = len(first.token_ids)
        position = inference_pb2.SequencePosition(index=0, first_token=seen)
        rest = [
            token
            async for piece in stub.Attach(inference_pb2.AttachRequest(request_id="native", positions=[position]))
            for token in piece.token_ids
        ]
        assert [*first.token_ids, *rest] == expected
        # The other two have no call to resume by; whoever has named the request finds it here.
        for name in ("kserve", "openai"):
            whole = await service.collect(stub.Attach(inference_pb2.AttachRequest(request_id=name)))
            assert whole[0].token_ids == expected


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def kserve_request(prompt: list[int], max_tokens: int, name: str) -> oip.ModelInferRequest:
    """A greedy request over token ids in the Open Inference Protocol."""
    request = oip.ModelInferRequest(id="1")
    tensor = request.inputs.add(name="input_ids", datatype="INT64", shape=[len(prompt)])
    tensor.contents.int64_contents.extend(prompt)
    request.parameters["request_id"].string_param = name
    request.parameters["max_tokens"].int64_param = max_tokens
    request.parameters["temperature"].double_param = 0.0
    request.parameters["ignore_eos"].bool_param = True
    return request


async def replaced(up: service.Service, client: AsyncOpenAI, gateway: int) -> None:
    """Returns when another gateway answers where the killed one did."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            answer = await client.completions.create(model=BUNDLED_NAME, prompt=PROMPT, max_tokens=1)
            break
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert answer.choices[0].finish_reason == "length"
    assert up.ready["pids"]["gateways"] != [gateway]
