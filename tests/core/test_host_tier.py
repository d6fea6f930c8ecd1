"""The second tier of the prefix cache: blocks that the pool gives up go to the host arena and come back from there."""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import replace

import pytest

from scheduler.block_pool import BlockPool
from scheduler.dispatcher import Dispatcher, SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.host_tier import CREDIT_PER_HIT, MOST_CREDIT, HostTier
from scheduler.sequence import Request, SequenceGroup
from scheduler.step_plan import NO_MOVES, BlockMoves, StepPlan
from tests.core.factories import OneWorker
from tests.core.simulated_worker import Behaviour, SimulatedWorker, undisturbed_output

ON = SchedulerConfig(watermark=0.0, headroom=0.0, host_prefix_cache=True, preemption_mode="swap")


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


# ---- the tier alone


def test_the_block_kept_for_longest_is_given_up_for_a_newer_one() -> None:
    tier = HostTier(BlockPool(2), is_on=True)
    for number in range(3):
        tier.keep(10 + number, key(number))
        assert tier.flush() == BlockMoves([10 + number], [number % 2])
    assert tier.find([key(0)]) == []
    assert tier.find([key(1), key(2), key(3)]) == [key(1), key(2)]


def test_a_host_block_is_not_written_twice_by_one_plan() -> None:
    tier = HostTier(BlockPool(2), is_on=True)
    for number in range(5):
        tier.keep(10 + number, key(number))
    assert tier.flush() == BlockMoves([10, 11], [0, 1])
    assert tier.find([key(0), key(1), key(2)]) == [key(0), key(1)]


def test_a_host_block_that_a_plan_reads_is_not_written_by_it() -> None:
    tier = HostTier(BlockPool(1), is_on=True)
    tier.keep(10, key(0))
    tier.flush()
    assert tier.take([key(0)]) == [0]
    tier.keep(11, key(1))  # no room in this plan
    assert tier.flush() == NO_MOVES
    tier.keep(11, key(1))
    assert tier.flush() == BlockMoves([11], [0])


def test_copies_that_steps_wait_for_are_paid_for_by_blocks_that_come_back() -> None:
    tier = HostTier(BlockPool(1000), is_on=True)
    for number in range(500):
        tier.evicted(number, key(number))
    assert len(tier.flush()) == MOST_CREDIT
    for number in range(500):
        tier.evicted(number, key(number))
    assert tier.flush() == NO_MOVES  # who is kept is not copied again, and the rest not at all
    tier.take([key(0), key(1)])
    for number in range(500, 600):
        tier.evicted(number, key(number))
    assert len(tier.flush()) == 2 * CREDIT_PER_HIT


def test_a_swap_takes_the_room_of_kept_blocks() -> None:
    tier = HostTier(BlockPool(4), is_on=True)
    for number in range(4):
        tier.keep(number, key(number))
    assert tier.num_available == 0  # this plan is still writing them
    tier.flush()
    assert tier.num_available == 4
    tier.make_room(3)
    assert tier.host.num_free == 3
    assert tier.find([key(3)]) == [key(3)]


def test_a_block_kept_once_more_is_not_copied_again_and_is_the_last_to_be_given_up() -> None:
    tier = HostTier(BlockPool(2), is_on=True)
    assert tier.keep(10, key(0))
    assert tier.keep(11, key(1))
    tier.flush()
    assert tier.keep(10, key(0))
    assert tier.flush() == NO_MOVES
    assert tier.keep(12, key(2))
    assert tier.flush() == BlockMoves([12], [1])
    assert tier.find([key(0)]) == [key(0)]
    assert tier.find([key(1)]) == []


# ---- the tier under the scheduler


def push_out(service: OneWorker) -> None:
    """A request that needs the whole pool, so that the cache loses everything."""
    service.submit("large", [9] * 64, max_tokens=1, tenant="other")
    service.run_until_idle()


def test_a_prefix_that_was_pushed_out_is_copied_back_and_not_computed_again() -> None:
    service = OneWorker(ON)
    service.submit("first", list(range(10, 23)), max_tokens=1)
    service.run_until_idle()
    push_out(service)
    again = service.submit("again", list(range(10, 23)), max_tokens=3)
    plan = service.plan()
    assert len(plan.swap_in) == 3
    assert plan.chunk_tokens == [1]
    assert plan.new_sequences[0].computed_tokens == 12
    service.run_until_idle()
    assert again.cached_tokens == 12
    assert again.sequences[0].output == undisturbed_output(again.request, 0)[0]
    worker = service.dispatcher.loads().workers[0]
    assert (worker.prefix_cache_hit_tokens_total, worker.prefix_cache_host_hit_tokens_total) == (0, 12)


def taken(plan: StepPlan) -> set[int]:
    """Blocks that a plan adds to tables."""
    return {*plan.append_blocks, *(block for new in plan.new_sequences for block in new.blocks)}


def test_blocks_are_copied_out_before_a_step_needs_them_and_only_once() -> None:
    service = OneWorker(ON, host_blocks=32)  # eight clean ones
    service.submit("first", list(range(10, 38)), max_tokens=1)
    service.run_until_idle()  # seven blocks stay findable; nine are free
    service.submit("second", [9] * 30, max_tokens=8, tenant="other")
    copied: list[int] = []
    for plan in service.run_until_idle():
        assert not taken(plan) & set(plan.swap_out.sources), "a step waits for the copy of a block that it writes to"
        copied += plan.swap_out.sources
    assert sorted(copied) == list(range(7))
    again = service.submit("again", list(range(10, 31)), max_tokens=1)  # in the pool as before
    assert not any(plan.swap_in for plan in service.run_until_idle())
    assert again.cached_tokens == 20
    push_out(service)
    again = service.submit("once more", list(range(10, 31)), max_tokens=1)
    assert len(service.plan().swap_in) == 5
    service.run_until_idle()
    assert again.cached_tokens == 20


def waited_for(plan: StepPlan) -> int:
    """Blocks that a plan's step writes to behind their copies."""
    return len(taken(plan) & set(plan.swap_out.sources))


def serve_long_prompts(service: OneWorker, count: int) -> list[StepPlan]:
    """Prompts that nobody asks again, one after another: each of 500 blocks, a plan's work."""
    plans: list[StepPlan] = []
    for number in range(count):
        service.submit(f"long {number}", [10 + number] * 2000, max_tokens=1)
        plans += service.run_until_idle()
    return plans


def test_steps_that_take_many_blocks_find_them_copied() -> None:
    config = replace(ON, token_budget=2048)
    service = OneWorker(config, num_blocks=2000, host_blocks=8000, max_step_tokens=2048)
    plans = serve_long_prompts(service, 12)
    assert sum(map(waited_for, plans)) == 0
    assert max(len(plan.swap_out) for plan in plans) <= 501
    first = service.submit("the first again", [10] * 2000, max_tokens=1)
    service.run_until_idle()
    assert first.cached_tokens == 1996


def test_where_nothing_comes_back_steps_stop_waiting_for_copies() -> None:
    config = replace(ON, token_budget=2048)
    service = OneWorker(config, num_blocks=520, host_blocks=8000, max_step_tokens=2048)  # no room for two plans
    waits = [waited_for(plan) for plan in serve_long_prompts(service, 12)]
    assert 0 < sum(waits) <= MOST_CREDIT
    assert not any(waits[-8:])


def test_a_plan_that_computes_nothing_copies_nothing_ahead() -> None:
    service = OneWorker(ON, host_blocks=64)
    service.submit("first", list(range(10, 38)), max_tokens=1)
    assert not any(plan.swap_out for plan in service.run_until_idle())
    assert service.maybe_plan() is None


def test_a_first_part_in_the_pool_and_the_rest_in_the_arena_make_one_prefix() -> None:
    service = OneWorker(ON)
    service.submit("first", list(range(10, 27)), max_tokens=1)
    service.run_until_idle()
    service.submit("large", [9] * 56, max_tokens=1)  # leaves two blocks of the prefix in the pool
    service.run_until_idle()
    again = service.submit("again", list(range(10, 27)), max_tokens=1)
    service.run_until_idle()
    worker = service.dispatcher.loads().workers[0]
    assert again.cached_tokens == 16
    assert worker.prefix_cache_hit_tokens_total > 0
    assert worker.prefix_cache_host_hit_tokens_total > 0


def test_a_tenant_does_not_find_what_another_left_in_the_arena() -> None:
    service = OneWorker(ON)
    service.submit("first", list(range(10, 23)), max_tokens=1, tenant="a")
    service.run_until_idle()
    push_out(service)
    other = service.submit("again", list(range(10, 23)), max_tokens=1, tenant="b")
    service.run_until_idle()
    assert other.cached_tokens == 0


def test_a_prefix_that_is_cheaper_to_compute_is_not_copied() -> None:
    rates = TransferRates(10**9, 10, 10**9)  # a hundred seconds per block in, a nanosecond per token
    service = OneWorker(ON, rates)
    service.submit("first", list(range(10, 23)), max_tokens=1)
    service.run_until_idle()
    push_out(service)
    service.submit("again", list(range(10, 23)), max_tokens=1)
    assert not service.plan().swap_in


def test_without_the_setting_or_an_arena_nothing_is_copied() -> None:
    for service in (OneWorker(replace(ON, host_prefix_cache=False)), OneWorker(ON, host_blocks=0)):
        service.submit("first", list(range(10, 23)), max_tokens=1)
        service.run_until_idle()
        service.submit("large", [9] * 60, max_tokens=1)
        assert not any(plan.swap_out for plan in service.run_until_idle())


@pytest.mark.parametrize(("seed", "host_blocks"), [(0, 8), (1, 40), (2, 200)])
def test_conversations_that_come_back_find_their_prefix_and_give_the_right_tokens(seed: int, host_blocks: int) -> None:
    dice = random.Random(seed)
    stems = [[dice.randrange(60) for _ in range(dice.randint(8, 30))] for _ in range(20)]
    capacity = WorkerCapacity(4, 40, host_blocks, 1000, 8, 64)
    config = SchedulerConfig(token_budget=64, host_prefix_cache=True, max_retained=1000, retention_ns=1 << 60)
    dispatcher, worker = Dispatcher(config), SimulatedWorker(capacity, 1)
    dispatcher.add_worker("w", capacity, TransferRates(), 1, 0)
    plans: deque[StepPlan] = deque()
    groups: list[SequenceGroup] = []
    now = 0
    while len(groups) < 300 or plans:
        now += 1
        if len(groups) < 300:
            prompt = dice.choice(stems) + [dice.randrange(60) for _ in range(dice.randint(1, 4))]
            request = Request(str(len(groups)), array("I", prompt), max_tokens=dice.randint(1, 16), payload=Behaviour())
            group = dispatcher.submit(request, now).group
            assert group is not None
            groups.append(group)
        while (plan := dispatcher.schedule("w", now)) is not None:
            plans.append(plan)
            dispatcher.check_integrity()
        if plans:
            dispatcher.apply("w", worker.execute(plans.popleft()), now)
    for group in groups:
        assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]
    found = dispatcher.loads().workers[0].prefix_cache_host_hit_tokens_total
    assert found > (100 if host_blocks == 8 else 500)
