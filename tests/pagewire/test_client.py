"""Both clients against a service whose answers are known, over a real socket."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from pagewire import errors
from pagewire.aio import AsyncClient
from pagewire.client import Client
from pagewire.requests import generate_request
from pagewire.resume import NS_PER_S, StreamState
from pagewire.runtime.rich_status import StatusDetails
from pagewire.types import Piece
from pagewire.v1 import inference_pb2
from tests.pagewire.fake_gateway import FakeGateway, serving

Run = Callable[..., Awaitable[list[Piece]]]


async def run_sync(address: str, prompt: Any, **options: Any) -> list[Piece]:
    def work() -> list[Piece]:
        with Client(address) as client:
            return list(client.generate(prompt, **options))

    return await asyncio.to_thread(work)


async def run_async(address: str, prompt: Any, **options: Any) -> list[Piece]:
    async with AsyncClient(address) as client:
        return [piece async for piece in client.generate(prompt, **options)]


both_clients = pytest.mark.parametrize("run", [run_sync, run_async])


@pytest.fixture
async def gateway() -> FakeGateway:
    return FakeGateway()


def tokens(pieces: list[Piece], index: int = 0) -> list[int]:
    return [token for piece in pieces if piece.index == index for token in piece.token_ids]


@both_clients
async def test_pieces_arrive_with_prompt_first_and_finish_last(run: Run, gateway: FakeGateway) -> None:
    async with serving(gateway) as address:
        pieces = await run(address, "hello", max_tokens=3, temperature=0.0, seed=7, stop="x")
    assert [piece.text for piece in pieces] == ["<0>", "<1>", "<2>"]
    assert pieces[0].prompt is not None
    assert pieces[0].prompt.prompt_tokens == 3
    assert pieces[1].finish is None
    assert pieces[-1].finish is not None
    assert (pieces[-1].finish.reason, pieces[-1].finish.usage.completion_tokens) == ("length", 3)
    (request,) = gateway.requests.values()
    assert (request.text, request.stop.max_tokens, list(request.stop.stop)) == ("hello", 3, ["x"])
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p"), "what was not given is the server's default"
    assert request.sampling.seed == 7
    assert gateway.cancelled == []


@both_clients
async def test_token_ids_and_chats_are_prompts_too(run: Run, gateway: FakeGateway) -> None:
    async with serving(gateway) as address:
        await run(address, [5, 6], max_tokens=1, request_id="ids")
        await run(address, [{"role": "user", "content": "hi"}], max_tokens=1, request_id="chat")
    assert list(gateway.requests["ids"].token_ids.ids) == [5, 6]
    assert gateway.requests["chat"].chat.messages[0].content == "hi"


@both_clients
@pytest.mark.parametrize("break_after", [(2,), (1, 1, 3), (0,), (-1,), (5, 0, 0)])
async def test_a_broken_stream_goes_on_without_a_gap_or_a_repeat(run: Run, break_after: tuple[int, ...]) -> None:
    gateway = FakeGateway(break_after=break_after)
    async with serving(gateway) as address:
        pieces = await run(address, "hello", max_tokens=8)
    assert tokens(pieces) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert gateway.metadata[0]["pagewire-detach"] == "true"
    assert len(gateway.requests) == 1, "the request ran once"
    assert "Attach" in gateway.calls


@both_clients
async def test_every_sequence_is_resumed_at_its_own_position(run: Run) -> None:
    gateway = FakeGateway(break_after=(4, 3))
    async with serving(gateway) as address:
        pieces = await run(address, "hello", max_tokens=4, n=3)
    assert [tokens(pieces, index) for index in range(3)] == [[0, 1, 2, 3]] * 3
    assert gateway.calls == ["Generate", "Attach", "Attach"]


@both_clients
async def test_wrong_input_raises_with_the_fields_path_and_is_not_retried(run: Run, gateway: FakeGateway) -> None:
    async with serving(gateway) as address:
        with pytest.raises(errors.InvalidRequestError) as raised:
            await run(address, "refuse", max_tokens=1)
    assert raised.value.reason == "FIELD_OUT_OF_RANGE"
    assert raised.value.violations == (("sampling.temperature", "must be at most 100"),)
    assert gateway.calls == ["Generate"]


@both_clients
async def test_a_refusal_for_lack_of_workers_is_raised_at_once_with_the_time_to_retry(
    run: Run, gateway: FakeGateway
) -> None:
    async with serving(gateway) as address:
        with pytest.raises(errors.UnavailableError) as raised:
            await run(address, "no worker", max_tokens=1)
    assert (raised.value.reason, raised.value.retry_after_ns) == ("NO_WORKER", 1_000_000_000)
    assert gateway.calls == ["Generate"]


@both_clients
async def test_a_request_that_the_server_has_forgotten_ends_the_stream_with_an_error(run: Run) -> None:
    class Forgetful(FakeGateway):
        async def Attach(self, request: Any, context: Any) -> None:  # noqa: N802
            self.requests.clear()
            await super().Attach(request, context)

    async with serving(Forgetful(break_after=(2,))) as address:
        with pytest.raises(errors.StreamError, match="can no longer be continued"):
            await run(address, "hello", max_tokens=8)


@both_clients
async def test_a_server_that_is_not_there_is_an_error_at_once(run: Run, gateway: FakeGateway) -> None:
    async with serving(gateway) as address:
        pass
    with pytest.raises(errors.UnavailableError, match="no server at 127"):
        await run(address, "hello", max_tokens=1)


@both_clients
async def test_the_timeout_ends_the_stream(run: Run, gateway: FakeGateway) -> None:
    gateway.hold.clear()
    async with serving(gateway) as address:
        with pytest.raises(errors.DeadlineError):
            await run(address, "hello", max_tokens=8, timeout=0.2)


async def test_dropping_a_synchronous_stream_cancels_the_request(gateway: FakeGateway) -> None:
    gateway.hold.clear()

    def take_one(client: Client) -> str:
        for piece in client.generate("hello", max_tokens=8):
            return piece.request_id
        raise AssertionError("no piece arrived")

    async with serving(gateway) as address:
        with Client(address) as client:
            request_id = await asyncio.to_thread(take_one, client)
            await gateway.cancel_seen.wait()
    assert gateway.cancelled == [request_id]


async def test_closing_a_synchronous_stream_cancels_the_request(gateway: FakeGateway) -> None:
    gateway.hold.clear()

    def take_one(address: str) -> str:
        with Client(address) as client, client.generate("hello", max_tokens=8) as stream:
            next(stream)
        return stream.request_id

    async with serving(gateway) as address:
        request_id = await asyncio.to_thread(take_one, address)
        assert gateway.cancelled == [request_id]


async def test_leaving_an_asynchronous_stream_cancels_the_request(gateway: FakeGateway) -> None:
    gateway.hold.clear()
    async with serving(gateway) as address, AsyncClient(address) as client:
        stream = client.generate("hello", max_tokens=8)
        piece = await anext(stream)
        await stream.aclose()
        assert gateway.cancelled == [piece.request_id]


async def test_a_cancelled_task_cancels_its_request(gateway: FakeGateway) -> None:
    gateway.hold.clear()
    async with serving(gateway) as address, AsyncClient(address) as client:
        arrived = asyncio.Event()

        async def read() -> None:
            async for _piece in client.generate("hello", max_tokens=8):
                arrived.set()

        task = asyncio.create_task(read())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gateway.cancel_seen.wait()
        assert gateway.cancelled == list(gateway.requests)


async def test_without_resume_the_request_is_not_detached_and_a_break_is_raised() -> None:
    gateway = FakeGateway(break_after=(2,))
    async with serving(gateway) as address, AsyncClient(address, resume_s=0) as client:
        with pytest.raises(errors.UnavailableError):
            async for _piece in client.generate("hello", max_tokens=8):
                pass
    assert "pagewire-detach" not in gateway.metadata[0]
    assert gateway.calls == ["Generate"]


async def test_attach_gives_the_whole_stream_of_a_request_and_never_cancels_it(gateway: FakeGateway) -> None:
    async with serving(gateway) as address, AsyncClient(address) as client:
        pieces = [piece async for piece in client.generate("hello", max_tokens=4, request_id="mine")]
        again = [piece async for piece in client.attach("mine")]
        stream = client.attach("mine")
        await anext(stream)
        await stream.aclose()
    assert tokens(again) == tokens(pieces) == [0, 1, 2, 3]
    assert gateway.cancelled == []


async def test_the_other_verbs(gateway: FakeGateway) -> None:
    async with serving(gateway) as address, AsyncClient(address) as client:
        assert await client.tokenize("ab") == [97, 98]
        assert await client.tokenize([{"role": "u", "content": "x"}]) == list(b"u:x")
        assert await client.detokenize([97, 98]) == "ab"
        assert await client.cancel("unknown") is False
        (model,) = await client.models()
        assert (model.name, model.max_model_len, model.block_size) == ("fake", 128, 16)

        def work() -> None:
            with Client(address) as sync_client:
                assert sync_client.tokenize("ab") == [97, 98]
                assert sync_client.detokenize([97, 98]) == "ab"
                assert sync_client.cancel("unknown") is False
                assert sync_client.models() == [model]
                assert sync_client.generate("hello", max_tokens=2).text() == "<0><1>"

        await asyncio.to_thread(work)


def test_an_unknown_option_is_a_type_error() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="unknown option 'temprature'"):
        client.generate("hello", temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("prompt", "options", "line"),
    [
        ("hello", {"max_tokens": -1}, "max_tokens: Value out of range: -1"),
        ("hello", {"top_k": 1 << 32}, "top_k: Value out of range: 4294967296"),
        ("hello", {"request_id": "\udcff"}, "request_id holds bytes that are not UTF-8"),
        ("\udcff", {}, "the prompt holds bytes that are not UTF-8"),
        ([{"role": "user", "content": "\udcff"}], {}, "a message holds bytes that are not UTF-8"),
    ],
)
def test_a_value_that_fits_no_field_is_refused_by_the_fields_name(prompt: Any, options: dict, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        generate_request(prompt, options)  # type: ignore[arg-type]


def test_a_server_that_stays_away_is_told_in_plain_words() -> None:
    state = StreamState(inference_pb2.GenerateRequest(), resume_ns=30 * NS_PER_S)
    raw = StatusDetails(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: UNKNOWN: ...")
    state.broke(raw, now=0)
    with pytest.raises(errors.UnavailableError, match=r"^UNAVAILABLE: the server has been out of reach for 31 s$"):
        state.broke(raw, now=31 * NS_PER_S)


def test_who_waits_is_told_once_per_break_and_not_of_every_attempt() -> None:
    told: list[int] = []
    state = StreamState(inference_pb2.GenerateRequest(), 30 * NS_PER_S, on_break=lambda: told.append(1))
    lost = StatusDetails(grpc.StatusCode.UNAVAILABLE, "")
    state.broke(lost, now=0)
    state.broke(lost, now=NS_PER_S)
    assert len(told) == 1
    state.accept(inference_pb2.GenerateResponse(token_ids=[5]))
    state.broke(lost, now=2 * NS_PER_S)
    assert len(told) == 2


def test_a_status_without_details_is_decoded_as_far_as_it_goes() -> None:
    error = errors.from_details(StatusDetails(grpc.StatusCode.INTERNAL, "odd"))
    assert type(error) is errors.StatusError
    assert str(error) == "INTERNAL: odd"
