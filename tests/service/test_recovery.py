"""A worker dies in mid-stream and no stream breaks."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests import tiny_models
from tests.service import service

NUM_STREAMS = 8
NUM_TOKENS = 48
KILLS = 20


def prompts() -> list[list[int]]:
    generator = random.Random(3)
    return [
        [generator.randrange(4, tiny_models.VOCAB_SIZE) for _ in range(generator.randint(3, 30))]
        for _ in range(NUM_STREAMS)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_twenty_seeded_worker_kills_leave_every_stream_equal_to_an_undisturbed_run(tmp_path: Path) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model")
    arguments = ["--model", str(model), "--block-size", "4", "--num-blocks", "200", "--dtype", "float32"]
    generator = random.Random(20)
    async with service.running(tmp_path / "up", *arguments) as up, up.channel() as channel:
        requests = [service.greedy(prompt, NUM_TOKENS) for prompt in prompts()]
        undisturbed = await asyncio.gather(*(service.generate(channel, request) for request in requests))
        expected = [completion.token_ids for completion in undisturbed]
        for kill in range(KILLS):
            kill_at = generator.randrange(NUM_STREAMS * NUM_TOKENS)
            arrived = 0
            killed = asyncio.Event()

            async def follow(
                request: service.inference_pb2.GenerateRequest, kill_at: int = kill_at, killed: asyncio.Event = killed
            ) -> list[int]:
                nonlocal arrived
                tokens: list[int] = []
                async for response in service.inference_pb2_grpc.InferenceServiceStub(channel).Generate(request):
                    assert response.first_token == len(tokens)
                    tokens.extend(response.token_ids)
                    arrived += len(response.token_ids)
                    if arrived > kill_at and not killed.is_set():
                        killed.set()
                        up.kill_worker()
                return tokens

            pid = up.worker_pids[0]
            assert await asyncio.gather(*(follow(request) for request in requests)) == expected, f"kill {kill}"
            assert killed.is_set()
            while up.worker_pids[0] in (pid, None):
                await asyncio.sleep(0.05)
            load = await service.wait_until_idle(channel)
            assert load.free_blocks == load.total_blocks


async def test_a_second_worker_takes_over_when_the_first_is_killed(tmp_path: Path) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model")
    arguments = ["--model", str(model), "--block-size", "4", "--num-blocks", "200", "--workers", "2"]
    async with service.running(tmp_path / "up", *arguments, "--dtype", "float32") as up, up.channel() as channel:
        requests = [service.greedy(prompt, NUM_TOKENS) for prompt in prompts()]
        expected = [tiny_models.reference_greedy(model, prompt, NUM_TOKENS) for prompt in prompts()]
        calls = asyncio.gather(*(service.generate(channel, request) for request in requests))
        while not all(load.running for load in await service.loads(channel)):
            await asyncio.sleep(0)
        up.kill_worker(1)
        assert [completion.token_ids for completion in await calls] == expected
