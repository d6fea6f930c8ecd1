"""The `openai` packages of Python and npm against the door: what an application sees."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from pagewire.v1 import inference_pb2
from tests.gateway.conftest import MakeDoor, World, address
from tests.gateway.fake_scheduler import CONTEXT
from tests.gateway.test_generate import ids, letters, rest

LENGTH = inference_pb2.FINISH_REASON_LENGTH
MESSAGES: Any = [{"role": "user", "content": "hello"}]
NODE_SCRIPT = Path(__file__).with_name("client.mjs")
Result = TypeVar("Result")


@contextmanager
def sync_client(world: World, **options: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{address(world)}/v1", api_key="none", max_retries=0, **options) as client:
        yield client


@asynccontextmanager
async def async_client(world: World, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"http://{address(world)}/v1", api_key="none", **{"max_retries": 0, **options}
    ) as client:
        yield client


async def play(world: World) -> None:
    """Answers every request with "abcd" and so on for each of its samples, token by token, as long as it may be."""
    while True:
        submit = await world.scheduler.expect("submit")
        n, s = submit.sampling.n, submit.stream
        count = min(submit.stop.max_tokens, 4)
        world.scheduler.step(admitted={s: len(submit.token_ids)})
        for token in letters("abcd"[:count]):
            entries = [inference_pb2.TokenLogprobs(logprob=-0.5, rank=1, top_ids=[token], top_logprobs=[-0.5])] * n
            wanted = submit.output.HasField("logprobs")
            world.scheduler.step([(s + index, token) for index in range(n)], logprobs=entries if wanted else ())
        world.scheduler.step(finished=[(s + index, count, LENGTH) for index in range(n)])


@pytest.fixture
async def played(door: World) -> AsyncIterator[World]:
    """A door behind which every request is answered."""
    task = asyncio.create_task(play(door))
    yield door
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def in_thread(world: World, use: Callable[[OpenAI], Result]) -> Result:
    """Runs what a synchronous application does."""

    def run() -> Result:
        with sync_client(world) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_the_synchronous_client_completes_and_streams(played: World) -> None:
    def whole(client: OpenAI) -> Any:
        return client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=1)

    completion = await in_thread(played, whole)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("abc", "length", ["a", "b", "c"])
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 3)
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    assert len(completion._request_id) == 32

    def streamed(client: OpenAI) -> Any:
        return list(client.completions.create(model="tiny", prompt=["x", "y"], max_tokens=2, stream=True))

    texts = {0: "", 1: ""}
    for chunk in await in_thread(played, streamed):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "ab", 1: "ab"}


async def test_the_client_takes_the_finish_of_a_parked_request(door: World) -> None:
    asking = asyncio.create_task(
        in_thread(door, lambda client: client.chat.completions.create(model="tiny", messages=MESSAGES))
    )
    s = (await door.scheduler.expect("submit")).stream
    finished = [(s, 1, inference_pb2.FINISH_REASON_PARKED)]
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1}, finished=finished)
    (choice,) = (await asking).choices
    assert (choice.message.content, choice.finish_reason) == ("a", "parked")


async def test_the_synchronous_client_chats_and_streams_chats(played: World) -> None:
    def whole(client: OpenAI) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=2, n=2, logprobs=True, top_logprobs=1
        )

    completion = await in_thread(played, whole)
    assert [choice.message.content for choice in completion.choices] == ["ab", "ab"]
    assert completion.choices[1].logprobs.content[0].top_logprobs[0].bytes == [97]

    def streamed(client: OpenAI) -> Any:
        with client.chat.completions.stream(
            model="tiny", messages=MESSAGES, max_completion_tokens=3, stream_options={"include_usage": True}
        ) as stream:
            stream.until_done()
            return stream.current_completion_snapshot

    snapshot = await in_thread(played, streamed)
    assert (snapshot.choices[0].message.role, snapshot.choices[0].message.content) == ("assistant", "abc")
    assert snapshot.usage.completion_tokens == 3


async def test_the_asynchronous_client_completes_chats_and_streams(played: World) -> None:
    async with async_client(played) as client:
        completion = await client.completions.create(model="tiny", prompt=[5, 6], max_tokens=1)
        assert completion.choices[0].text == "a"
        chat = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=4,
            extra_body={"top_k": 5, "min_p": 0.1, "priority": 1, "ignore_eos": True, "no_such_field": 1},
        )
        assert chat.choices[0].message.content == "abcd"
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "abcd"
        assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)
        many = await asyncio.gather(
            *(client.completions.create(model="tiny", prompt="x", max_tokens=2) for _ in range(20))
        )
        assert {completion.choices[0].text for completion in many} == {"ab"}
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_leaving_a_stream_cancels_the_request(door: World) -> None:
    async with async_client(door) as client:
        creating = asyncio.create_task(client.completions.create(model="tiny", prompt="x", stream=True))
        s = (await door.scheduler.expect("submit")).stream
        door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
        async with await creating as stream:
            assert (await anext(aiter(stream))).choices[0].text == "a"
        assert (await door.scheduler.expect("detach")).stream == s


async def test_a_timeout_of_the_client_cancels_the_request(door: World) -> None:
    async with async_client(door) as client:
        creating = asyncio.create_task(client.completions.create(model="tiny", prompt="x", timeout=0.5))
        s = (await door.scheduler.expect("submit")).stream
        with pytest.raises(openai.APITimeoutError):
            await creating
        assert (await door.scheduler.expect("detach")).stream == s


async def test_errors_raise_the_packages_own_classes(door: World) -> None:
    async with async_client(door) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=101)
        assert (bad.value.param, bad.value.code, bad.value.type) == (
            "temperature",
            "invalid_field",
            "invalid_request_error",
        )
        assert bad.value.request_id is not None
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="tiny", prompt=[5] * CONTEXT)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-4", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"
        for code, reason, kind in (
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", openai.RateLimitError),
            (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS", openai.ConflictError),
            (grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS", openai.InternalServerError),
        ):
            creating = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
            door.scheduler.fail((await door.scheduler.expect("submit")).stream, code, reason)
            with pytest.raises(kind) as caught:
                await creating
            assert caught.value.body["reason"] == reason
        stream = asyncio.create_task(client.completions.create(model="tiny", prompt="x", stream=True))
        s = (await door.scheduler.expect("submit")).stream
        door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
        chunks = aiter(await stream)
        assert (await anext(chunks)).choices[0].text == "a"
        door.scheduler.fail(s, grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS")
        with pytest.raises(openai.APIError, match="said by the test"):
            await anext(chunks)


async def test_the_client_retries_what_a_retry_helps_and_nothing_else(door: World) -> None:
    async with async_client(door, max_retries=2) as client:
        creating = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
        first = await door.scheduler.expect("submit")
        door.scheduler.fail(first.stream, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_after_ns=1_000_000)
        s = (await door.scheduler.expect("submit")).stream
        door.scheduler.step([(s, 9)], admitted={s: 1}, finished=[(s, 1, LENGTH)])
        assert (await creating).usage.completion_tokens == 1
        creating = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
        s = (await door.scheduler.expect("submit")).stream
        door.scheduler.fail(s, grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED")
        with pytest.raises(openai.RateLimitError):
            await creating
        assert door.scheduler.said_nothing_more()


async def test_api_keys_are_the_packages_api_keys(make_door: MakeDoor, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-of-a-test\n")
    door = await make_door(api_keys_file=tmp_path / "keys")
    async with async_client(door) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert len((await client.with_options(api_key="sk-of-a-test").models.list()).data) == 1


async def test_text_tokens_and_counts_are_those_of_grpc(played: World) -> None:
    request = inference_pb2.GenerateRequest(
        text="hello",
        stop=inference_pb2.StopParams(max_tokens=4),
        output=inference_pb2.OutputOptions(echo=True),
    )
    responses = await rest(played.stub.Generate(request))
    async with async_client(played) as client:
        completion = await client.completions.create(
            model="tiny", prompt="hello", max_tokens=4, echo=True, extra_body={"return_token_ids": True}
        )
    (choice,) = completion.choices
    assert choice.text == "".join(response.text for response in responses) == "helloabcd"
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == [token for response in responses for token in response.token_ids]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == responses[-1].finish.usage.completion_tokens == 4
    assert completion.usage.prompt_tokens == responses[0].prompt.prompt_tokens == len(ids("hello"))


def node_modules(folder: Path) -> str:
    """Installs npm's `openai` into a folder. Returns why that cannot be; empty if it is there."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node and npm are not installed"
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), "openai@7.57.0"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "npm could not fetch openai within 60 s"
    return "" if done.returncode == 0 else "npm cannot fetch openai"


@pytest.fixture(scope="session")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with npm's `openai`; skips where there is none. PAGEWIRE_TEST_NPM_FOLDER may name one that has it."""
    given = os.environ.get("PAGEWIRE_TEST_NPM_FOLDER")
    folder = Path(given) if given else tmp_path_factory.mktemp("npm")
    if not (folder / "node_modules" / "openai").is_dir() and (reason := node_modules(folder)):
        pytest.skip(reason)
    return folder


async def test_the_npm_client_completes_chats_streams_and_throws(played: World, npm_folder: Path) -> None:
    script = npm_folder / NODE_SCRIPT.name
    shutil.copyfile(NODE_SCRIPT, script)
    process = await asyncio.create_subprocess_exec(
        "node",
        str(script),
        f"http://{address(played)}/v1",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert json.loads(output) == {
        "completion": {"text": "abc", "finish": "length", "total": 4},
        "stream": ["a", "b", "c", "d"],
        "chat": {"role": "assistant", "content": "ab", "token": "a"},
        "chatStream": {"text": "abcd", "usage": 4},
        "bad": {"name": "BadRequestError", "status": 400, "param": "temperature", "code": "invalid_field"},
        "unknown": {"name": "NotFoundError", "code": "model_not_found"},
        "models": ["tiny"],
    }
