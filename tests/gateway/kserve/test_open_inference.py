"""The Open Inference Protocol as a plain gRPC client sees it, with a scheduler that the test plays."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from pagewire.runtime import rich_status
from pagewire.v1 import inference_pb2, open_inference_pb2_grpc
from pagewire.v1 import open_inference_pb2 as oip
from tests.gateway.conftest import World
from tests.gateway.fake_scheduler import LIMIT_S
from tests.gateway.test_generate import ids, letters

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
