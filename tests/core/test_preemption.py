"""Who is preempted, and what the cost model predicts."""

from __future__ import annotations

from scheduler.policy import TransferRates
from scheduler.preemption import FORGOTTEN_AFTER, CostModel, LearnedRate, Place, choose_victim
from scheduler.sequence import SequenceGroup
from scheduler.step_plan import StepTimings
from tests.core.factories import make_request


def place(group: SequenceGroup) -> Place:
    return group.rank[0], group.rank[1], 0, group.rank


def make_groups(*priorities: int) -> list[SequenceGroup]:
    return [
        SequenceGroup(make_request(str(arrival), priority=priority), arrival, 0)
        for arrival, priority in enumerate(priorities)
    ]


def test_the_youngest_of_the_lowest_priority_yields() -> None:
    groups = make_groups(0, -1, -1, 0)
    assert choose_victim(groups[0], groups, (), place) is groups[2]


def test_a_group_yields_itself_when_everybody_else_ranks_before_it() -> None:
    groups = make_groups(0, 0, 0)
    assert choose_victim(groups[2], groups, (), place) is groups[2]


def test_nobody_yields_to_a_group_that_ranks_behind() -> None:
    groups = make_groups(0, 0, 1)
    assert choose_victim(groups[1], groups, (), place) is groups[1]


def test_a_resumed_group_is_not_the_next_victim_if_there_is_another() -> None:
    groups = make_groups(0, 0, 0)
    assert choose_victim(groups[0], groups, {groups[2]}, place) is groups[1]
    assert choose_victim(groups[0], groups, {groups[1], groups[2]}, place) is groups[2]


def test_the_head_never_yields() -> None:
    groups = make_groups(0)
    assert choose_victim(groups[0], groups, (), place) is None


def test_a_rate_holds_its_start_value_until_the_first_observation() -> None:
    rate = LearnedRate(50.0)
    assert rate.per_second == 50.0
    rate.observe(0, 10)
    rate.observe(10, 0)
    assert rate.per_second == 50.0
    rate.observe(30, 10**9)
    assert rate.per_second == 30.0


def test_a_rate_is_a_mean_of_speeds_that_forgets_slowly_and_weighs_large_observations_more() -> None:
    rate = LearnedRate(0.0)
    rate.observe(1000, 10**9)
    rate.observe(20, 10**8)
    assert rate.per_second == (0.9 * 1000 * 1000 + 20 * 200) / (0.9 * 1000 + 20)


def test_a_rate_that_nobody_observes_any_more_returns_to_its_start() -> None:
    rate = LearnedRate(50.0)
    rate.observe(1, 10**9)
    for _ in range(FORGOTTEN_AFTER - 1):
        rate.observe(0, 0)
    assert rate.per_second == 1.0
    rate.observe(0, 0)
    assert rate.per_second == 50.0


def test_a_copy_that_began_late_ends_neither_swaps_nor_the_host_tier() -> None:
    """Blocks of 2 MiB on an H100: 40 us, but for one in whose middle the host was busy for 20 ms."""
    block, rates = 2 << 20, TransferRates(52_000_000_000, 52_000_000_000, 50_000)
    costs = CostModel(rates)
    for number in range(100):
        copy_ns = 20_000_000 if number == 50 else 40_000
        costs.planned(block, block)
        costs.learn(block, block, StepTimings(swap_out_ns=copy_ns, swap_in_ns=copy_ns))
        assert costs.is_worth_keeping(block, 16)
        assert costs.prefers_swap(20 * block, 20 * 16)


def test_swapping_costs_both_ways_and_waits_for_pending_copies() -> None:
    costs = CostModel(TransferRates(1000, 2000, 0))
    assert costs.swap_ns(500) == 500_000_000 + 250_000_000
    costs.planned(100, 200)
    assert costs.swap_ns(500) == 600_000_000 + 350_000_000
    costs.learn(100, 200, StepTimings())
    assert costs.swap_ns(500) == 750_000_000


def test_recomputing_costs_tokens_at_the_prefill_rate() -> None:
    costs = CostModel(TransferRates(1000, 1000, 50))
    assert costs.recompute_ns(100) == 2_000_000_000
    assert costs.prefers_swap(999, 100)
    assert not costs.prefers_swap(1111, 100)


def test_the_mode_changes_only_for_a_tenth_less() -> None:
    costs = CostModel(TransferRates(1000, 1000, 50))  # 100 tokens cost as much as 1000 bytes
    assert [costs.prefers_swap(size, 100) for size in (1090, 1110, 1000, 920, 900, 1050)] == [
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_tokens_that_the_prefix_cache_usually_keeps_cost_nothing() -> None:
    costs = CostModel(TransferRates(1000, 1000, 50))
    for _ in range(100):
        costs.came_back(75, 100)
    predicted = costs.recompute_ns(100)
    assert predicted is not None
    assert abs(predicted - 500_000_000) < 1_000_000
    for _ in range(100):
        costs.came_back(0, 100)
    assert abs((costs.recompute_ns(100) or 0) - 2_000_000_000) < 1_000_000


def test_a_block_is_kept_only_if_copying_it_both_ways_costs_less_than_computing_it() -> None:
    costs = CostModel(TransferRates(1000, 1000, 100))  # 10 tokens take 100 ms, 50 bytes take 50 ms each way
    assert costs.is_worth_keeping(50, 10)
    assert not costs.is_worth_keeping(51, 10)
    assert costs.prefers_copy_in(100, 10)
    assert not costs.prefers_copy_in(101, 10)
    costs.planned(0, 60)
    assert not costs.prefers_copy_in(50, 10)
    assert CostModel(TransferRates()).is_worth_keeping(1, 1)


def test_the_actual_cost_of_recomputing_leaves_out_what_the_step_costs_anyway() -> None:
    costs = CostModel(TransferRates())
    mixed = StepTimings(forward_ns=3 * 10**9, chunk_tokens=200, decode_tokens=100)
    assert costs.recomputing_ns(150, mixed) == 1_500_000_000  # nothing is known yet: a share
    for chunk in (0, 100, 0, 200):
        costs.learn(0, 0, StepTimings(forward_ns=10**9 + chunk * 10**7, chunk_tokens=chunk, decode_tokens=100))
    assert abs(costs.recomputing_ns(150, mixed) - 1_500_000_000) < 10**7
    assert abs(costs.recomputing_ns(50, mixed) - 500_000_000) < 10**7


def test_unknown_rates_mean_swap() -> None:
    costs = CostModel(TransferRates())
    assert costs.swap_ns(1) is None
    assert costs.recompute_ns(1) is None
    assert costs.prefers_swap(1, 1)


def test_recomputing_costs_what_a_chunk_adds_to_a_step_and_not_the_whole_step() -> None:
    costs = CostModel(TransferRates(1000, 1000, 0))
    for chunk in (0, 100, 0, 200):
        timings = StepTimings(forward_ns=10**9 + chunk * 10**7, sample_ns=10**8, chunk_tokens=chunk, decode_tokens=200)
        costs.learn(0, 0, timings)
    predicted = costs.recompute_ns(100)
    assert predicted is not None
    assert abs(predicted - 10**9) < 10**7


def test_swap_rates_are_learned_from_timings() -> None:
    costs = CostModel(TransferRates(1, 1, 0))
    costs.planned(1000, 3000)
    costs.learn(1000, 3000, StepTimings(swap_out_ns=10**9, swap_in_ns=10**9))
    assert costs.swap_ns(3000) == 3_000_000_000 + 1_000_000_000
