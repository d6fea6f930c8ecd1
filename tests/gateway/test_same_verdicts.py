"""One validator behind three doors: the same wrong request gets the same verdict, reason and field everywhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from gateway.openai.errors import STATUS
from pagewire.runtime import rich_status
from pagewire.v1 import inference_pb2, open_inference_pb2_grpc
from pagewire.v1 import open_inference_pb2 as oip
from tests.gateway import tiny_tokenizers
from tests.gateway.bad_requests import CHAT, COMPLETIONS, NO_CHATS, ROWS, Http, Row, Unsaid, http, kserve, native
from tests.gateway.conftest import MakeDoor, World, address
from tests.gateway.fake_scheduler import LIMIT_S
from tests.gateway.openai import raw
from tests.gateway.test_generate import refusal

CODES = {code.name: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class Verdict:
    """What a client was told, whatever the protocol."""

    reason: str
    fields: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()


def triton(door: World) -> Any:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(door.channel)


async def over_native(door: World, request: inference_pb2.GenerateRequest, code: str) -> Verdict:
    return _from_status(await refusal(door.stub.Generate(request)), code)


async def over_kserve(door: World, request: oip.ModelInferRequest, code: str) -> Verdict:
    return _from_status(await refusal(triton(door).ModelInfer(request)), code)


def _from_status(details: rich_status.StatusDetails, code: str) -> Verdict:
    assert details.code.name == code
    assert details.retry_after_ns == 0
    fields = tuple(field for field, _ in details.violations)
    assert not fields or details.message.startswith(f"{fields[0]}: ")
    return Verdict(details.reason, fields, tuple(description for _, description in details.violations))


async def over_openai(door: World, request: Http, code: str) -> Verdict:
    reply = await raw.ask(address(door), request.path, request.body)
    assert reply.status == STATUS[CODES[code]]
    assert reply.headers["x-should-retry"] == "false"
    error = reply.error
    violations = error.get("violations", [])
    fields = tuple(violation["field"] for violation in violations)
    assert error["param"] == (fields[0] if fields else "model" if error["reason"] == "MODEL_NOT_FOUND" else None)
    assert not fields or error["message"].startswith(f"{fields[0]}: ")
    return Verdict(error["reason"], fields, tuple(violation["description"] for violation in violations))


async def unsaid(door: World, attempt: Any, what: Unsaid) -> None:
    """What becomes of the attempt is what the row says: a violation, or nothing at all."""
    if isinstance(attempt, tuple):
        message, fields = attempt
        with pytest.raises((TypeError, ValueError)):
            message(**fields)
        return
    if what.field:
        ask = over_openai if isinstance(attempt, Http) else over_kserve
        verdict = await ask(door, attempt, "INVALID_ARGUMENT")
        assert (verdict.reason, verdict.fields) == ("INVALID_FIELD", (what.field,))
        return
    connection: raw.Connection | None = None
    call: Any = None
    if isinstance(attempt, Http):
        connection = await raw.send(address(door), attempt.path, attempt.body)
    elif isinstance(attempt, oip.ModelInferRequest):
        call = triton(door).ModelInfer(attempt)
    else:
        call = door.stub.Generate(attempt)
    submit = await door.scheduler.expect("submit")
    assert (list(submit.token_ids), submit.hold_seconds) == ([5], 0)
    if connection is not None:
        await connection.close()
    else:
        call.cancel()
    assert (await door.scheduler.expect("detach")).stream == submit.stream


async def at_every_door(door: World, row: Row, seen: Counter[str]) -> None:
    """Sends a row through all three and compares."""
    verdicts: list[Verdict] = []
    doors: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("native", row.native, over_native, row.fields),
        ("kserve", row.kserve, over_kserve, row.inputs),
        ("openai", row.openai, over_openai, row.params),
    ]
    for name, request, ask, fields in doors:
        if isinstance(request, Unsaid):
            await unsaid(door, request.attempt, request)
            continue
        seen[name] += 1
        verdict = await ask(door, request, row.code)
        assert (verdict.reason, verdict.fields) == (row.reason, fields), name
        verdicts.append(verdict)
    assert row.own_words or len({verdict.descriptions for verdict in verdicts}) == 1, verdicts
    seen["all three"] += len(verdicts) == len(doors)
    assert door.scheduler.said_nothing_more()


async def test_two_hundred_bad_requests_get_the_same_verdict_reason_and_field_at_all_three_doors(door: World) -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for row in ROWS:
        try:
            await at_every_door(door, row, seen)
        except AssertionError as error:
            wrong.append(f"{row.name}: {str(error)[:400]}")
    assert not wrong, "\n".join(wrong)
    print(f"{len(ROWS)} rows; sent: {dict(seen)}")
    assert seen["all three"] >= 200
    assert min(seen["native"], seen["kserve"], seen["openai"]) > seen["all three"]


async def test_a_stream_says_the_same_verdicts_in_band(door: World) -> None:
    call = triton(door).ModelStreamInfer()
    asked = 0
    for place, row in enumerate(ROWS):
        if isinstance(row.kserve, Unsaid):
            continue
        message = oip.ModelInferRequest()
        message.CopyFrom(row.kserve)
        message.id = str(place)
        async with asyncio.timeout(LIMIT_S):
            await call.write(message)
            answer = await call.read()
        parameters = answer.infer_response.parameters
        said = (answer.infer_response.id, parameters["code"].string_param, parameters["reason"].string_param)
        assert said == (str(place), row.code, row.reason)
        assert answer.error_message.startswith(f"{row.reason}: {row.inputs[0]}: " if row.inputs else f"{row.reason}: ")
        asked += 1
    assert asked >= 200
    call.cancel()
    assert door.scheduler.said_nothing_more()


async def test_a_gateway_without_tokenizer_or_template_says_so_at_every_door(make_door: MakeDoor) -> None:
    text = Row(
        "text",
        native(text="x"),
        kserve("x"),
        http("x"),
        ("prompt.text",),
        ("prompt",),
        ("text_input",),
        reason="NO_TOKENIZER",
    )
    stop = Row(
        "stop",
        native(stop=inference_pb2.StopParams(stop=["x"])),
        kserve(stop=["x"]),
        http(stop="x"),
        ("stop.stop",),
        ("stop",),
        ("stop",),
    )
    seen: Counter[str] = Counter()
    bare = await make_door(None)
    for row in (text, stop):
        await at_every_door(bare, row, seen)
    assert seen["all three"] == 2
    plain = await make_door(tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level(), template=None))
    message = inference_pb2.ChatMessage(role="user", content="x")
    chat = Row(
        "chat",
        native(chat=inference_pb2.ChatPrompt(messages=[message])),
        Unsaid(NO_CHATS, kserve(tensors={"messages": ("BYTES", [b"[]"])}), "messages"),
        Http(CHAT, {"messages": [{"role": "user", "content": "x"}]}),
        ("prompt.chat",),
        ("messages",),
        (),
        reason="NO_CHAT_TEMPLATE",
    )
    await at_every_door(plain, chat, seen)


REFUSALS = [
    ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1_500_000_000),
    ("RESOURCE_EXHAUSTED", "KV_POOL_EXHAUSTED", 0),
    ("INVALID_ARGUMENT", "NEVER_FITS", 0),
    ("ALREADY_EXISTS", "REQUEST_EXISTS", 0),
    ("UNAVAILABLE", "WORKER_LOST", 1_000_000_000),
    ("DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE", 0),
    ("INTERNAL", "NONFINITE_LOGITS", 0),
]


async def test_what_the_scheduler_refuses_is_said_at_every_door(door: World) -> None:
    for code, reason, retry_ns in REFUSALS:
        await refused_at_every_door(door, code, reason, retry_ns)


async def refused_at_every_door(door: World, code: str, reason: str, retry_ns: int) -> None:
    async def refuse() -> None:
        stream = (await door.scheduler.expect("submit")).stream
        door.scheduler.fail(stream, CODES[code], reason, retry_after_ns=retry_ns)

    for method, request in ((door.stub.Generate, native()), (triton(door).ModelInfer, kserve())):
        call = method(request)
        await refuse()
        details = await refusal(call)
        assert (details.code.name, details.reason, details.retry_after_ns) == (code, reason, retry_ns)
    connection = await raw.send(address(door), COMPLETIONS, {"prompt": [5]})
    await refuse()
    reply = await connection.reply()
    await connection.close()
    assert (reply.status, reply.error["reason"]) == (STATUS.get(CODES[code], 500), reason)
    assert reply.headers.get("retry-after-ms") == (str(retry_ns // 1_000_000) if retry_ns else None)
    async with asyncio.timeout(LIMIT_S):
        stream = triton(door).ModelStreamInfer()
        await stream.write(kserve())
        await refuse()
        answer = await stream.read()
    parameters = answer.infer_response.parameters
    assert (parameters["code"].string_param, parameters["reason"].string_param) == (code, reason)
    assert answer.error_message == f"{reason}: said by the test"
    stream.cancel()
