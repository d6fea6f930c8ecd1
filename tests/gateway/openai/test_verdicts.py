"""What is wrong in HTTP's own way: types, bodies, statuses. Values are in tests/gateway/test_same_verdicts.py."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from pagewire.v1 import inference_pb2
from tests.gateway.conftest import World, address
from tests.gateway.fake_scheduler import CONTEXT, model_state
from tests.gateway.openai import raw

NAN, INFINITY = float("nan"), float("inf")
LARGEST = 2**32 - 1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def messages(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


async def test_what_only_a_chat_calls_top_logprobs_is_named_so(door: World) -> None:
    reply = await raw.ask(address(door), CHAT, {**messages(("user", "x")), "logprobs": True, "top_logprobs": 21})
    assert (reply.status, reply.error["param"]) == (400, "top_logprobs")
    reply = await raw.ask(address(door), COMPLETIONS, {"prompt": [2**63]})
    assert (reply.status, reply.error["param"]) == (400, "prompt[0]")


@pytest.mark.parametrize(
    ("code", "reason", "status", "retry"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 429, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED", 429, False),
        (grpc.StatusCode.INVALID_ARGUMENT, "NEVER_FITS", 400, False),
        (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS", 409, False),
        (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", 503, True),
        (grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS", 500, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_scheduler_refuses_is_a_status_in_streams_too(
    door: World, code: grpc.StatusCode, reason: str, status: int, retry: bool, stream: bool
) -> None:
    connection = await raw.send(address(door), COMPLETIONS, {"prompt": [5], "stream": stream})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.fail(s, code, reason, retry_after_ns=1_500_000_000 if retry else 0)
    reply = await connection.reply()
    await connection.close()
    assert (reply.status, reply.error["reason"], reply.headers["content-type"]) == (status, reason, "application/json")
    assert (reply.headers.get("retry-after"), reply.headers.get("retry-after-ms")) == (
        ("2", "1500") if retry else (None, None)
    )


async def test_no_worker_is_a_503_with_advice_and_running_answers_go_on(door: World) -> None:
    connection = await raw.send(address(door), COMPLETIONS, {"prompt": [5]})
    s = (await door.scheduler.expect("submit")).stream
    changed = door.gateway._changed
    door.scheduler.set_state(model_state(ready=False))
    await changed.wait()
    reply = await raw.ask(address(door), COMPLETIONS, {"prompt": [5]})
    assert (reply.status, reply.error["reason"], reply.error["type"]) == (503, "NO_WORKER", "server_error")
    assert reply.headers["retry-after"] == "1"
    door.scheduler.step([(s, 9)], admitted={s: 1}, finished=[(s, 1, inference_pb2.FINISH_REASON_LENGTH)])
    assert (await connection.reply()).status == 200
    await connection.close()


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": 5}, "prompt"),
    (COMPLETIONS, {"prompt": {}}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [5, "a"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [[5], "a"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [[5], [-1]]}, "prompt[1][0]"),
    (COMPLETIONS, {"prompt": [[5], [1.0]]}, "prompt[1][0]"),
    (COMPLETIONS, {"prompt": [True]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["x"] * 257}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "model": 5}, "model"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": True}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": [1]}, "top_p"),
    (COMPLETIONS, {"prompt": "x", "n": 1.5}, "n"),
    (COMPLETIONS, {"prompt": "x", "n": -1}, "n"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "echo": "yes"}, "echo"),
    (COMPLETIONS, {"prompt": "x", "stream": 1}, "stream"),
    (COMPLETIONS, {"prompt": "x", "stop": 5}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": ["x", 5]}, "stop[1]"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": "5"}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [5, "5"]}, "stop_token_ids[1]"),
    (COMPLETIONS, {"prompt": "x", "seed": 0.5}, "seed"),
    (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "x", "priority": "high"}, "priority"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": []}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"cat": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": "1"}}, "logit_bias[5]"),
    (COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": 5}, "stream_options"),
    (
        COMPLETIONS,
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": 5}},
        "stream_options.include_usage",
    ),
    (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "suffix": "end"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 1, "use_beam_search": True}, "best_of"),
    (CHAT, {**messages(("user", "x")), "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    (COMPLETIONS, {"prompt": "x", "guided_regex": "a+"}, "guided_regex"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": ["hello"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": 5, "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    (CHAT, {**messages(("user", "x")), "logprobs": 5}, "logprobs"),
    (CHAT, {**messages(("user", "x")), "top_logprobs": 5}, "top_logprobs"),
    (CHAT, {**messages(("user", "x")), "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {**messages(("user", "x")), "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {**messages(("user", "x")), "chat_template": "{{ x }}"}, "chat_template"),
]


async def test_wrong_types_and_what_cannot_be_obeyed_are_400_with_the_field(door: World) -> None:
    for path, body, param in WRONG_TYPES:
        reply = await raw.ask(address(door), path, body)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (400, param, "invalid_field"), body
        assert reply.error["type"] == "invalid_request_error"
    assert door.scheduler.said_nothing_more()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 9999 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "surrogate", "utf8", "deep", "digits"],
)
async def test_bodies_that_are_no_json_object_are_400_without_python_text(door: World, body: bytes) -> None:
    reply = await raw.ask(address(door), COMPLETIONS, body)
    assert (reply.status, reply.error["reason"]) == (400, "MALFORMED_MESSAGE")
    assert reply.error["message"] == "the body is not a JSON object"


async def test_null_is_the_same_as_absent(door: World) -> None:
    names = (
        "temperature",
        "n",
        "max_tokens",
        "stop",
        "logit_bias",
        "stream",
        "stream_options",
        "echo",
        "seed",
        "model",
    )
    connection = await raw.send(address(door), COMPLETIONS, {"prompt": "x", **dict.fromkeys(names)})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, 9)], admitted={s: 1}, finished=[(s, 1, inference_pb2.FINISH_REASON_LENGTH)])
    assert (await connection.reply()).status == 200
    await connection.close()


async def test_a_wrong_prompt_of_a_batch_is_named_by_its_place_and_nothing_of_the_batch_runs_on(door: World) -> None:
    reply = await raw.ask(address(door), COMPLETIONS, {"prompt": ["x", "a b " * CONTEXT]})
    assert (reply.status, reply.error["param"]) == (400, "prompt[1]")
    assert reply.error["code"] == "context_length_exceeded"
    first = await door.scheduler.expect("submit")
    assert (await door.scheduler.expect("detach")).stream == first.stream
