"""One validator: a wrong request gets the same verdict and reason over gRPC and over HTTP, in each one's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from gateway.openai.errors import STATUS
from pagewire.v1 import inference_pb2
from tests.gateway import tiny_tokenizers
from tests.gateway.conftest import World
from tests.gateway.fake_scheduler import CONTEXT, model_state
from tests.gateway.openai import raw
from tests.gateway.openai.conftest import MakeDoor, address
from tests.gateway.test_generate import refusal

NAN, INFINITY = float("nan"), float("inf")
LARGEST = 2**32 - 1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Bad:
    """One wrong request in both protocols."""

    grpc: inference_pb2.GenerateRequest
    http: dict[str, Any]
    field: str
    """The GenerateRequest path of the violation; empty: there is none."""
    param: str | None
    """OpenAI's name of it."""
    reason: str = "INVALID_FIELD"
    path: str = COMPLETIONS


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    if not {"text", "chat", "token_ids"} & fields.keys():
        fields["token_ids"] = inference_pb2.TokenIds(ids=[5])
    return inference_pb2.GenerateRequest(**fields)


def sampling(name: str, value: Any) -> Bad:
    body = {str(key): bias for key, bias in value.items()} if isinstance(value, dict) else value
    http = {"prompt": [5], name: body}
    bad = request(sampling=inference_pb2.SamplingParams(**{name: value}))
    key = f"[{next(iter(value))}]" if isinstance(value, dict) and len(value) == 1 else ""
    return Bad(bad, http, f"sampling.{name}{key}", f"{name}{key}")


def stop(name: str, value: Any, at: str = "", **more: Any) -> Bad:
    bad = request(stop=inference_pb2.StopParams(**{name: value, **more}))
    return Bad(bad, {"prompt": [5], name: value, **more}, f"stop.{name}{at}", f"{name}{at}")


def chat(*messages: tuple[str, str]) -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role=r, content=c) for r, c in messages])


def messages(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


FLOATS = [
    *(sampling("temperature", value) for value in (NAN, INFINITY, -INFINITY, -1.0, 101.0, 1e300, -1e-42)),
    *(sampling("top_p", value) for value in (NAN, INFINITY, 0.0, 1.5, -0.1, 1e-42)),
    *(sampling("min_p", value) for value in (NAN, INFINITY, -0.1, 1.1, 1e-42)),
    *(sampling("repetition_penalty", value) for value in (NAN, INFINITY, 0.0, -1.0, 101.0)),
    *(sampling("presence_penalty", value) for value in (NAN, INFINITY, -11.0, 11.0)),
    *(sampling("frequency_penalty", value) for value in (NAN, -INFINITY, -11.0, 11.0)),
    *(sampling("length_penalty", value) for value in (NAN, INFINITY, -11.0, 11.0)),
    *(sampling("logit_bias", {7: value}) for value in (NAN, INFINITY, -101.0, 101.0, 1e-42)),
]
COUNTS = [
    *(sampling("n", value) for value in (129, 2**31 - 1, LARGEST)),
    sampling("logit_bias", {600: 1.0}),
    sampling("logit_bias", {LARGEST: 1.0}),
    sampling("logit_bias", dict.fromkeys(range(1025), 0.5)),
    stop("min_tokens", 6, max_tokens=5),
    stop("min_tokens", CONTEXT),
    stop("min_tokens", LARGEST),
    stop("stop", ["x"] * 17),
    stop("stop", ["x"] * 100_000),
    stop("stop", [""], "[0]"),
    stop("stop", ["ok", "x" * 257], "[1]"),
    stop("stop_token_ids", [1] * 129),
    stop("stop_token_ids", [1] * 100_000),
    stop("stop_token_ids", [5, 600], "[1]"),
    stop("stop_token_ids", [LARGEST], "[0]"),
]
OUTPUTS = [
    *(
        Bad(
            request(output=inference_pb2.OutputOptions(logprobs=value)),
            {"prompt": [5], "logprobs": value},
            "output.logprobs",
            "logprobs",
        )
        for value in (21, LARGEST)
    ),
    Bad(
        request(chat=chat(("user", "x")), output=inference_pb2.OutputOptions(logprobs=21)),
        {**messages(("user", "x")), "logprobs": True, "top_logprobs": 21},
        "output.logprobs",
        "top_logprobs",
        path=CHAT,
    ),
]
NAMES = [
    Bad(request(request_id=value), {"prompt": [5], "request_id": value}, "request_id", "request_id")
    for value in ("x" * 129, "a\nb", "ü", "\x00")
] + [Bad(request(tenant=value), {"prompt": [5], "tenant": value}, "tenant", "tenant") for value in ("x" * 129, "\x00")]
PROMPTS = [
    Bad(inference_pb2.GenerateRequest(text=""), {"prompt": ""}, "prompt.text", "prompt"),
    Bad(
        request(text="x" * ((2 << 20) + 1)),
        {"prompt": "x" * ((2 << 20) + 1)},
        "prompt.text",
        "prompt",
        "PROMPT_TOO_LONG",
    ),
    Bad(request(text="a b " * CONTEXT), {"prompt": "a b " * CONTEXT}, "prompt.text", "prompt", "PROMPT_TOO_LONG"),
    Bad(
        request(token_ids=inference_pb2.TokenIds(ids=[5] * CONTEXT)),
        {"prompt": [5] * CONTEXT},
        "prompt.token_ids",
        "prompt",
        "PROMPT_TOO_LONG",
    ),
    Bad(
        request(token_ids=inference_pb2.TokenIds(ids=[5, 600])),
        {"prompt": [5, 600]},
        "prompt.token_ids.ids[1]",
        "prompt[1]",
    ),
    Bad(
        request(token_ids=inference_pb2.TokenIds(ids=[LARGEST])),
        {"prompt": [2**63]},
        "prompt.token_ids.ids[0]",
        "prompt[0]",
    ),
    Bad(request(token_ids=inference_pb2.TokenIds(ids=[])), {"prompt": [[]]}, "prompt.token_ids", "prompt[0]"),
    Bad(request(chat=chat()), {"messages": []}, "prompt.chat.messages", "messages", path=CHAT),
    Bad(
        request(chat=chat(*[("user", "x")] * 1025)),
        messages(*[("user", "x")] * 1025),
        "prompt.chat.messages",
        "messages",
        path=CHAT,
    ),
    Bad(
        request(chat=chat(("user", "x"), ("", "x"))),
        messages(("user", "x"), ("", "x")),
        "prompt.chat.messages[1].role",
        "messages[1].role",
        path=CHAT,
    ),
    Bad(
        request(chat=chat(("x" * 65, "x"))),
        messages(("x" * 65, "x")),
        "prompt.chat.messages[0].role",
        "messages[0].role",
        path=CHAT,
    ),
    Bad(
        request(chat=chat(("robot", "x"))),
        messages(("robot", "x")),
        "prompt.chat",
        "messages",
        "CHAT_TEMPLATE_FAILED",
        path=CHAT,
    ),
    Bad(request(model="other"), {"prompt": [5], "model": "other"}, "", "model", "MODEL_NOT_FOUND"),
    Bad(request(model="../etc\x00"), {"prompt": [5], "model": "../etc\x00"}, "", "model", "MODEL_NOT_FOUND"),
    Bad(
        request(sampling=inference_pb2.SamplingParams(n=2, beam_width=2, temperature=0.5)),
        {"prompt": [5], "n": 2, "use_beam_search": True, "temperature": 0.5},
        "sampling.temperature",
        "temperature",
    ),
]


async def both(door: World, bad: Bad) -> None:
    """Sends it through both doors and compares what they say."""
    over_grpc = await refusal(door.stub.Generate(bad.grpc))
    assert over_grpc.reason == bad.reason
    reply = await raw.ask(address(door), bad.path, bad.http)
    assert (reply.status, reply.error["reason"]) == (STATUS[over_grpc.code], over_grpc.reason), reply.error
    assert reply.error["param"] == bad.param
    assert reply.headers["x-should-retry"] == "false"
    if bad.field:
        assert [field for field, _ in over_grpc.violations] == [bad.field]
        assert reply.error["violations"] == [{"field": bad.param, "description": over_grpc.violations[0][1]}]
        assert reply.error["message"].startswith(f"{bad.param}: ")
    assert door.scheduler.said_nothing_more()


@pytest.mark.parametrize(
    "group", [FLOATS, COUNTS, OUTPUTS, NAMES, PROMPTS], ids=["floats", "counts", "outputs", "names", "prompts"]
)
async def test_wrong_values_get_the_same_verdict_and_reason_over_grpc_and_http(door: World, group: list[Bad]) -> None:
    for bad in group:
        await both(door, bad)


async def test_wrong_prompts_without_tokenizer_template_or_worker_get_the_same_verdict(make_door: MakeDoor) -> None:
    text = Bad(request(text="x"), {"prompt": "x"}, "prompt.text", "prompt", "NO_TOKENIZER")
    bare = await make_door(None)
    await both(bare, text)
    await both(
        bare,
        Bad(request(stop=inference_pb2.StopParams(stop=["x"])), {"prompt": [5], "stop": "x"}, "stop.stop", "stop"),
    )
    plain = await make_door(tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level(), template=None))
    conversation = (("user", "x"),)
    await both(
        plain,
        Bad(
            request(chat=chat(*conversation)),
            messages(*conversation),
            "prompt.chat",
            "messages",
            "NO_CHAT_TEMPLATE",
            path=CHAT,
        ),
    )


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
