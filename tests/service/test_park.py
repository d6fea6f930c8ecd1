"""A parked request goes on as if nothing had been, through real processes: its tokens are those of transformers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from pagewire.aio import AsyncClient
from pagewire.client import Client
from pagewire.runtime.rich_status import decode
from pagewire.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests import tiny_models
from tests.service import service

CONTEXT = 512
LIST_MODELS = inference_pb2.ListModelsRequest()
PARKED = inference_pb2.FINISH_REASON_PARKED
LENGTH = inference_pb2.FINISH_REASON_LENGTH

SERVICES = {
    "the KV comes back from the arena": (["--host-blocks", "512"], True),
    "everything is computed again": (["--host-blocks", "0", "--no-prefix-cache"], False),
}


def some_tokens(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(4, tiny_models.VOCAB_SIZE) for _ in range(count)]


class Conversation:
    """One request over its turns, and what one undisturbed request would have given."""

    def __init__(self, channel: grpc.aio.Channel, model: Path, request_id: str) -> None:
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.model = model
        self.request_id = request_id
        self.said: list[int] = []  # prompt, output and input so far
        self.output: list[int] = []  # output over all turns

    async def follow(
        self, responses: AsyncIterator[inference_pb2.GenerateResponse], park_after: int = 0, ttl_seconds: int = 0
    ) -> inference_pb2.Finish:
        """Reads one turn to its end; parks it once `park_after` of its tokens have arrived."""
        arrived = 0
        park: inference_pb2.ParkResponse | None = None
        finish = None
        async for response in responses:
            assert response.first_token == len(self.output), "a gap or a repeat in the stream"
            self.output.extend(response.token_ids)
            self.said.extend(response.token_ids)
            arrived += len(response.token_ids)
            if park_after and park is None and arrived >= park_after:
                request = inference_pb2.ParkRequest(request_id=self.request_id, ttl_seconds=ttl_seconds)
                park = await self.stub.Park(request)
            if response.HasField("finish"):
                finish = response.finish
        assert finish is not None
        assert finish.usage.completion_tokens == len(self.output)
        if park is not None:
            assert finish.reason == PARKED
            assert [position.first_token for position in park.positions] == [len(self.output)]
        return finish

    async def start(
        self, prompt: list[int], max_tokens: int, *, hold: int = 0, park_after: int = 0, ttl_seconds: int = 0
    ) -> None:
        self.said = prompt.copy()
        request = service.greedy(prompt, max_tokens, request_id=self.request_id, hold_seconds=hold)
        finish = await self.follow(self.stub.Generate(request), park_after, ttl_seconds)
        assert finish.usage.prompt_tokens == len(prompt)

    async def go_on(
        self, tokens: list[int] | None = None, max_tokens: int = 0, *, hold: int = 0, park_after: int = 0
    ) -> inference_pb2.Finish:
        """The next turn, compared with a request that has everything so far as its prompt."""
        self.said += tokens or []
        before = self.said.copy()
        begun = len(self.output)
        request = inference_pb2.ContinueRequest(request_id=self.request_id, max_tokens=max_tokens, hold_seconds=hold)
        if tokens:
            request.token_ids.ids.extend(tokens)
        finish = await self.follow(self.stub.Continue(request), park_after)
        got = self.output[begun:]
        assert got == tiny_models.reference_greedy(self.model, before, len(got))
        assert finish.usage.prompt_tokens + len(self.output) == len(self.said)
        return finish


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """What a call is refused with."""

    async def end() -> None:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end()
    details = decode(caught.value)
    return details.code, details.reason


async def until_parked(channel: grpc.aio.Channel) -> control_pb2.WorkerLoad:
    """The load once no GPU block is in use."""
    async with asyncio.timeout(30):
        while True:
            (load,) = await service.loads(channel)
            if load.free_blocks == load.total_blocks:
                return load
            await asyncio.sleep(0.02)


async def check_plain(channel: grpc.aio.Channel, model: Path, *, has_arena: bool) -> None:
    """Parked in mid-generation, and continued as if nothing had been, up to its own limit."""
    plain = Conversation(channel, model, "plain")
    await plain.start(some_tokens(1, 9), 200, park_after=5)
    assert 0 < len(plain.output) < 200
    load = await until_parked(channel)
    assert (load.free_host_blocks < load.total_host_blocks) == has_arena
    finish = await plain.go_on()
    assert len(plain.output) == 200
    assert (finish.usage.swapped_bytes > 0) == has_arena


async def check_chat_and_lost_worker(up: service.Service, channel: grpc.aio.Channel, model: Path) -> None:
    """Three turns with input between them, held, held and parked; then the worker dies, and a fourth."""
    chat = Conversation(channel, model, "chat")
    await chat.start(some_tokens(2, 21), 11, hold=60)
    assert (await chat.go_on(some_tokens(3, 7), 12, hold=60)).reason == LENGTH
    await chat.go_on(some_tokens(4, 1), 150, park_after=3)
    attached = await service.collect(chat.stub.Attach(inference_pb2.AttachRequest(request_id="chat")))
    assert attached[0].token_ids == chat.output, "Attach does not tell all turns as one stream"
    assert attached[0].finish is not None
    assert attached[0].finish.reason == PARKED
    await until_parked(channel)
    pid = up.kill_worker()
    async with asyncio.timeout(60):
        while up.worker_pids[0] in (pid, None) or not (await chat.stub.ListModels(LIST_MODELS)).models[0].ready:
            await asyncio.sleep(0.05)
    assert (await chat.go_on(some_tokens(5, 3), 10)).reason == LENGTH


@pytest.mark.parametrize("how", SERVICES)
async def test_what_is_continued_equals_one_uninterrupted_request(tmp_path: Path, how: str) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model", max_position_embeddings=CONTEXT)
    options, has_arena = SERVICES[how]
    arguments = ["--model", str(model), "--block-size", "4", "--num-blocks", "256", "--dtype", "float32", *options]
    environment = {"PAGEWIRE_MAX_PARKED_PER_TENANT": "2"}
    async with service.running(tmp_path / "up", *arguments, environment=environment) as up, up.channel() as channel:
        await check_plain(channel, model, has_arena=has_arena)
        if has_arena:
            await check_refusals(channel, model)
            await check_expiry(channel, up, model)
            await check_clients(up.address, model)
        await check_chat_and_lost_worker(up, channel, model)
        await service.wait_until_idle(channel)


async def check_expiry(channel: grpc.aio.Channel, up: service.Service, model: Path) -> None:
    """A held and a parked request whose second is over: arena and blocks are free, and nobody can continue them."""
    held, parked = (Conversation(channel, model, name) for name in ("held for a second", "parked for a second"))
    before = await service.wait_until_idle(channel)
    await held.start(some_tokens(8, 40), 4, hold=1)
    await parked.start(some_tokens(9, 40), 400, park_after=2, ttl_seconds=1)
    watch = control_pb2_grpc.ControlServiceStub(channel).WatchBlocks(control_pb2.WatchBlocksRequest())
    async with asyncio.timeout(60):
        async for state in watch:
            (load,) = state.loads.loads
            was_kept = load.swap_out_bytes > before.swap_out_bytes
            if was_kept and load.free_host_blocks == load.total_host_blocks and not await parked_requests(up):
                break
    watch.cancel()
    assert load.free_blocks == load.total_blocks
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for conversation in (held, parked):
        request = inference_pb2.ContinueRequest(request_id=conversation.request_id)
        assert await refusal(stub.Continue(request)) == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_NOT_PARKED")


async def parked_requests(up: service.Service) -> float:
    """The gauge on the scheduler's page of metrics."""
    page = await asyncio.to_thread(lambda: urlopen(f"http://{up.ready['metrics']}/metrics", timeout=30).read().decode())
    (gauge,) = (each for each in text_string_to_metric_families(page) if each.name == "pagewire_requests_parked")
    return gauge.samples[0].value


async def check_clients(address: str, model: Path) -> None:
    """Both Python clients hold, park and continue."""
    prompt, more = some_tokens(6, 5), some_tokens(7, 3)
    options: Any = {"temperature": 0, "ignore_eos": True}

    def with_sync_client() -> list[int]:
        with Client(address) as client:
            held = client.generate(prompt, max_tokens=4, request_id="sync", hold_seconds=60, **options)
            tokens = [token for piece in held for token in piece.token_ids]
            resumed = client.continue_request("sync", more, max_tokens=5)
            return tokens + [token for piece in resumed for token in piece.token_ids]

    first = tiny_models.reference_greedy(model, prompt, 4)
    expected = first + tiny_models.reference_greedy(model, prompt + first + more, 5)
    assert await asyncio.to_thread(with_sync_client) == expected
    async with AsyncClient(address) as client:
        parked: list[int] = []
        next_positions = {}
        async for piece in client.generate(prompt, max_tokens=200, request_id="aio", **options):
            parked += piece.token_ids
            if not next_positions:
                next_positions = await client.park("aio")
        assert next_positions == {0: len(parked)}
        resumed = [token async for piece in client.continue_request("aio") for token in piece.token_ids]
        assert parked + resumed == tiny_models.reference_greedy(model, prompt, 200)


async def check_refusals(channel: grpc.aio.Channel, model: Path) -> None:
    """Text goes on too, what cannot be is refused with a reason, and nothing is kept beyond the limits."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    precondition, missing = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")

    def park(request_id: str, ttl_seconds: int = 0) -> Any:
        return stub.Park(inference_pb2.ParkRequest(request_id=request_id, ttl_seconds=ttl_seconds))

    def go_on(request_id: str, **fields: Any) -> Any:
        return stub.Continue(inference_pb2.ContinueRequest(request_id=request_id, **fields))

    assert await refusal(park("nobody")) == (missing, "REQUEST_NOT_FOUND")
    assert await refusal(go_on("nobody")) == (missing, "REQUEST_NOT_FOUND")
    assert await refusal(park("")) == invalid
    assert await refusal(park("a", ttl_seconds=10**6)) == invalid
    assert await refusal(go_on("a", text="")) == invalid
    await Conversation(channel, model, "done").start([5, 6, 7], 2)
    assert await refusal(park("done")) == (precondition, "REQUEST_NOT_LIVE")
    assert await refusal(go_on("done")) == (precondition, "REQUEST_NOT_PARKED")
    several = service.greedy([8, 9], 400, request_id="several", hold_seconds=5)
    several.sampling.n = 2
    assert await refusal(stub.Generate(several)) == invalid

    # Text is tokenized without special tokens: it goes on as the tokens that it stands for.
    by_text, by_tokens = (Conversation(channel, model, name) for name in ("by text", "by tokens"))
    for twin in (by_text, by_tokens):
        await twin.start([5, 6, 7], 4, hold=60)
    tokenizer = AutoTokenizer.from_pretrained(model)
    await by_tokens.go_on(tokenizer.encode(" and then", add_special_tokens=False), hold=60)
    completion = [response async for response in go_on("by text", text=" and then", hold_seconds=60)]
    assert [token for response in completion for token in response.token_ids] == by_tokens.output[4:]

    # Two are held, so a third may not be parked; but one that is held for longest yields to one that is held later.
    call = stub.Generate(service.greedy([8, 9], 400, request_id="third"))
    assert await anext(aiter(call)) is not None
    assert await refusal(park("third")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PARK_LIMIT")
    call.cancel()
    await Conversation(channel, model, "later").start([8, 9, 10], 4, hold=60)
    assert await refusal(go_on("by tokens")) == (precondition, "REQUEST_NOT_PARKED")
    full = inference_pb2.TokenIds(ids=[7] * 507)
    assert await refusal(go_on("later", token_ids=full)) == (precondition, "CONTEXT_FULL")

    # Cancel lets go of what is held.
    for name in ("by text", "later"):
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id=name))).found
        assert await refusal(go_on(name)) == (precondition, "REQUEST_NOT_PARKED")
