"""Completions and chat completions on the wire, with a scheduler that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from pagewire.v1 import inference_pb2
from tests.gateway import tiny_tokenizers
from tests.gateway.conftest import MakeDoor, World, address
from tests.gateway.fake_scheduler import CONTEXT, EOS
from tests.gateway.openai import raw
from tests.gateway.test_generate import ids, letters

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def start(world: World, path: str, **body: Any) -> asyncio.Task[raw.Reply]:
    return asyncio.create_task(raw.ask(address(world), path, body))


def logprobs(token_ids: Sequence[int], *tops: tuple[int, float]) -> list[inference_pb2.TokenLogprobs]:
    """The same for each token: -0.5, and the given most likely ones."""
    return [
        inference_pb2.TokenLogprobs(
            logprob=-0.5, rank=1, top_ids=[top for top, _ in tops], top_logprobs=[value for _, value in tops]
        )
        for _ in token_ids
    ]


async def test_a_completion_is_whole_with_usage_and_finish_reason(door: World) -> None:
    reply = start(door, COMPLETIONS, model="tiny", prompt="the cat", max_tokens=5, temperature=0, user="somebody")
    submit = await door.scheduler.expect("submit")
    assert list(submit.token_ids) == ids("the cat")
    assert (submit.stop.max_tokens, submit.sampling.temperature, submit.sampling.n) == (5, 0.0, 1)
    s = submit.stream
    door.scheduler.step([(s, token) for token in letters("abc")], admitted={s: 7})
    door.scheduler.step([(s, EOS)], finished=[(s, 4, STOP)])
    answer = (await reply).json
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "id": f"cmpl-{submit.request_id}",
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 4,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_cached_tokens_are_told(door: World) -> None:
    reply = start(door, COMPLETIONS, prompt=[5, 6, 7])
    s = (await door.scheduler.expect("submit")).stream
    step = inference_pb2.PromptInfo(prompt_tokens=3, cached_tokens=2)
    door.scheduler.say(step={"admitted": [{"stream": s, "prompt": step}]})
    door.scheduler.step([(s, 5)], finished=[(s, 1, LENGTH)])
    assert (await reply).json["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_a_completion_stream_is_events_that_end_with_done(door: World) -> None:
    connection = await raw.send(
        address(door),
        COMPLETIONS,
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}},
    )
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    status, headers = await connection.status()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    first = await connection.chunk()
    assert first.startswith(b"data: ")
    assert b'"text":"a"' in first, "it came before the next token was there"
    door.scheduler.step([(s, letters("b")[0])], finished=[(s, 2, LENGTH)])
    body = first
    while data := await connection.chunk():
        body += data
    await connection.close()
    *chunks, usage, done = raw.Reply(200, {}, body).events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 3)


async def test_without_include_usage_no_event_speaks_of_usage(door: World) -> None:
    reply = start(door, COMPLETIONS, prompt="x", stream=True)
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1}, finished=[(s, 1, LENGTH)])
    *chunks, done = (await reply).events
    assert (len(chunks), done) == (1, "[DONE]")
    assert "usage" not in chunks[0]


async def test_a_batch_is_a_request_per_prompt_and_choices_are_counted_through(door: World) -> None:
    reply = start(door, COMPLETIONS, prompt=["a", "b"], n=2, seed=-1, request_id="mine")
    first, second = await door.scheduler.expect("submit"), await door.scheduler.expect("submit")
    assert [list(first.token_ids), list(second.token_ids)] == [letters("a"), letters("b")]
    assert (first.request_id, second.request_id) == ("mine-0", "mine-1")
    assert (first.sampling.seed, second.sampling.n) == (2**64 - 1, 2)
    a, b, c, d = letters("wxyz")
    s, t = first.stream, second.stream
    door.scheduler.step([(t + 1, d), (t, c)], admitted={t: 1}, finished=[(t + 1, 1, LENGTH), (t, 1, STOP)])
    door.scheduler.step([(s, a), (s + 1, b)], admitted={s: 1}, finished=[(s, 1, LENGTH), (s + 1, 1, LENGTH)])
    answer = (await reply).json
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "w"),
        (1, "x"),
        (2, "y"),
        (3, "z"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2, "each prompt once, whatever n"
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("prompt", "expected"), [([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]]), (["a"], [letters("a")])]
)
async def test_prompts_may_be_token_ids(door: World, prompt: Any, expected: list[list[int]]) -> None:
    reply = start(door, COMPLETIONS, prompt=prompt)
    for token_ids in expected:
        submit = await door.scheduler.expect("submit")
        assert list(submit.token_ids) == token_ids
        door.scheduler.step([(submit.stream, 9)], admitted={submit.stream: 1}, finished=[(submit.stream, 1, LENGTH)])
    assert len((await reply).json["choices"]) == len(expected)


async def test_a_completion_without_max_tokens_gets_openais_16_and_a_chat_the_context(door: World) -> None:
    tasks = [start(door, COMPLETIONS, prompt="x")]
    submit = await door.scheduler.expect("submit")
    assert submit.stop.max_tokens == 16
    tasks.append(start(door, COMPLETIONS, prompt="x", min_tokens=40))
    assert (await door.scheduler.expect("submit")).stop.max_tokens == 40
    tasks.append(start(door, CHAT, messages=[{"role": "user", "content": "x"}]))
    submit = await door.scheduler.expect("submit")
    assert submit.stop.max_tokens == CONTEXT - len(submit.token_ids)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_fields_of_vllm_reach_the_scheduler(door: World) -> None:
    reply = start(
        door,
        COMPLETIONS,
        prompt="x",
        top_k=-1,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        min_tokens=2,
        stop="END",
        stop_token_ids=[7],
        ignore_eos=True,
        include_stop_str_in_output=True,
        logit_bias={"9": -1},
        priority=-3,
        tenant="team",
        cache_salt="salt",
        best_of=1,
        suffix=None,
        a_field_of_tomorrow={"deep": [1]},
    )
    submit = await door.scheduler.expect("submit")
    sampling, stop = submit.sampling, submit.stop
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, dict(sampling.logit_bias)) == (0.5, -0.5, {9: -1.0})
    assert (stop.min_tokens, list(stop.stop), list(stop.stop_token_ids)) == (2, ["END"], [7])
    assert (stop.ignore_eos, stop.include_stop) == (True, True)
    assert (submit.priority, submit.tenant) == (3, "team/salt"), "vLLM runs lower numbers first"
    door.scheduler.step([(submit.stream, 9)], admitted={submit.stream: 1}, finished=[(submit.stream, 1, LENGTH)])
    assert (await reply).status == 200


async def test_completion_logprobs_are_parallel_lists_with_offsets(door: World) -> None:
    reply = start(door, COMPLETIONS, prompt="x", logprobs=2)
    s = (await door.scheduler.expect("submit")).stream
    a, b = letters("ab")
    lead, tail = letters("Ã©")  # the two bytes of é
    tokens = [a, lead, tail, b, EOS]
    entries = logprobs(tokens, (b, -0.25), (a, -1.5))
    entries[3].logprob = -float("inf")
    door.scheduler.step([(s, token) for token in tokens], admitted={s: 1}, logprobs=entries)
    door.scheduler.step(finished=[(s, 5, STOP)])
    (choice,) = (await reply).json["choices"]
    assert choice["text"] == "aéb"
    told = choice["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", "<eos>"]
    assert told["token_logprobs"] == [-0.5, -0.5, -0.5, -9999.0, -0.5]
    assert told["text_offset"] == [0, 1, 1, 2, 3]
    assert told["top_logprobs"][1] == {"b": -0.25, "a": -1.5, "bytes:\\xc3": -0.5}
    assert told["top_logprobs"][3] == {"b": -0.25, "a": -1.5}


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_no_output_tokens_scores_the_prompt(door: World, stream: bool) -> None:
    reply = start(door, COMPLETIONS, prompt="abc", max_tokens=0, echo=True, logprobs=0, stream=stream)
    submit = await door.scheduler.expect("submit")
    assert (submit.stop.max_tokens, submit.output.prompt_logprobs) == (1, 0)
    assert submit.output.HasField("prompt_logprobs")
    s, prompt = submit.stream, ids("abc")
    info = inference_pb2.PromptInfo(
        prompt_tokens=len(prompt),
        token_ids=prompt,
        logprobs=[inference_pb2.TokenLogprobs(), *logprobs(prompt[1:])],
    )
    door.scheduler.say(step={"admitted": [{"stream": s, "prompt": info}]})
    door.scheduler.step([(s, 9)], finished=[(s, 1, LENGTH)], logprobs=logprobs([9]))
    answer = await reply
    choices = [event["choices"][0] for event in answer.events[:-1]] if stream else answer.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "abc"
    told = choices[0]["logprobs"]
    assert told["token_logprobs"] == [None, *[-0.5] * (len(prompt) - 1)]
    assert "".join(told["tokens"]) == "abc"
    assert told["text_offset"][0] == 0
    assert choices[-1]["finish_reason"] == "length"
    if not stream:
        assert answer.json["usage"]["completion_tokens"] == 0


async def test_echo_puts_the_prompt_in_front(door: World) -> None:
    reply = start(door, COMPLETIONS, prompt="the cat ", echo=True, return_token_ids=True)
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 3}, finished=[(s, 1, LENGTH)])
    (choice,) = (await reply).json["choices"]
    assert (choice["text"], choice["token_ids"]) == ("the cat a", letters("a"))


async def test_a_chat_goes_through_the_template_and_its_parts_are_text(door: World) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "name": "x"},
    ]
    reply = start(door, CHAT, messages=messages, max_completion_tokens=3, max_tokens=9, logprobs=True, top_logprobs=1)
    submit = await door.scheduler.expect("submit")
    assert list(submit.token_ids) == ids("[system] be brief\n[user] one\ntwo\n[assistant]")
    assert (submit.stop.max_tokens, submit.output.logprobs) == (3, 1)
    s = submit.stream
    lead, tail = letters("Ã©")
    entries = logprobs([lead, tail], (tail, -0.25))
    door.scheduler.step([(s, lead), (s, tail)], admitted={s: 30}, finished=[(s, 2, LENGTH)], logprobs=entries)
    answer = (await reply).json
    assert (answer["object"], answer["id"]) == ("chat.completion", f"chatcmpl-{submit.request_id}")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "é", "refusal": None}
    assert choice["finish_reason"] == "length"
    first, _ = choice["logprobs"]["content"]
    assert first == {
        "token": "bytes:\\xc3",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "bytes:\\xa9", "logprob": -0.25, "bytes": [0xA9]}],
    }


async def test_a_chat_stream_begins_each_choice_with_its_role(door: World) -> None:
    reply = start(door, CHAT, messages=[{"role": "user", "content": "x"}], n=2, stream=True)
    s = (await door.scheduler.expect("submit")).stream
    a, b = letters("ab")
    door.scheduler.step([(s, a), (s + 1, b)], admitted={s: 3}, finished=[(s, 1, LENGTH), (s + 1, 1, LENGTH)])
    *chunks, done = (await reply).events
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index, text in enumerate("ab"):
        deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert (deltas[1]["delta"], deltas[1]["finish_reason"]) == ({"content": text}, "length")


async def test_a_sentencepiece_tokens_text_keeps_its_space(make_door: MakeDoor) -> None:
    tokenizer = tiny_tokenizers.sentencepiece_like()
    door = await make_door(tiny_tokenizers.as_transformers(tokenizer))
    reply = start(door, COMPLETIONS, prompt="a", logprobs=0)
    s = (await door.scheduler.expect("submit")).stream
    tokens = [tokenizer.token_to_id(name) for name in ("▁the", "<0xC3>", "<0xA9>")]
    door.scheduler.step(
        [(s, token) for token in tokens], admitted={s: 1}, finished=[(s, 3, LENGTH)], logprobs=logprobs(tokens)
    )
    (choice,) = (await reply).json["choices"]
    assert choice["logprobs"]["tokens"] == [" the", "bytes:\\xc3", "bytes:\\xa9"]


async def test_without_a_tokenizer_token_ids_still_work(make_door: MakeDoor) -> None:
    door = await make_door(None)
    reply = start(door, COMPLETIONS, prompt=[5], return_token_ids=True, logprobs=0)
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, 9)], admitted={s: 1}, finished=[(s, 1, LENGTH)], logprobs=logprobs([9]))
    (choice,) = (await reply).json["choices"]
    assert (choice["text"], choice["token_ids"], choice["logprobs"]["tokens"]) == ("", [9], ["token_id:9"])
    refused = await raw.ask(address(door), COMPLETIONS, {"prompt": "text"})
    assert (refused.status, refused.error["reason"]) == (400, "NO_TOKENIZER")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_parked_request_ends_with_what_it_has_and_says_so(door: World, stream: bool) -> None:
    reply = start(
        door, COMPLETIONS, prompt="x", stream=stream, stream_options={"include_usage": True} if stream else None
    )
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, token) for token in letters("ab")], admitted={s: 1})
    door.scheduler.step(finished=[(s, 2, inference_pb2.FINISH_REASON_PARKED)])
    answer = await reply
    if stream:
        *chunks, usage, done = answer.events
        assert ("".join(chunk["choices"][0]["text"] for chunk in chunks), done) == ("ab", "[DONE]")
        assert chunks[-1]["choices"][0]["finish_reason"] == "parked"
    else:
        usage = answer.json
        assert (usage["choices"][0]["text"], usage["choices"][0]["finish_reason"]) == ("ab", "parked")
    assert usage["usage"]["completion_tokens"] == 2
