"""Workers and gateways that come and go at random, by seed: every stream is still the one its prompt determines."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc.aio
import pytest

from tests.scheduler.peers import FakeWorker, Pool, capacity, expected, pool

NUM_REQUESTS = 30


async def keep_losing_workers(made: Pool, dice: random.Random, names: str) -> None:
    """Lets one worker after another join, work off some plans and die, with a plan unanswered or not."""
    number = 0
    while True:
        number += 1
        blocks, host_blocks = dice.choice([(40, 0), (40, 16), (200, 16)])
        worker = await made.worker(
            f"{names}{number}",
            capacity=capacity(num_blocks=blocks, host_blocks=host_blocks, max_slots=16, max_step_tokens=20),
        )
        with contextlib.suppress(grpc.aio.AioRpcError):
            await work_off(worker, dice.randrange(5, 60))
        await worker.stop()


async def work_off(worker: FakeWorker, count: int) -> None:
    for _ in range(count):
        await worker.step()


async def listen_to_all(made: Pool, dice: random.Random, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Attaches to every request, breaks the session now and then, and begins again until all have ended."""
    done: dict[str, list[int]] = {}
    while len(done) < len(prompts):
        gateway = await made.gateway(credit=dice.choice([1, 2, 64]))
        open_streams = {}
        for stream, name in enumerate(name for name in prompts if name not in done):
            await gateway.attach(stream, name)
            open_streams[stream] = name
        for _ in range(dice.randrange(10, 80)):
            await gateway.receive()
            for stream, name in list(open_streams.items()):
                heard = gateway.on(stream)
                assert heard.failed is None, heard.failed
                snapshot_has_all = heard.attached and heard.attached.sequences[0].HasField("finish")
                if heard.finished or snapshot_has_all:
                    done[name] = heard.tokens
                    del open_streams[stream]
            if not open_streams:
                break
        gateway.call.cancel()
    return done


@pytest.mark.parametrize("seed", range(8))
async def test_streams_survive_workers_and_gateways_that_come_and_go(seed: int) -> None:
    dice = random.Random(seed)
    prompts = {
        f"r{number}": [dice.randrange(10, 30) for _ in range(dice.randrange(1, 40))] for number in range(NUM_REQUESTS)
    }
    lengths = {name: dice.randrange(1, 40) for name in prompts}
    # The losses are no request's doing, however many fall on one.
    async with pool(max_num_seqs=12, token_budget=64, max_worker_losses=1000) as made:
        await made.worker("opener")  # so that the model is known before anything is submitted
        gateway = await made.gateway()
        for stream, (name, prompt) in enumerate(prompts.items()):
            await gateway.submit(stream, prompt, max_tokens=lengths[name], request_id=name)
        while len(made.serving.engine.live) < NUM_REQUESTS:
            await asyncio.sleep(0)
        await made.workers[0].stop()
        losers = [asyncio.create_task(keep_losing_workers(made, dice, names)) for names in ("a", "b")]
        gateway.call.cancel()
        try:
            async with asyncio.timeout(60):
                done = await listen_to_all(made, dice, prompts)
        finally:
            for loser in losers:
                loser.cancel()
            await asyncio.gather(*losers, return_exceptions=True)
        assert done == {name: expected(prompt, lengths[name]) for name, prompt in prompts.items()}
        assert not made.serving.engine.live
