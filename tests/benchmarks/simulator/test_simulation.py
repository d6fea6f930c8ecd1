"""The simulator runs the real core: nothing is lost, nothing depends on anything but the arrivals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulator.profiles import A100_OPT_13B, H200_LLAMA_8B
from benchmarks.simulator.simulation import Arrival, Simulation
from pagewire.simulation.batch import StepLoad
from scheduler.dispatcher import SchedulerConfig
from scheduler.scheduler import Scheduler
from tests.benchmarks.simulator.factories import burst, in_order, machine


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_under_memory_pressure_everybody_gets_exactly_the_output_that_the_load_says(n: int, mode: Any) -> None:
    arrivals = in_order(burst(60, n=n))
    config = SchedulerConfig(max_num_seqs=16, token_budget=64, preemption_mode=mode, max_waiting=100, max_retained=0)
    simulation = Simulation([machine(num_blocks=64)], arrivals, config=config)
    outcome = simulation.run()
    simulation.dispatcher.check_integrity()
    assert outcome.failures == []
    assert outcome.refused == 0
    assert sum(outcome.preemptions.values()) > 0
    answered = sorted((done.arrived, done.prompt_tokens, done.output_tokens, done.n) for done in outcome.completions)
    asked = sorted((arrival.at_ns, len(arrival.prompt), arrival.output_tokens, n) for arrival in arrivals)
    assert answered == asked
    (scheduler,) = simulation.schedulers.values()
    assert scheduler.blocks.num_used == 0
    assert scheduler.blocks.tier.num_available == 64


def test_a_load_without_preemption_computes_every_token_once_and_two_rows_at_most_beyond_each_end() -> None:
    arrivals = in_order(burst(40))
    config = SchedulerConfig(max_num_seqs=16, token_budget=64, prefix_cache=False, max_waiting=100)
    outcome = Simulation([machine(num_blocks=1000)], arrivals, config=config).run()
    (tally,) = outcome.workers
    wanted = sum(len(arrival.prompt) + arrival.output_tokens - 1 for arrival in arrivals)
    assert tally.tokens == wanted + tally.dropped
    assert 0 < tally.dropped <= 2 * len(arrivals)


def test_equal_arrivals_give_equal_outcomes() -> None:
    first, second = (Simulation([machine(), machine()], in_order(burst(60))).run() for _ in range(2))
    assert first == second
    assert first.end_ns > 0


def test_two_plans_are_in_flight_and_never_more() -> None:
    outcome = Simulation([machine()], in_order(burst(30))).run()
    assert [tally.most_plans_in_flight for tally in outcome.workers] == [2]


def test_a_worker_computes_one_plan_after_the_other() -> None:
    outcome = Simulation([machine()], in_order(burst(30))).run()
    assert outcome.workers[0].busy_ns <= outcome.last_result_ns
    assert 0.5 < outcome.utilisation <= 1.0


def test_requests_are_spread_over_all_workers() -> None:
    arrivals = [Arrival(0, [0] * 8, 8) for _ in range(40)]
    outcome = Simulation([machine(num_blocks=1000) for _ in range(8)], arrivals).run()
    assert len(outcome.completions) == 40
    assert len({tally.tokens for tally in outcome.workers}) == 1, "equal requests give equal shares"


def test_the_load_of_each_step_is_what_its_rows_read() -> None:
    loads: list[StepLoad] = []

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        loads.append(load)

    Simulation([machine(token_budget=16)], [Arrival(0, [0] * 21, 3)], observer=observe).run()
    first, second, *decodes = loads
    assert (first.chunk_tokens, first.chunk_context, first.chunk_pairs) == (16, 16, 136)
    assert (second.chunk_tokens, second.chunk_context, second.chunk_pairs) == (5, 21, 95)
    assert [(load.decode_tokens, load.decode_context) for load in decodes] == [(1, 22), (1, 23), (1, 24)]


def test_without_overheads_the_h200_profile_reaches_the_recorded_limit() -> None:
    # Limits of the performance record, in output tokens per second: 128 tokens in, 256 out, all submitted at once.
    for batch, limit in ((1, 278), (8, 2153), (32, 7711), (128, 21747), (256, 26112)):
        profile = replace(H200_LLAMA_8B, step_overhead_ns=0, link_delay_ns=0)
        arrivals = [Arrival(0, [0] * 128, 256) for _ in range(batch)]
        outcome = Simulation([profile], arrivals).run()
        assert outcome.output_tokens_per_second == pytest.approx(limit, rel=0.04), f"batch {batch}"


def test_the_papers_machine_has_the_papers_number_of_slots() -> None:
    capacity = A100_OPT_13B.capacity
    assert A100_OPT_13B.model.kv_token_bytes == 819_200  # section 3: 800 KB
    assert capacity.num_blocks * capacity.block_size == 15_728  # table 1: 15.7K
