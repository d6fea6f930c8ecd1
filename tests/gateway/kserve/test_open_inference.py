"""The Open Inference Protocol as a plain gRPC client sees it, with a scheduler that the test plays."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from pagewire.runtime import rich_status
from pagewire.v1 import inference_pb2, open_inference_pb2_grpc
from pagewire.v1 import open_inference_pb2 as oip
from tests.gateway import test_generate
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.fake_scheduler import LIMIT_S
from tests.gateway.test_generate import ids, letters, rest

LENGTH = inference_pb2.FINISH_REASON_LENGTH


def stub(world: World) -> Any:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(world.channel)


def ask(text: str, **parameters: Any) -> oip.ModelInferRequest:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    request = oip.ModelInferRequest(id="a")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text.encode())
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


async def test_a_whole_answer_has_the_text_the_ids_and_the_reason(world: World) -> None:
    call = stub(world).ModelInfer(ask("the cat", max_tokens=2, temperature=0.5))
    submit = await world.scheduler.expect("submit")
    assert (list(submit.token_ids), submit.stop.max_tokens, submit.sampling.temperature) == (ids("the cat"), 2, 0.5)
    s, tokens = submit.stream, letters("ab")
    world.scheduler.step([(s, tokens[0])], admitted={s: 3})
    world.scheduler.step([(s, tokens[1])], finished=[(s, 2, LENGTH)])
    async with asyncio.timeout(LIMIT_S):
        answer = await call
    outputs = {output.name: output.contents for output in answer.outputs}
    assert list(outputs["text_output"].bytes_contents) == [b"ab"]
    assert list(outputs["output_ids"].int_contents) == tokens
    assert list(outputs["finish_reason"].bytes_contents) == [b"length"]
    assert answer.id == "a"


async def test_a_stream_ends_with_an_empty_final_response_and_says_errors_in_band(world: World) -> None:
    call = stub(world).ModelStreamInfer()
    async with asyncio.timeout(LIMIT_S):
        await call.write(ask("x", temperature=-1.0))
        refused = await call.read()
        assert refused.error_message.startswith("INVALID_FIELD: temperature: ")
        assert refused.infer_response.id == "a"
        await call.write(ask("x", triton_enable_empty_final_response=True))
        s = (await world.scheduler.expect("submit")).stream
        world.scheduler.step([(s, letters("a")[0])], admitted={s: 1}, finished=[(s, 1, LENGTH)])
        piece, final = await call.read(), await call.read()
        assert piece.infer_response.outputs[0].contents.bytes_contents == [b"a"]
        assert not piece.infer_response.parameters["triton_final_response"].bool_param
        assert final.infer_response.parameters["triton_final_response"].bool_param
        assert not final.infer_response.outputs
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_real_status_is_given_to_who_asks_for_it(world: World) -> None:
    call = stub(world).ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    async with asyncio.timeout(LIMIT_S):
        await call.write(ask("x", temperature=-1.0))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    details = rich_status.decode(caught.value)
    assert (details.reason, [field for field, _ in details.violations]) == ("INVALID_FIELD", ["temperature"])


async def test_cancelling_the_stream_ends_its_requests(world: World) -> None:
    call = stub(world).ModelStreamInfer()
    await call.write(ask("x"))
    s = (await world.scheduler.expect("submit")).stream
    call.cancel()
    assert (await world.scheduler.expect("detach")).stream == s


def scored(*token_ids: int) -> list[inference_pb2.TokenLogprobs]:
    """Two more likely tokens than each, the second without any chance in the end."""
    tops = {"top_ids": [7, 8], "top_logprobs": [-0.25, float("-inf")]}
    return [inference_pb2.TokenLogprobs(logprob=-0.5, rank=3, **tops) for _ in token_ids]


def score(token_id: int) -> dict[str, dict[str, float]]:
    """What is said of each such token."""
    return {
        "7": {"logprob": -0.25, "rank": 1},
        "8": {"logprob": -9999.0, "rank": 2},
        str(token_id): {"logprob": -0.5, "rank": 3},
    }


async def test_log_probabilities_come_as_the_vllm_backend_writes_them_whole_and_streamed(world: World) -> None:
    a, b = letters("ab")
    whole = stub(world).ModelInfer(ask("x", logprobs=2))
    submit = await world.scheduler.expect("submit")
    assert submit.output.logprobs == 2
    world.scheduler.step([(submit.stream, a)], admitted={submit.stream: 1}, logprobs=scored(a))
    world.scheduler.step([(submit.stream, b)], logprobs=scored(b))
    finish = inference_pb2.Finish(reason=LENGTH, cumulative_logprob=-1.0)
    finished = [{"stream": submit.stream, "num_tokens": 2, "finish": finish}]
    world.scheduler.say(step={"finished": finished})
    async with asyncio.timeout(LIMIT_S):
        outputs = {output.name: output.contents for output in (await whole).outputs}
    assert json.loads(outputs["logprobs"].bytes_contents[0]) == [score(a), score(b)]
    assert list(outputs["cumulative_logprob"].fp32_contents) == [-1.0]
    call = stub(world).ModelStreamInfer()
    await call.write(ask("x", logprobs=2))
    s = (await world.scheduler.expect("submit")).stream
    for token in (a, b):
        world.scheduler.step([(s, token)], admitted={s: 1}, logprobs=scored(token))
        async with asyncio.timeout(LIMIT_S):
            piece = (await call.read()).infer_response
        outputs = {output.name: output.contents for output in piece.outputs}
        assert json.loads(outputs["logprobs"].bytes_contents[0]) == [score(token)]
    call.cancel()


@pytest.mark.parametrize(
    ("parameters", "outputs", "names"),
    [
        ({"logprobs": 0}, [], {"logprobs", "cumulative_logprob"}),
        ({"return_logprobs": True}, [], {"logprobs", "cumulative_logprob"}),
        ({}, ["cumulative_logprob"], {"cumulative_logprob"}),
        ({"logprobs": 0}, ["index"], set()),
        ({}, [], None),
        ({"return_logprobs": False}, ["index"], None),
    ],
)
async def test_only_who_asks_for_log_probabilities_gets_them(
    world: World, parameters: dict[str, Any], outputs: list[str], names: set[str] | None
) -> None:
    """names are the outputs about them; None: the worker is not asked for them either."""
    request = ask("x", **parameters)
    for name in outputs:
        request.outputs.add(name=name)
    call = stub(world).ModelInfer(request)
    submit = await world.scheduler.expect("submit")
    assert submit.output.HasField("logprobs") == (names is not None)
    assert submit.output.logprobs == 0
    s, (a,) = submit.stream, letters("a")
    tokens = scored(a) if names is not None else []
    world.scheduler.step([(s, a)], admitted={s: 1}, logprobs=tokens, finished=[(s, 1, LENGTH)])
    async with asyncio.timeout(LIMIT_S):
        given = {output.name for output in (await call).outputs}
    assert given & {"logprobs", "cumulative_logprob"} == (names or set())


async def test_a_parked_request_ends_with_what_it_has_and_says_so(world: World) -> None:
    call = stub(world).ModelStreamInfer()
    await call.write(ask("x"))
    s = (await world.scheduler.expect("submit")).stream
    finished = [(s, 1, inference_pb2.FINISH_REASON_PARKED)]
    world.scheduler.step([(s, letters("a")[0])], admitted={s: 1}, finished=finished)
    async with asyncio.timeout(LIMIT_S):
        response = (await call.read()).infer_response
    outputs = {output.name: output.contents for output in response.outputs}
    assert list(outputs["text_output"].bytes_contents) == [b"a"]
    assert list(outputs["finish_reason"].bytes_contents) == [b"parked"]
    assert response.parameters["triton_final_response"].bool_param
    call.cancel()


async def test_a_stream_that_is_not_read_ends_when_one_of_its_requests_has_filled_its_buffer(
    make_world: MakeWorld,
) -> None:
    world = await make_world(stream_buffer_bytes=1 << 14, write_timeout_s=600.0)
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(world.gateway.address, options=own) as slow_channel:
        slow = open_inference_pb2_grpc.GRPCInferenceServiceStub(slow_channel).ModelStreamInfer()
        quick = world.stub.Generate(test_generate.ask())
        q = (await world.scheduler.expect("submit")).stream
        world.scheduler.step(admitted={q: 3})
        # A beam search's answers come at once and are as long as they are: they block the stream and count for nothing.
        await slow.write(ask("x", logprobs=20, use_beam_search=True, n=2))
        beams = (await world.scheduler.expect("submit")).stream
        await slow.write(ask("y"))
        other = (await world.scheduler.expect("submit")).stream
        (a,) = letters("a")
        rows = [inference_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[0.25] * 20)] * 1000
        world.scheduler.step(admitted={beams: 1, other: 1})
        for _ in range(15):
            world.scheduler.step([(beams, a)] * 1000, logprobs=rows)
        asked = 0
        while world.gateway.link.live_requests == 3:
            world.scheduler.step([(other, a)] * 1000)
            world.scheduler.step([(q, a)])
            async with asyncio.timeout(LIMIT_S):
                assert (await quick.read()).token_ids, "who reads gets on"
            asked += 1
            assert asked <= 6, "1000 tokens are about 5000 bytes, and one response of them is on its way"
        ended = {(await world.scheduler.expect("detach")).stream for _ in range(2)}
        assert ended == {beams, other}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest(slow)
        assert rich_status.decode(caught.value).reason == "SLOW_CONSUMER"
        world.scheduler.step(finished=[(q, asked, LENGTH)])
        assert (await rest(quick))[-1].finish.reason == LENGTH
