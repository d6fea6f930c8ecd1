"""Generate as a plain gRPC client sees it, with a scheduler that the test plays."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from pagewire.runtime import rich_status
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway import tiny_tokenizers
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.fake_scheduler import CONTEXT, EOS, LIMIT_S, model_state

STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
CANCELLED = inference_pb2.FINISH_REASON_CANCELLED


def ids(text: str) -> list[int]:
    return list(tiny_tokenizers.byte_level().encode(text).ids)


def letters(text: str) -> list[int]:
    """One token per character of ASCII text."""
    return [tiny_tokenizers.byte_level().token_to_id(char) for char in text]


def ask(prompt: Any = (5, 6, 7), **fields: Any) -> inference_pb2.GenerateRequest:
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt, **fields)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), **fields)


async def rest(call: Any) -> list[inference_pb2.GenerateResponse]:
    responses: list[inference_pb2.GenerateResponse] = []
    async with asyncio.timeout(LIMIT_S):
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
    return responses


async def refusal(call: Any) -> rich_status.StatusDetails:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(LIMIT_S):
            await (call if hasattr(call, "__await__") else call.read())
    return rich_status.decode(caught.value)


async def test_a_stream_carries_prompt_info_first_tokens_in_order_and_finish_last(world: World) -> None:
    call = world.stub.Generate(ask("the cat"))
    submit = await world.scheduler.expect("submit")
    assert list(submit.token_ids) == ids("the cat")
    assert (submit.stop.max_tokens, submit.sampling.temperature, submit.sampling.n) == (64, 1.0, 1)
    assert submit.sampling.HasField("seed")
    assert len(submit.request_id) == 32
    assert submit.tenant == ""
    assert not submit.HasField("timeout_ns")
    s = submit.stream
    a, b, c = letters("abc")
    world.scheduler.step([(s, a)], admitted={s: 7})
    first = await call.read()
    assert (first.prompt.prompt_tokens, first.first_token, list(first.token_ids), first.text) == (7, 0, [a], "a")
    assert first.request_id == submit.request_id
    world.scheduler.step([(s, b)])
    second = await call.read()
    assert (second.first_token, list(second.token_ids), second.text) == (1, [b], "b")
    assert not second.HasField("prompt")
    world.scheduler.step([(s, c), (s, EOS)], finished=[(s, 4, STOP)])
    (last,) = await rest(call)
    assert (last.first_token, list(last.token_ids), last.text) == (2, [c, EOS], "c")
    assert (last.finish.reason, last.finish.usage.completion_tokens) == (STOP, 4)


async def test_a_response_that_only_finishes_counts_the_tokens_delivered(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, token) for token in letters("ab")], admitted={s: 3})
    assert len((await call.read()).token_ids) == 2
    world.scheduler.step(finished=[(s, 2, LENGTH)])
    (last,) = await rest(call)
    assert (last.first_token, list(last.token_ids), last.finish.reason) == (2, [], LENGTH)


async def test_parallel_samples_take_consecutive_streams_and_are_told_apart_by_index(world: World) -> None:
    call = world.stub.Generate(ask(sampling=inference_pb2.SamplingParams(n=3, seed=9)))
    submit = await world.scheduler.expect("submit")
    s = submit.stream
    assert (submit.sampling.n, submit.sampling.seed) == (3, 9)
    a, b, c = letters("abc")
    world.scheduler.step(
        [(s, a), (s + 2, c), (s + 1, b)], admitted={s: 3}, finished=[(s + i, 1, LENGTH) for i in range(3)]
    )
    responses = await rest(call)
    assert {response.index: response.text for response in responses} == {0: "a", 1: "b", 2: "c"}
    assert [response.HasField("prompt") for response in responses] == [True, False, False]
    assert all(response.finish.usage.completion_tokens == 1 for response in responses)


async def test_a_stop_string_across_tokens_ends_the_sequence_and_what_lies_behind_is_dropped(world: World) -> None:
    call = world.stub.Generate(ask(stop=inference_pb2.StopParams(stop=["bc"])))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, token) for token in letters("abcd")], admitted={s: 3})
    stop = await world.scheduler.expect("stop")
    assert (stop.stream, stop.num_tokens, stop.matched_stop) == (s, 3, "bc")
    world.scheduler.step([(s, letters("e")[0])])
    world.scheduler.step(finished=[(s, 3, STOP)])
    responses = await rest(call)
    assert "".join(response.text for response in responses) == "a"
    assert [token for response in responses for token in response.token_ids] == letters("abc")
    finish = responses[-1].finish
    assert (finish.reason, finish.matched_stop, finish.usage.completion_tokens) == (STOP, "bc", 3)


async def test_a_stop_string_wins_over_an_end_that_came_behind_it(world: World) -> None:
    call = world.stub.Generate(ask(stop=inference_pb2.StopParams(stop=["b"], include_stop=True)))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, t) for t in letters("abcd")], admitted={s: 3}, finished=[(s, 4, LENGTH)])
    responses = await rest(call)
    assert "".join(response.text for response in responses) == "ab"
    finish = responses[-1].finish
    assert (finish.reason, finish.matched_stop, finish.usage.completion_tokens) == (STOP, "b", 2)


async def test_token_ids_come_at_once_and_text_when_it_is_complete(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    lead, *tail = letters("Ã©")  # the two bytes of é
    world.scheduler.step([(s, lead)], admitted={s: 3})
    first = await call.read()
    assert (list(first.token_ids), first.text) == ([lead], "")
    world.scheduler.step([(s, tail[0])])
    assert (await call.read()).text == "é"
    world.scheduler.step([(s, lead)], finished=[(s, 3, LENGTH)])
    assert "".join(response.text for response in await rest(call)) == "\ufffd"


async def test_tokens_that_arrive_while_the_client_waits_are_put_together(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, token) for token in letters("abcdef")], admitted={s: 3}, finished=[(s, 6, LENGTH)])
    (only,) = await rest(call)
    assert (only.text, len(only.token_ids), only.first_token) == ("abcdef", 6, 0)


async def test_echo_puts_the_prompts_text_in_front_of_every_sequence(world: World) -> None:
    output = inference_pb2.OutputOptions(echo=True)
    call = world.stub.Generate(ask("the cat", output=output, sampling=inference_pb2.SamplingParams(n=2)))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, letters("a")[0]), (s + 1, letters("b")[0])], admitted={s: 3})
    world.scheduler.step(finished=[(s, 1, LENGTH), (s + 1, 1, LENGTH)])
    responses = await rest(call)
    text = {index: "".join(r.text for r in responses if r.index == index) for index in (0, 1)}
    assert text == {0: "the cata", 1: "the catb"}
    assert list(responses[0].prompt.token_ids) == ids("the cat")


async def test_token_ids_only_leaves_the_text_empty_and_still_finds_stop_strings(world: World) -> None:
    options = {"output": inference_pb2.OutputOptions(token_ids_only=True), "stop": inference_pb2.StopParams(stop=["b"])}
    call = world.stub.Generate(ask(**options))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, token) for token in letters("ab")], admitted={s: 3})
    assert (await world.scheduler.expect("stop")).num_tokens == 2
    world.scheduler.step(finished=[(s, 2, STOP)])
    responses = await rest(call)
    assert "".join(response.text for response in responses) == ""
    assert sum(len(response.token_ids) for response in responses) == 2


async def test_logprobs_come_with_their_tokens(world: World) -> None:
    call = world.stub.Generate(ask(output=inference_pb2.OutputOptions(logprobs=1)))
    submit = await world.scheduler.expect("submit")
    assert submit.output.logprobs == 1
    s = submit.stream
    rows = [inference_pb2.TokenLogprobs(logprob=-float(i), rank=i, top_ids=[3], top_logprobs=[-0.5]) for i in (1, 2)]
    world.scheduler.step([(s, t) for t in letters("ab")], admitted={s: 3}, finished=[(s, 2, LENGTH)], logprobs=rows)
    (only,) = await rest(call)
    assert list(only.logprobs) == rows


async def test_a_chat_is_rendered_with_the_models_template(world: World) -> None:
    message = inference_pb2.ChatMessage(role="user", content="the cat")
    call = world.stub.Generate(inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt(messages=[message])))
    submit = await world.scheduler.expect("submit")
    assert list(submit.token_ids) == ids("[user] the cat\n[assistant]")
    call.cancel()


async def test_dropping_the_stream_detaches_and_a_deadline_goes_to_the_scheduler(world: World) -> None:
    call = world.stub.Generate(ask(), timeout=60)
    submit = await world.scheduler.expect("submit")
    assert 0 < submit.timeout_ns <= 61_000_000_000  # gRPC rounds it up on the wire
    call.cancel()
    assert (await world.scheduler.expect("detach")).stream == submit.stream


async def test_a_deadline_that_passes_is_deadline_exceeded_and_the_request_is_dropped(world: World) -> None:
    call = world.stub.Generate(ask(), timeout=0.2)
    submit = await world.scheduler.expect("submit")
    assert (await refusal(call)).code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await world.scheduler.expect("detach")).stream == submit.stream


async def test_a_detached_request_is_followed_without_a_client_until_its_stop_string(world: World) -> None:
    request = ask(request_id="job", stop=inference_pb2.StopParams(stop=["b"]))
    call = world.stub.Generate(request, metadata=(("pagewire-detach", "true"),), timeout=60)
    submit = await world.scheduler.expect("submit")
    assert submit.detached
    assert not submit.HasField("timeout_ns")
    world.scheduler.step([(submit.stream, letters("a")[0])], admitted={submit.stream: 3})
    await call.read()
    call.cancel()
    world.scheduler.step([(submit.stream, letters("b")[0])])
    assert (await world.scheduler.expect("stop")).num_tokens == 2
    assert world.scheduler.said_nothing_more()


async def test_a_failed_request_ends_with_the_schedulers_status_after_its_tokens(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, letters("a")[0])], admitted={s: 3})
    assert (await call.read()).text == "a"
    world.scheduler.fail(s, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_ns=2_000_000_000)
    details = await refusal(call)
    assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert details.retry_after_ns == 2_000_000_000


async def test_retrying_clients_are_told_when(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.fail(s, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_ns=2_000_000_000)
    await refusal(call)
    assert ("grpc-retry-pushback-ms", "2000") in [tuple(pair) for pair in await call.trailing_metadata()]


async def test_an_error_finish_ends_with_internal_and_a_deadline_finish_with_deadline_exceeded(world: World) -> None:
    for reason, code in (
        (inference_pb2.FINISH_REASON_ERROR, grpc.StatusCode.INTERNAL),
        (inference_pb2.FINISH_REASON_DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
    ):
        call = world.stub.Generate(ask())
        s = (await world.scheduler.expect("submit")).stream
        world.scheduler.step(admitted={s: 3}, finished=[(s, 0, reason)])
        assert (await call.read()).finish.reason == reason
        assert (await refusal(call)).code == code


async def test_cancel_asks_the_scheduler_and_says_whether_it_found_something(world: World) -> None:
    world.scheduler.live_ids.add("known")
    assert (await world.stub.Cancel(inference_pb2.CancelRequest(request_id="known"))).found
    assert not (await world.stub.Cancel(inference_pb2.CancelRequest(request_id="unknown"))).found
    assert world.scheduler.aborted == ["known", "unknown"]
    details = await refusal(world.stub.Cancel(inference_pb2.CancelRequest()))
    assert [field for field, _ in details.violations] == ["request_id"]


async def test_a_request_cancelled_while_it_is_tokenized_ends_as_cancelled(world: World) -> None:
    gate = asyncio.Event()
    tokenizer = world.gateway.path._tokenizer
    assert tokenizer is not None
    encode = tokenizer.encode

    async def slow_encode(text: str, **options: bool) -> Any:
        await gate.wait()
        return await encode(text, **options)

    tokenizer.encode = slow_encode  # type: ignore[method-assign]
    call = world.stub.Generate(ask("the cat", request_id="early"))
    cancel = inference_pb2.CancelRequest(request_id="early")
    async with asyncio.timeout(LIMIT_S):
        while not (await world.stub.Cancel(cancel)).found:
            pass  # each round trip lets the server come to the request
    gate.set()
    (only,) = await rest(call)
    assert only.finish.reason == CANCELLED
    assert world.scheduler.said_nothing_more()


@pytest.mark.parametrize("payload", [b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\xff" * 100], ids=["cut", "utf8", "noise"])
@pytest.mark.parametrize("method", ["Generate", "Attach", "Cancel", "Tokenize", "Detokenize"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(world: World, method: str, payload: bytes) -> None:
    path = f"/pagewire.v1.InferenceService/{method}"
    streaming = method in ("Generate", "Attach")
    make: Any = world.channel.unary_stream if streaming else world.channel.unary_unary
    details = await refusal(make(path)(payload))
    if details.code != grpc.StatusCode.INVALID_ARGUMENT:  # bytes that happen to be a message with unknown fields
        pytest.fail(f"{details.code} {details.message}")
    assert "Error" not in details.message


NAN = inference_pb2.SamplingParams(temperature=float("nan"))
TOO_FEW_BEAMS = inference_pb2.SamplingParams(beam_width=2, n=3)
WARM_BEAMS = inference_pb2.SamplingParams(beam_width=2, temperature=0.5)
TOO_MANY = inference_pb2.SamplingParams(n=129)
MORE_THAN_MOST = inference_pb2.StopParams(min_tokens=6, max_tokens=5)


@pytest.mark.parametrize(
    ("request_message", "code", "reason", "path"),
    [
        (ask(sampling=NAN), "INVALID_ARGUMENT", "INVALID_FIELD", "sampling.temperature"),
        (ask([5, 600]), "INVALID_ARGUMENT", "INVALID_FIELD", "prompt.token_ids.ids[1]"),
        (ask([5] * CONTEXT), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt.token_ids"),
        (ask("a b " * CONTEXT), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt.text"),
        (ask(model="another"), "NOT_FOUND", "MODEL_NOT_FOUND", None),
        (ask(sampling=TOO_FEW_BEAMS), "INVALID_ARGUMENT", "INVALID_FIELD", "sampling.n"),
        (ask(sampling=WARM_BEAMS), "INVALID_ARGUMENT", "INVALID_FIELD", "sampling.temperature"),
        (ask(sampling=TOO_MANY), "INVALID_ARGUMENT", "INVALID_FIELD", "sampling.n"),
        (ask(stop=MORE_THAN_MOST), "INVALID_ARGUMENT", "INVALID_FIELD", "stop.min_tokens"),
    ],
    ids=["nan", "vocabulary", "long ids", "long text", "model", "beams", "warm beams", "samples", "stop"],
)  # fmt: skip
async def test_a_bad_request_is_refused_with_code_reason_and_path(
    world: World, request_message: Message, code: str, reason: str, path: str | None
) -> None:
    details = await refusal(world.stub.Generate(request_message))
    assert (details.code.name, details.reason, details.domain) == (code, reason, "pagewire")
    assert [field for field, _ in details.violations] == ([] if path is None else [path])
    assert world.scheduler.said_nothing_more()


async def test_a_million_token_ids_are_refused_by_their_number(world: World) -> None:
    details = await refusal(world.stub.Generate(ask([1] * 1_000_000)))
    assert (details.code.name, details.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
    assert f"at most {CONTEXT - 1}" in details.message


async def test_text_goes_both_ways(world: World) -> None:
    answer = await world.stub.Tokenize(inference_pb2.TokenizeRequest(text="the cat"))
    assert list(answer.token_ids) == ids("the cat")
    back = await world.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[*ids("the cat"), EOS]))
    assert back.text == "the cat"
    message = inference_pb2.ChatMessage(role="user", content="x")
    chat = inference_pb2.TokenizeRequest(chat=inference_pb2.ChatPrompt(messages=[message]))
    assert list((await world.stub.Tokenize(chat)).token_ids) == ids("[user] x\n[assistant]")
    long = "the cat sat on the mat. " * 4000
    assert list((await world.stub.Tokenize(inference_pb2.TokenizeRequest(text=long))).token_ids) == ids(long)
    details = await refusal(world.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[600])))
    assert [field for field, _ in details.violations] == ["token_ids[0]"]


async def test_a_gateway_without_a_tokenizer_serves_token_ids(make_world: MakeWorld) -> None:
    world = await make_world(None)
    call = world.stub.Generate(ask([5, 6]))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, 7), (s, EOS)], admitted={s: 2}, finished=[(s, 2, STOP)])
    (only,) = await rest(call)
    assert (list(only.token_ids), only.text) == ([7, EOS], "")
    message = inference_pb2.ChatMessage(role="user", content="x")
    for request in (
        ask("text"),
        inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt(messages=[message])),
    ):
        details = await refusal(world.stub.Generate(request))
        assert (details.code.name, details.reason) == ("INVALID_ARGUMENT", "NO_TOKENIZER")
    details = await refusal(world.stub.Tokenize(inference_pb2.TokenizeRequest(text="x")))
    assert details.reason == "NO_TOKENIZER"


async def test_a_model_without_a_chat_template_says_so(make_world: MakeWorld) -> None:
    world = await make_world(tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level(), template=None))
    message = inference_pb2.ChatMessage(role="user", content="x")
    chat = inference_pb2.GenerateRequest(chat=inference_pb2.ChatPrompt(messages=[message]))
    details = await refusal(world.stub.Generate(chat))
    assert (details.code.name, details.reason) == ("INVALID_ARGUMENT", "NO_CHAT_TEMPLATE")


async def test_models_are_listed_under_the_served_name(make_world: MakeWorld) -> None:
    world = await make_world(served_model_name="mine")
    (model,) = (await world.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert (model.name, model.vocab_size, model.max_model_len, model.kv_blocks) == ("mine", 600, CONTEXT, 100)
    assert model.ready
    details = await refusal(world.stub.Generate(ask(model="tiny")))
    assert details.code == grpc.StatusCode.NOT_FOUND


async def test_requests_wait_for_nobody_when_no_worker_is_ready(world: World) -> None:
    for state, reason in ((model_state(ready=False), "NO_WORKER"), (model_state(draining=True), "DRAINING")):
        world.scheduler.set_state(state)
        async with asyncio.timeout(LIMIT_S):
            while (await world.stub.ListModels(inference_pb2.ListModelsRequest())).models[0].ready:
                pass
        details = await refusal(world.stub.Generate(ask()))
        assert (details.code.name, details.reason) == ("UNAVAILABLE", reason)
        assert details.retry_after_ns > 0


async def test_a_full_gateway_refuses_with_a_retry_delay(make_world: MakeWorld) -> None:
    world = await make_world(max_live_requests=1)
    call = world.stub.Generate(ask())
    await world.scheduler.expect("submit")
    details = await refusal(world.stub.Generate(ask()))
    assert (details.code.name, details.reason) == ("RESOURCE_EXHAUSTED", "GATEWAY_FULL")
    assert details.retry_after_ns > 0
    call.cancel()


async def test_a_client_that_does_not_read_loses_its_stream_and_others_do_not_notice(make_world: MakeWorld) -> None:
    world = await make_world(stream_buffer_bytes=1 << 14, write_timeout_s=60.0)
    path = "/pagewire.v1.InferenceService/Generate"
    slow_channel = grpc.aio.insecure_channel(world.gateway.address, options=[("grpc.use_local_subchannel_pool", 1)])
    make: Any = slow_channel.unary_stream
    slow = make(path)(ask(request_id="slow").SerializeToString())  # never read until the end
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, 9)], admitted={s: 3})
    rows = [inference_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[0.25] * 20)] * 1000
    quick = world.stub.Generate(ask(request_id="quick"))
    q = (await world.scheduler.expect("submit")).stream
    stepped = 0
    async with asyncio.timeout(LIMIT_S):
        while world.scheduler.said_nothing_more():
            world.scheduler.step([(s, 9)] * 1000, logprobs=rows)
            stepped += 1
            assert stepped < 2000
            world.scheduler.step([(q, 9)], admitted={q: 3})
            await quick.read()
    assert (await world.scheduler.expect("detach")).stream == s
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rest(slow)
    details = rich_status.decode(caught.value)
    assert (details.code.name, details.reason) == ("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")
    world.scheduler.step(finished=[(q, stepped, LENGTH)])
    assert (await rest(quick))[-1].finish.reason == LENGTH
    await slow_channel.close()


async def test_one_write_may_not_take_longer_than_its_timeout(make_world: MakeWorld) -> None:
    world = await make_world(stream_buffer_bytes=1 << 30, write_timeout_s=0.3)
    make: Any = world.channel.unary_stream
    slow = make("/pagewire.v1.InferenceService/Generate")(ask().SerializeToString())
    s = (await world.scheduler.expect("submit")).stream
    rows = [inference_pb2.TokenLogprobs(top_ids=range(20), top_logprobs=[0.25] * 20)] * 1000
    world.scheduler.step([(s, 9)], admitted={s: 3})
    for _ in range(60):  # some 13 MB; gRPC and the kernel take about 4
        world.scheduler.step([(s, 9)] * 1000, logprobs=rows)
    assert (await world.scheduler.expect("detach")).stream == s
    slow.cancel()


async def test_the_gateway_gives_credit_back(world: World) -> None:
    call = world.stub.Generate(ask())
    s = (await world.scheduler.expect("submit")).stream
    assert world.scheduler.hellos[0].credit == 64
    for position in range(32):
        world.scheduler.step([(s, 9)], admitted={s: 3} if position == 0 else {})
    received = 0
    while received < 32:
        received += len((await call.read()).token_ids)
    world.scheduler.step([(s, 9)], finished=[(s, 33, LENGTH)])
    await rest(call)
    await world.stub.Cancel(inference_pb2.CancelRequest(request_id="none"))
    async with asyncio.timeout(LIMIT_S):
        while world.scheduler.credit_given < 32:
            await world.stub.Cancel(inference_pb2.CancelRequest(request_id="none"))


async def test_a_synchronous_client_streams_too(world: World) -> None:
    texts: list[str] = []

    def client() -> None:
        with grpc.insecure_channel(world.gateway.address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            texts.extend(response.text for response in stub.Generate(ask("the cat"), timeout=LIMIT_S))

    thread = threading.Thread(target=client)
    thread.start()
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, t) for t in letters("abc")], admitted={s: 3}, finished=[(s, 3, LENGTH)])
    await asyncio.to_thread(thread.join, LIMIT_S)
    assert "".join(texts) == "abc"


async def test_neither_logs_nor_errors_show_a_prompt(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    canary = "canary-7731"
    bad = [
        ask(canary, sampling=inference_pb2.SamplingParams(n=1000)),
        ask(canary * 5000),
        ask(canary, stop=inference_pb2.StopParams(stop=[canary * 100])),
        ask([5], tenant=canary + "\n"),
    ]
    for request in bad:
        assert canary not in (await refusal(world.stub.Generate(request))).message
    out, err = capfd.readouterr()
    assert canary not in out + err


async def test_an_unforeseen_exception_is_internal_without_its_text(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    async def broken(text: str, **options: bool) -> Any:
        raise RuntimeError(f"cannot handle {text}")

    tokenizer = world.gateway.path._tokenizer
    assert tokenizer is not None
    tokenizer.encode = broken  # type: ignore[method-assign]
    details = await refusal(world.stub.Generate(ask("canary-7731")))
    assert (details.code.name, details.message, details.reason) == ("INTERNAL", "internal error", "INTERNAL")
    out, err = capfd.readouterr()
    assert "RuntimeError" in out + err
    assert "canary" not in out + err
