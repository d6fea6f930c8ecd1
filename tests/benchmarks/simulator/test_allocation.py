"""The baselines' memory policies: the buddy allocator, who may start when, and the books of token slots."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.allocation import (
    BuddyAllocator,
    OrcaMax,
    OrcaOracle,
    OrcaPow2,
    Reservation,
    ReservingScheduler,
    StaticBatcher,
)
from benchmarks.simulator.memory import SlotStates, sharing_saved, slot_states
from benchmarks.simulator.profiles import A100_OPT_13B
from benchmarks.simulator.simulation import Arrival, Simulation
from pagewire.simulation.batch import StepLoad
from scheduler.scheduler import Scheduler
from tests.benchmarks.simulator.factories import burst, in_order, machine


def test_chunks_are_split_and_merged_as_buddies() -> None:
    slots = BuddyAllocator(64)
    assert slots.take(17) == (0, 32)
    assert slots.take(16) == (32, 16)
    assert slots.take(33) is None, "48 slots are taken, and no 64 in a row are left"
    assert slots.take(5) == (48, 16)
    assert slots.take(1) is None
    slots.put_back((32, 16))
    slots.put_back((48, 16))
    slots.put_back((0, 32))
    assert slots.take(64) == (0, 64)


def test_the_papers_pool_holds_seven_sequences_of_the_longest_length() -> None:
    slots = BuddyAllocator(15_728)
    assert sum(slots.take(2048) is not None for _ in range(20)) == 7


@given(st.lists(st.integers(min_value=0, max_value=120), max_size=80), st.integers(min_value=16, max_value=700))
def test_chunks_never_overlap_and_come_together_again(orders: list[int], num_slots: int) -> None:
    """An order of 0..20 gives the oldest chunk back, others ask for that many tokens."""
    slots = BuddyAllocator(num_slots)
    whole = {size: set(starts) for size, starts in slots._free.items()}
    taken: list[tuple[int, int]] = []
    for order in orders:
        if order <= 20:
            if taken:
                slots.put_back(taken.pop(0))
        elif (chunk := slots.take(order)) is not None:
            assert chunk[1] >= order
            assert chunk[0] + chunk[1] <= num_slots
            assert all(chunk[0] + chunk[1] <= start or start + size <= chunk[0] for start, size in taken)
            taken.append(chunk)
        assert slots.num_taken == sum(size for _, size in taken)
    for chunk in taken:
        slots.put_back(chunk)
    assert {size: starts for size, starts in slots._free.items() if starts} == whole


@pytest.mark.parametrize(("reservation", "tokens"), [("max", 2048), ("pow2", 132), ("oracle", 125)])
def test_each_policy_takes_a_sequence_to_become_so_long(reservation: str, tokens: int) -> None:
    # The paper's example: 25 tokens are taken for 32.
    assert Reservation(reservation).tokens(prompt=100, output=25, longest=2048) == tokens


def most_at_once(make_scheduler: type[Scheduler], arrivals: list[Arrival]) -> int:
    most = 0

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        nonlocal most
        most = max(most, load.decode_tokens + load.num_chunks)

    Simulation([A100_OPT_13B], arrivals, make_scheduler=make_scheduler, observer=observe).run()
    return most


@pytest.mark.parametrize(
    ("make_scheduler", "most"),
    # 15,728 slots = 7.68 x 2048 = 15.36 x 1024 = 30.7 x 512; blocks: 983 of 16, of which each needs 19 in the end.
    [(OrcaMax, 7), (OrcaPow2, 30), (OrcaOracle, 30), (Scheduler, 54)],
)
def test_so_many_equal_requests_run_at_once(make_scheduler: type[Scheduler], most: int) -> None:
    arrivals = [Arrival(0, [0] * 100, 200) for _ in range(80)]
    found = most_at_once(make_scheduler, arrivals)
    assert found == most if make_scheduler is not Scheduler else found >= most


@pytest.mark.parametrize("make_scheduler", [OrcaMax, OrcaPow2, OrcaOracle, StaticBatcher])
@pytest.mark.parametrize("n", [1, 2])
def test_a_reserving_policy_answers_everybody_without_preemption_and_gives_all_chunks_back(
    make_scheduler: type[ReservingScheduler], n: int
) -> None:
    arrivals = in_order(burst(50, n=n))
    simulation = Simulation([machine(num_blocks=1100)], arrivals, make_scheduler=make_scheduler)
    outcome = simulation.run()
    simulation.dispatcher.check_integrity()
    assert sorted(done.output_tokens for done in outcome.completions) == sorted(a.output_tokens for a in arrivals)
    assert outcome.preemptions == {"swap": 0, "recompute": 0}
    (scheduler,) = simulation.schedulers.values()
    assert isinstance(scheduler, ReservingScheduler)
    assert scheduler.chunks == {}
    assert scheduler.slots.num_taken == 0


def test_a_static_batch_is_answered_together_and_only_then_followed_by_the_next() -> None:
    arrivals = [Arrival(0, [0] * 10, output) for output in (5, 50, 20, 30, 30, 30, 30, 8, 9)]
    outcome = Simulation([A100_OPT_13B], arrivals, make_scheduler=StaticBatcher, answers_whole_batches=True).run()
    times = {done.output_tokens: done.finished for done in outcome.completions}
    # The first request starts alone, because the others come after its plan; seven of them fit, then there is one left.
    assert times[5] < times[50] == times[20] == times[30] == times[8] < times[9]


@pytest.mark.parametrize("make_scheduler", [OrcaMax, OrcaPow2, OrcaOracle, Scheduler])
def test_the_states_of_all_slots_add_up_to_the_pool(make_scheduler: type[Scheduler]) -> None:
    seen: list[SlotStates] = []

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        seen.append(slot_states(scheduler))

    Simulation([machine(num_blocks=1100)], in_order(burst(30)), make_scheduler=make_scheduler, observer=observe).run()
    assert all(s.tokens + s.reserved + s.internal + s.other == 4400 for s in seen)
    assert all(min(s.tokens, s.reserved, s.internal, s.other) >= 0 for s in seen)
    assert max(s.tokens for s in seen) > 0


def test_three_samples_of_a_prompt_save_its_full_blocks_twice() -> None:
    saved: list[tuple[int, int]] = []

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        saved.append(sharing_saved(scheduler))

    # A prompt of 10 tokens has 2 full blocks of 4; while outputs last, 3 sequences have 1 more block each, then 2.
    fields: dict[str, Any] = {"make_scheduler": Scheduler, "observer": observe}
    Simulation([machine()], [Arrival(0, [0] * 10, 6, n=3)], **fields).run()
    assert (4, 9) in saved
    assert (4, 12) in saved
