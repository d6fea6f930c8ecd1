"""When a plan waits for a result, so that the beams which it brings are in it, and who is held up by that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scheduler import plan_ahead
from scheduler.dispatcher import FinishReason, SchedulerConfig
from scheduler.gathering import FORGETTING, Gathering
from scheduler.sequence import SequenceGroup
from scheduler.step_plan import StepPlan
from scheduler.step_time import StepTime
from tests.core.factories import OneWorker
from tests.core.simulated_worker import undisturbed_beams, undisturbed_output

MS = 1_000_000

LEARNED = StepTime()
for decodes in (8, 64, 200):
    for _ in range(20):
        LEARNED.observe(decodes, 0, 5 * MS + decodes * 50_000)
        LEARNED.observe(decodes, 512, 5 * MS + decodes * 50_000 + 512 * 25_000)


def waiting(ms: float) -> Gathering:
    gathering = Gathering()
    gathering.wait_ns = ms * MS
    return gathering


# ---- what is worth a wait


def test_two_halves_of_all_rows_are_gathered_unless_the_wait_takes_what_a_step_takes_without_rows() -> None:
    halves, together = ((36, 0), (36, 0)), (72, 0)
    assert waiting(4.0).pays(halves, together, LEARNED)
    assert not waiting(5.0).pays(halves, together, LEARNED)


def test_beams_beside_twice_as_many_others_are_worth_a_fifth_of_the_wait() -> None:
    ahead, together = ((48, 0), (72, 0)), (72, 0)
    assert waiting(0.7).pays(ahead, together, LEARNED)
    assert not waiting(1.0).pays(ahead, together, LEARNED)


def test_prompts_that_fill_both_steps_leave_nothing_to_gain() -> None:
    assert waiting(1.0).pays(((36, 64), (36, 0)), (72, 64), LEARNED)
    assert not waiting(1.0).pays(((36, 2012), (36, 2012)), (72, 1976), LEARNED)


def test_nobody_waits_while_no_step_has_been_seen() -> None:
    assert not Gathering().pays(((1, 0), (1, 0)), (2, 0), StepTime())


def test_a_stall_counts_as_one_step() -> None:
    gathering = Gathering()
    for _ in range(40):
        gathering.observe(1 * MS, 8 * MS)
    assert gathering.wait_ns == pytest.approx(1 * MS, rel=0.001)
    gathering.observe(9_000 * MS, 8 * MS)
    assert gathering.wait_ns == pytest.approx(2.75 * MS, rel=0.001)
    gathering.observe(-5, 8 * MS)
    assert gathering.wait_ns == pytest.approx(0.75 * 2.75 * MS, rel=0.001)


def test_a_wait_that_nothing_measures_any_more_is_tried_again() -> None:
    gathering = waiting(2.0)
    for _ in range(100):
        gathering.forget()
    assert gathering.wait_ns == pytest.approx(2 * MS * FORGETTING**100)
    assert waiting(0.7).pays(((48, 0), (72, 0)), (72, 0), LEARNED)


# ---- on a worker


@pytest.fixture(autouse=True)
def _plans_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they wait for beams, and not shortly before the worker needs them."""
    monkeypatch.setattr(plan_ahead, "EXPECTED_NS", 0)


class Machine(OneWorker):
    """Steps of 5 ms and 50 us a row. A plan that is made while the worker has none reaches it after `wait_ms`."""

    def __init__(self, wait_ms: float = 1.0, **settings: Any) -> None:
        super().__init__(SchedulerConfig(prefix_cache=False, **settings), num_blocks=512, max_slots=64)
        self.wait_ns = round(wait_ms * MS)
        self.plans: list[StepPlan] = []
        self.decoded: list[int] = []  # tokens of each of them
        self.came_at = 0  # the newest result

    def plan_all(self) -> None:
        while (plan := self.maybe_plan()) is not None:
            self.plans.append(plan)
            if len(self.pending) == 1:
                self.now += self.wait_ns

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.plan_all()
            if not self.pending:
                return
            result = self.execute()
            timings = result.timings
            step_ns = 5 * MS + 50_000 * (timings.decode_tokens + timings.chunk_tokens)
            self.now += step_ns
            self.decoded.append(timings.decode_tokens)
            self.apply(replace(result, timings=replace(timings, forward_ns=step_ns)))

    def search(self, name: str, **fields: Any) -> SequenceGroup:
        return self.submit(name, **{"n": 2, "beam_width": 4, "max_tokens": 40, **fields})


def is_right(group: SequenceGroup) -> bool:
    outputs = [sequence.output for sequence in group.sequences if sequence.is_answer]
    if group.request.is_beam_search:
        return outputs == [one.hypothesis.tokens for one in undisturbed_beams(group.request)[0][: group.request.n]]
    return outputs == [undisturbed_output(group.request, index)[0] for index in range(group.request.n)]


def test_searches_that_took_turns_decode_in_one_step() -> None:
    one = Machine()
    first = one.search("first")
    one.run(4)
    one.plan_all()
    second = one.search("second")
    one.run(12)
    assert one.decoded[-8:] == [8] * 8
    one.run(500)
    assert is_right(first)
    assert is_right(second)


def test_searches_take_turns_where_the_wait_costs_more_than_a_step() -> None:
    one = Machine(wait_ms=30.0)
    first = one.search("first")
    one.run(6)
    one.plan_all()
    second = one.search("second")
    one.run(12)
    assert one.decoded[-6:] == [4] * 6
    one.run(500)
    assert is_right(first)
    assert is_right(second)


def beside(num_others: int, num_searches: int, **settings: Any) -> tuple[Machine, list[SequenceGroup]]:
    """Everybody after a while, some steps of different sizes having been seen."""
    one = Machine(**settings)
    groups = [one.submit(f"other-{number}", max_tokens=90) for number in range(num_others)]
    one.run(6)
    groups += [one.search(f"search-{number}", max_tokens=60) for number in range(num_searches)]
    one.run(20)
    return one, groups


def test_a_few_others_wait_for_the_beams_of_many_searches() -> None:
    one, groups = beside(num_others=4, num_searches=8)
    assert one.decoded[-10:] == [36] * 10
    one.run(500)
    assert all(map(is_right, groups))


def test_many_others_do_not_wait_for_the_beams_of_one_search() -> None:
    one, groups = beside(num_others=24, num_searches=1)
    assert sorted(one.decoded[-10:]) == [24] * 5 + [28] * 5
    one.run(500)
    assert all(map(is_right, groups))


def test_nobody_waits_beyond_the_target_for_the_time_between_two_tokens() -> None:
    # A step of 36 takes 6.8 ms, and the wait 1 ms.
    for target, steps in ((8, [4] * 5 + [36] * 5), (9, [36] * 10)):
        one, groups = beside(num_others=4, num_searches=8, target_itl_ns=target * MS)
        assert sorted(one.decoded[-10:]) == steps, f"{target} ms"
        one.run(500)
        assert all(map(is_right, groups))


def test_a_prompt_that_comes_while_a_plan_waits_is_in_that_plan() -> None:
    one, _ = beside(num_others=4, num_searches=8)
    one.plan_all()
    assert len(one.pending) == 1
    one.submit("late")
    assert one.maybe_plan() is None
    before = len(one.plans)
    one.run(1)
    one.plan_all()
    assert one.plans[before].chunk_tokens == [5]
    assert len(one.plans[before].beam_slots) == 32


def test_long_prompts_are_not_held_up() -> None:
    one, _ = beside(num_others=4, num_searches=8)
    one.plan_all()
    one.submit("long", list(range(200)))
    assert one.plan().chunk_tokens == [60], "the step's 64 tokens but those of the four that decode"


def test_a_search_that_ends_while_a_plan_waits_for_it_holds_nobody_up() -> None:
    one, groups = beside(num_others=4, num_searches=8)
    one.plan_all()
    assert len(one.pending) == 1
    for group in groups[4:]:
        one.dispatcher.abort(group.request.request_id, FinishReason.CANCELLED, one.tick())
    assert one.dispatcher.take_woken() == ["w"]
    assert one.maybe_plan() is not None


def test_beams_that_a_result_completes_are_not_waited_for() -> None:
    one, groups = beside(num_others=4, num_searches=8)
    while len(groups[4].beams[0].output) < 59:
        one.run(1)
    assert one.maybe_plan() is not None
    assert one.maybe_plan() is not None, "all searches end with the first"


def test_a_worker_that_is_lost_while_a_plan_waits_takes_nothing_with_it() -> None:
    one, groups = beside(num_others=4, num_searches=8)
    one.plan_all()
    assert len(one.pending) == 1
    one.join(epoch=2)
    one.run(500)
    assert all(map(is_right, groups))
