"""A seeded request draws the same tokens whatever happens around it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from pagewire.v1 import inference_pb2
from tests import tiny_models
from tests.service import service

NUM_REQUESTS = 32


def seeded_requests() -> list[inference_pb2.GenerateRequest]:
    generator = random.Random(5)
    requests = []
    for number in range(NUM_REQUESTS):
        prompt = [generator.randrange(4, tiny_models.VOCAB_SIZE) for _ in range(generator.randint(2, 30))]
        request = service.greedy(prompt, max_tokens=generator.randint(16, 40))
        sampling = inference_pb2.SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=1000 + number)
        request.sampling.CopyFrom(sampling)
        requests.append(request)
    return requests


async def outputs(channel: service.grpc.aio.Channel, requests: list[inference_pb2.GenerateRequest]) -> list[list[int]]:
    completions = await asyncio.gather(*(service.generate(channel, request) for request in requests))
    return [completion.token_ids for completion in completions]


async def test_seeded_sampling_is_the_same_alone_batched_swapped_recomputed_and_after_a_worker_kill(
    tmp_path: Path,
) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model")
    requests = seeded_requests()
    common = ["--model", str(model), "--block-size", "4", "--max-num-seqs", "32", "--dtype", "float32"]

    async with service.running(tmp_path / "roomy", *common, "--num-blocks", "2000") as up, up.channel() as channel:
        alone = [(await service.generate(channel, request)).token_ids for request in requests]
        assert len({tuple(tokens) for tokens in alone}) == NUM_REQUESTS, "different seeds draw different tokens"
        assert await outputs(channel, requests) == alone, "in a batch of 32"

        calls = asyncio.gather(*(service.generate(channel, request) for request in requests))
        while sum(load.running for load in await service.loads(channel)) < NUM_REQUESTS // 2:
            await asyncio.sleep(0)
        up.kill_worker()
        assert [completion.token_ids for completion in await calls] == alone, "after a worker kill"

    for mode in ("swap", "recompute"):
        arguments = [*common, "--num-blocks", "80", "--host-blocks", "80", "--preemption-mode", mode]
        async with service.running(tmp_path / mode, *arguments) as up, up.channel() as channel:
            assert await outputs(channel, requests) == alone, mode
            load = await service.wait_until_idle(channel)
            assert (load.preemptions_swap if mode == "swap" else load.preemptions_recompute) > 0
