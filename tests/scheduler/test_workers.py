"""How workers come, are watched and are lost, and that no stream notices."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from pagewire.v1 import worker_pb2
from tests.scheduler.peers import FakeGateway, Pool, capacity, expected, hello, model, pool

ALL = [(stream, [30 + stream, 7, 8]) for stream in range(12)]


async def submit_all(gateway: FakeGateway, max_tokens: int = 24) -> list[list[int]]:
    for stream, prompt in ALL:
        await gateway.submit(stream, prompt, max_tokens=max_tokens)
    return [expected(prompt, max_tokens) for _, prompt in ALL]


async def lost(made: Pool, worker_id: str = "w1") -> None:
    while worker_id in made.serving.engine.workers:
        await asyncio.sleep(0.005)


async def test_a_worker_is_welcomed_with_an_epoch_and_its_rules() -> None:
    async with pool(heartbeat_timeout_s=2.5) as made:
        worker = await made.worker()
        assert worker.welcome.max_plans_in_flight == 2
        assert worker.welcome.heartbeat_interval_ns == 500_000_000
        second = await made.worker("w2")
        assert second.welcome.epoch > worker.welcome.epoch
    async with pool() as restarted:
        assert (await restarted.worker()).welcome.epoch > second.welcome.epoch


async def test_streams_continue_on_a_worker_that_joins_after_the_loss() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        answers = await submit_all(gateway)
        for _ in range(9):
            await worker.step()
        await worker.stop()
        await lost(made)
        await gateway.until(lambda: not gateway.states[-1].ready)
        again = await made.worker("w1-again")
        assert again.welcome.epoch > worker.welcome.epoch
        again.run()
        assert await gateway.finish(*range(12)) == answers
        assert gateway.states[-1].ready
        # What had been generated came back with the prompts: nothing was sampled twice.
        assert any(len(new.token_ids) > new.prompt_tokens for plan in again.plans for new in plan.new_sequences)


@pytest.mark.parametrize("steps_before", [0, 1, 2, 5])
async def test_streams_continue_on_another_worker_wherever_the_loss_falls(steps_before: int) -> None:
    async with pool() as made:
        first, second = await made.worker("w1"), await made.worker("w2")
        gateway = await made.gateway()
        answers = await submit_all(gateway)
        second.run()
        for _ in range(steps_before):
            await first.step()
        await first.next_plan()  # and dies with a plan unanswered
        await first.stop()
        assert await gateway.finish(*range(12)) == answers
        assert gateway.states[-1].workers == 1


async def test_requests_that_wait_for_a_lost_worker_end_at_their_deadline() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=50)
        await worker.step()
        await worker.stop()
        await lost(made)
        await gateway.submit(2, [12], max_tokens=50, timeout_ns=20_000_000)
        await gateway.finish(2)
        again = await made.worker("w2")
        again.run()
        assert await gateway.finish(1) == [expected([11], 50)]


async def test_requests_fail_with_worker_lost_when_no_worker_comes_back_in_time() -> None:
    async with pool(no_worker_s=0.05) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=50)
        await worker.step()
        await gateway.until(lambda: gateway.on(1).tokens)
        await worker.stop()
        await gateway.finish(1)
        failed = gateway.on(1).failed
        assert failed is not None
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "WORKER_LOST")
        assert failed.retry_after_ns > 0
        await gateway.submit(2, [11], max_tokens=2)
        await gateway.finish(2)
        refused = gateway.on(2).failed
        assert refused is not None
        assert refused.reason == "NO_WORKER"
        again = await made.worker("w2")
        again.run()
        await gateway.submit(3, [11], max_tokens=2)
        assert await gateway.finish(3) == [expected([11], 2)]


async def test_results_of_another_epoch_or_of_no_plan_are_counted_and_ignored() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=6)
        plan = await worker.next_plan()
        result = worker.execute(plan)
        old = worker_pb2.StepResult(epoch=plan.epoch - 1, step=plan.step, token_ids=[999])
        unasked = worker_pb2.StepResult(epoch=plan.epoch, step=plan.step + 7, token_ids=[999])
        await worker.send(step_result=old)
        await worker.send(step_result=unasked)
        await worker.send(step_result=result)
        await worker.send(step_result=result)
        worker.run()
        assert await gateway.finish(1) == [expected([11], 6)]
        assert "pagewire_stale_results_total 3.0" in await made.read()


async def test_a_plan_is_sent_before_the_result_of_the_one_before_and_never_a_third() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=50)
        first = await worker.next_plan()
        second = await worker.next_plan()
        assert (first.step, second.step) == (1, 2)
        assert made.serving.engine.workers["w1"].sent.keys() == {1, 2}
        await worker.send(step_result=worker.execute(first))
        third = await worker.next_plan()
        assert third.step == 3
        assert made.serving.engine.workers["w1"].sent.keys() == {2, 3}


async def test_a_result_that_contradicts_its_plan_ends_the_worker_and_not_the_streams() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=6)
        plan = await worker.next_plan()
        await worker.send(step_result=worker_pb2.StepResult(epoch=plan.epoch, step=1, token_ids=[1, 2, 3]))
        await lost(made)
        assert (await worker.status())[0] == grpc.StatusCode.INVALID_ARGUMENT
        again = await made.worker("w2")
        again.run()
        assert await gateway.finish(1) == [expected([11], 6)]


async def test_a_sampled_id_beyond_the_vocabulary_ends_the_worker() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=6)
        plan = await worker.next_plan()
        await worker.send(step_result=worker_pb2.StepResult(epoch=plan.epoch, step=1, token_ids=[1000]))
        assert (await worker.status())[0] == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol_version": 7}, "protocol version 7, this scheduler 1"),
        ({"model": model(fingerprint="xyz")}, "fingerprint xyz, this scheduler serves 'fake' with fingerprint abc"),
        ({"model": model(vocab_size=0)}, "vocab_size is 0"),
        ({"model": model(eos_token_ids=[1000])}, "not below the vocabulary size 1000"),
        ({"capacity": capacity(block_size=24)}, "block_size is 24, expected a power of two"),
        ({"capacity": capacity(block_size=512)}, "block_size is 512, expected 1 to 256"),
        ({"capacity": capacity(num_blocks=0)}, "num_blocks is 0"),
        ({"capacity": capacity(max_slots=0)}, "max_slots is 0"),
        ({"world_size": 2, "rank": 1, "group_id": "g"}, "rank 1 of 2"),
        ({"worker_id": ""}, "worker_id must be"),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused_with_both_values(changes: dict, words: str) -> None:
    async with pool() as made:
        await made.worker("w1")
        introduction = hello("w2")
        for name, value in changes.items():
            introduction.ClearField(name)
            introduction.MergeFrom(worker_pb2.WorkerHello(**{name: value}))
        refused = await made.dial(introduction)
        code, details = await refused.status()
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert words in details
        assert list(made.serving.engine.workers) == ["w1"]


@pytest.mark.parametrize("raw", [b"\xff\xff", b"", worker_pb2.JoinRequest(heartbeat={"epoch": 1}).SerializeToString()])
async def test_a_join_without_a_hello_is_an_invalid_argument(raw: bytes) -> None:
    async with pool() as made:
        call = made.channel.stream_stream("/pagewire.v1.WorkerService/Join")()
        await call.write(raw)
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_worker_that_falls_silent_is_declared_lost_while_its_stream_still_stands() -> None:
    async with pool(heartbeat_timeout_s=0.2) as made:
        worker, gateway = await made.worker(), await made.gateway()
        answers = await submit_all(gateway)
        await worker.step()
        code, details = await worker.status()
        assert code == grpc.StatusCode.UNAVAILABLE, details
        assert "nothing heard for" in details
        again = await made.worker("w2")
        again.keep_beating()
        again.run()
        assert await gateway.finish(*range(12)) == answers


async def test_heartbeats_keep_an_idle_worker() -> None:
    async with pool(heartbeat_timeout_s=0.2) as made:
        worker = await made.worker()
        worker.keep_beating()
        silent = await made.worker("w2")
        await silent.status()
        assert list(made.serving.engine.workers) == ["w1"]


async def test_a_step_without_progress_makes_a_worker_unready_and_then_lost_despite_its_heartbeats() -> None:
    async with pool(stall_s=0.15, step_timeout_s=0.4) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=4)
        await worker.next_plan()

        async def beat_without_progress() -> None:
            while "w1" in made.serving.engine.workers:  # a write after the end would hide the status from its caller
                await worker.send(heartbeat=worker_pb2.Heartbeat(epoch=worker.welcome.epoch, progress=1))
                await asyncio.sleep(0.02)

        worker.background(beat_without_progress)
        await gateway.until(lambda: gateway.states[-1].model.name and not gateway.states[-1].ready)
        assert made.serving.engine.workers["w1"].stalled
        code, details = await worker.status()
        assert code == grpc.StatusCode.UNAVAILABLE, details
        assert "made no progress for" in details


async def test_a_stalled_worker_is_ready_again_as_soon_as_it_makes_progress() -> None:
    async with pool(stall_s=0.1) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=4)
        await gateway.until(lambda: gateway.states[-1].ready is False)
        await worker.beat()
        await gateway.until(lambda: gateway.states[-1].ready)
        worker.run()
        assert await gateway.finish(1) == [expected([11], 4)]


async def test_a_long_step_that_makes_progress_is_waited_for() -> None:
    async with pool(step_timeout_s=0.3, stall_s=0.3) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=2)
        plan = await worker.next_plan()
        for _ in range(30):  # 0.6 s in all, twice the limit
            await worker.beat()
            await asyncio.sleep(0.02)
        await worker.send(step_result=worker.execute(plan))
        worker.run()
        assert await gateway.finish(1) == [expected([11], 2)]


async def test_a_worker_that_joins_again_under_its_name_replaces_itself() -> None:
    async with pool() as made:
        old, gateway = await made.worker("w1"), await made.gateway()
        answers = await submit_all(gateway)
        await old.step()
        new = await made.worker("w1")
        assert (await old.status())[0] == grpc.StatusCode.ABORTED
        new.run()
        assert await gateway.finish(*range(12)) == answers
        assert made.serving.engine.workers["w1"].epoch == new.welcome.epoch


async def test_the_model_state_counts_the_workers_that_are_ready() -> None:
    async with pool() as made:
        gateway = await made.gateway()
        assert (gateway.states[-1].ready, gateway.states[-1].workers) == (False, 0)
        await made.worker("w1")
        second = await made.worker("w2", capacity=capacity(num_blocks=100))
        await gateway.until(lambda: gateway.states[-1].workers == 2)
        state = gateway.states[-1]
        assert (state.ready, state.kv_blocks, state.block_size, state.model.name) == (True, 356, 4, "fake")
        await second.stop()
        await gateway.until(lambda: gateway.states[-1].workers == 1)
        assert gateway.states[-1].kv_blocks == 256


async def test_too_many_workers_are_refused() -> None:
    async with pool(max_workers=1) as made:
        await made.worker("w1")
        refused = await made.dial(hello("w2"))
        assert (await refused.status())[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
