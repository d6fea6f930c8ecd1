"""Beam searches in the scheduler: what is shared and copied, who runs together, and who is not held up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from scheduler.dispatcher import FinishReason, SchedulerConfig, TransferRates
from scheduler.sequence import SequenceGroup, SequenceStatus
from scheduler.step_plan import StepPlan, StepResult, TokenLogprobs
from tests.core.factories import OneWorker
from tests.core.simulated_worker import undisturbed_beams


def answers(group: SequenceGroup) -> list[list[int]]:
    return [sequence.output for sequence in group.sequences if sequence.is_answer]


def expected(group: SequenceGroup) -> list[list[int]]:
    return [one.hypothesis.tokens for one in undisturbed_beams(group.request)[0][: group.request.n]]


def search(one: OneWorker, **fields: Any) -> SequenceGroup:
    """A search of two beams whose prompt of 5 tokens has been computed."""
    group = one.submit(**{"n": 2, "beam_width": 2, "max_tokens": 8, **fields})
    one.step()
    return group


def offering(plan: StepPlan, *offers: list[tuple[int, float]]) -> StepResult:
    """A result in which every row is a beam."""
    logprobs = [TokenLogprobs(0.0, 1, [token for token, _ in offer], [value for _, value in offer]) for offer in offers]
    return StepResult(plan.epoch, plan.step, [0] * len(offers), list(range(len(offers))), logprobs)


def test_beams_share_the_prompt_and_only_the_partial_block_is_copied() -> None:
    one = OneWorker()
    search(one)
    plan = one.plan()
    assert plan.beam_parents == [plan.beam_slots[0]] * 2
    assert (plan.copies.sources, plan.copies.destinations) == ([1], [2])
    assert plan.decode_add == plan.beam_slots
    assert one.free_blocks == 16 - 3
    one.apply()
    assert not one.step().copies.sources or one.worker.copied <= 2


def test_a_beam_that_dies_frees_its_blocks_and_a_child_takes_its_row_without_any_copy_at_a_block_border() -> None:
    one = OneWorker()
    group = one.submit(prompt=[1, 2, 3, 4], n=1, beam_width=2, max_tokens=8)
    plan = one.plan()
    one.pending.clear()
    one.apply(offering(plan, [(10, -1.0), (11, -2.0)]))
    first = one.plan()
    assert (first.copies.sources, first.append_blocks) == ([], [1, 2])
    one.pending.clear()
    # Both children are the first beam's: the second dies.
    one.apply(offering(first, [(20, -0.1), (21, -0.2)], [(22, -9.0), (23, -9.5)]))
    assert [sequence.output for sequence in group.beams] == [[10, 20], [10, 21]]
    assert one.free_blocks == 16 - 2
    second = one.plan()
    assert second.decode_remove == first.decode_add
    assert second.beam_parents == [first.beam_slots[0]] * 2
    assert second.beam_tokens == [20, 21]
    assert (second.copies.sources, second.copies.destinations) == ([1], [2])


def test_other_requests_run_in_every_step_beside_a_search_that_runs_in_every_second_one() -> None:
    one = OneWorker()
    other = one.submit("other", max_tokens=30)
    group = search(one, request_id="search")
    one.dispatcher.schedulers[0].gathering.wait_ns = 1e9  # nobody waits for the search
    slot = other.sequences[0].slot
    in_search = []
    while not group.is_finished:
        while (plan := one.maybe_plan()) is not None:
            assert slot in one.worker.decode_set or slot in plan.decode_add or len(one.pending) > 1
            in_search.append(bool(plan.beam_slots))
        decoded = len(other.sequences[0].output)
        one.apply()
        assert len(other.sequences[0].output) == decoded + 1
    assert not any(now and then for now, then in itertools.pairwise(in_search))
    assert answers(group) == expected(group)


def test_all_beams_of_a_search_decode_in_the_same_steps() -> None:
    one = OneWorker()
    group = search(one, n=1, beam_width=4, max_tokens=6)
    while not group.is_finished:
        plan = one.step()
        assert len(plan.beam_slots) == len(plan.decode_add) == 4
    assert answers(group) == expected(group)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("in_flight", [False, True], ids=["between steps", "while a step is under way"])
def test_a_search_is_preempted_and_resumed_as_a_whole(mode: Any, in_flight: bool) -> None:
    one = OneWorker(
        SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode=mode), TransferRates(1, 1, 1), max_slots=4
    )
    group = search(one, n=3, beam_width=3, max_tokens=20)
    for _ in range(6):
        one.step()
    if in_flight:
        one.plan()
        one.dispatcher.schedulers[0].gathering.wait_ns = 1e9  # nobody waits for the search
    urgent = one.submit("urgent", n=2, priority=1, payload=group.request.payload)
    one.plan()
    away = SequenceStatus.SWAPPED if mode == "swap" else SequenceStatus.PREEMPTED
    assert {sequence.status for sequence in group.sequences} == {away}
    while not urgent.is_finished:
        one.apply()
        one.maybe_plan()
    before = {sequence.status for sequence in group.sequences}
    assert before in ({away}, {SequenceStatus.RUNNING}, {SequenceStatus.PREFILLING, SequenceStatus.RUNNING})
    one.run_until_idle()
    assert answers(group) == expected(group)
    assert group.preemptions == 1
    assert (group.swapped_bytes > 0, group.recomputed_tokens > 0) == (mode == "swap", mode == "recompute")


@pytest.mark.parametrize("host_blocks", [0, 3])
def test_a_search_that_the_arena_has_no_room_for_is_recomputed(host_blocks: int) -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="swap", host_prefix_cache=False)
    one = OneWorker(config, max_slots=4, host_blocks=host_blocks)
    group = search(one, n=3, beam_width=3, max_tokens=20)
    for _ in range(9):
        one.step()
    one.submit("urgent", n=2, priority=1)
    plans = one.run_until_idle()
    assert answers(group) == expected(group)
    assert not any(plan.swap_out for plan in plans)
    assert one.dispatcher.loads().workers[0].preemptions_total == {"swap": 0, "recompute": 1}


def test_a_recomputed_search_shares_again_what_its_beams_begin_with() -> None:
    one = OneWorker(
        SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="recompute", prefix_cache=False), max_slots=4
    )
    group = search(one, n=3, beam_width=3, max_tokens=20)
    for _ in range(9):
        one.step()
    used = 16 - one.free_blocks
    assert used < sum(len(sequence.table) for sequence in group.sequences)
    one.submit("urgent", n=2, priority=1, max_tokens=2)
    while group.preemptions == 0 or any(sequence.status is not SequenceStatus.RUNNING for sequence in group.beams):
        one.step()
    assert 16 - one.free_blocks <= used + 3
    one.run_until_idle()
    assert answers(group) == expected(group)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.DEADLINE])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_search_that_is_ended_frees_everything_within_one_step_and_tells_nothing(
    reason: FinishReason, steps: int
) -> None:
    one = OneWorker()
    group = search(one, n=2, beam_width=3)
    for _ in range(steps):
        one.step()
    one.maybe_plan()
    assert one.dispatcher.abort("a", reason, one.tick())
    assert one.free_blocks == 16
    while one.pending:
        assert one.apply().token_ids == []
    assert [sequence.finish.reason for sequence in group.sequences if sequence.finish] == [reason] * 3
    assert answers(group) == [[], []]
    ended = [event for event in one.dispatcher.take_events() if hasattr(event, "sequence")]
    assert [event.sequence.index for event in ended] == [0, 1]


def test_answers_come_at_once_best_first_with_their_log_probabilities() -> None:
    one = OneWorker()
    group = search(one, n=2, beam_width=3, max_tokens=4, logprobs=1)
    told = [one.apply() for _ in range(3) if one.plan()]
    assert [len(output.token_ids) for output in told] == [0, 0, 8]
    assert told[-1].sequences == [group.sequences[0]] * 4 + [group.sequences[1]] * 4
    assert told[-1].num_searched == 8
    best, second = expected(group)
    assert told[-1].token_ids == best + second
    assert told[-1].logprobs == dict(enumerate(group.sequences[0].logprobs + group.sequences[1].logprobs))
    for sequence in group.sequences[:2]:
        assert sequence.finish is not None
        assert sequence.finish.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in sequence.logprobs))
        assert sequence.finish.usage.completion_tokens == 4


def test_a_beam_that_offers_too_few_tokens_contradicts_its_plan() -> None:
    one = OneWorker()
    group = one.submit(n=1, beam_width=2)
    plan = one.plan()
    assert plan.new_sequences[0].logprobs == 2
    with pytest.raises(ValueError, match="offers 1 tokens, not 2"):
        one.dispatcher.apply("w", offering(plan, [(10, -1.0)]), one.tick())
    assert group.beams[0].output == []
