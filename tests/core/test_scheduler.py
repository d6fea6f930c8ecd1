"""The policy, plan by plan, with literal block ids. Blocks have 4 tokens unless said otherwise."""

from __future__ import annotations

from array import array

import pytest

from scheduler.dispatcher import (
    Admitted,
    Failed,
    Finished,
    FinishReason,
    ResultError,
    SchedulerConfig,
    StatusCode,
    TransferRates,
)
from scheduler.sequence import SequenceStatus
from scheduler.step_plan import BlockMoves, Fork, NewSequence, StepPlan, StepResult
from tests.core.factories import OneWorker
from tests.core.simulated_worker import Behaviour, logprob_of, undisturbed_output

LONG = list(range(1, 11))  # a prompt of 10 tokens: 2 full blocks and a half


def test_the_first_plan_carries_the_request_whole_and_the_second_one_nearly_nothing() -> None:
    service = OneWorker()
    group = service.submit("a", [1, 2, 3, 4, 5])
    assert service.plan() == StepPlan(
        epoch=1,
        step=1,
        new_sequences=[
            NewSequence(
                slot=0,
                token_ids=array("I", [1, 2, 3, 4, 5]),
                prompt_tokens=5,
                computed_tokens=0,
                blocks=[0, 1],
                index=0,
                request=group.request,
            )
        ],
        chunk_slots=[0],
        chunk_tokens=[5],
    )
    assert service.plan() == StepPlan(epoch=1, step=2, decode_add=[0])
    service.apply()
    assert service.plan() == StepPlan(epoch=1, step=3)


def test_at_most_two_plans_are_in_flight() -> None:
    service = OneWorker()
    service.submit()
    service.plan()
    service.plan()
    assert service.maybe_plan() is None
    service.apply()
    assert service.plan().step == 3


def test_a_block_is_appended_in_the_step_that_writes_its_first_position() -> None:
    service = OneWorker()
    service.submit("a", [1, 2, 3, 4, 5], max_tokens=8)
    appended = {plan.step: plan.append_blocks for plan in service.run_until_idle() if plan.append_blocks}
    # Step 1 computes positions 0..4; step s > 1 writes position s + 3, so position 8 is step 5's.
    assert appended == {5: [2]}


def test_the_last_position_by_length_is_never_written_and_needs_no_block() -> None:
    service = OneWorker()
    service.submit("a", [1, 2, 3, 4], max_tokens=5)
    plans = service.run_until_idle()
    # Positions 4..7 are written by steps 2..5; the fifth token needs no KV of its own.
    assert [plan.append_blocks for plan in plans] == [[], [1], [], [], []]


def test_a_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    service = OneWorker(SchedulerConfig(token_budget=4))
    service.submit("a", LONG)
    chunks = [(plan.chunk_slots, plan.chunk_tokens) for plan in service.run_until_idle()[:4]]
    assert chunks == [([0], [4]), ([0], [4]), ([0], [2]), ([], [])]


def test_decodes_come_first_in_the_budget_and_prompts_get_the_rest() -> None:
    service = OneWorker(SchedulerConfig(token_budget=6))
    service.submit("a", [1, 2, 3])
    service.submit("b", LONG)
    assert (service.step().chunk_slots, service.worker.decode_set) == ([0, 1], [])
    plan = service.step()
    assert (plan.decode_add, plan.chunk_slots, plan.chunk_tokens) == ([0], [1], [5])


def test_chunks_of_one_step_are_planned_in_order_of_admission() -> None:
    service = OneWorker()
    service.submit("a", [1, 2, 3])
    service.submit("b", [4, 5])
    plan = service.plan()
    assert (plan.chunk_slots, plan.chunk_tokens) == ([0, 1], [3, 2])
    assert [new.blocks for new in plan.new_sequences] == [[0], [1]]


def test_higher_priority_starts_first_and_equal_priority_in_order_of_arrival() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    for request_id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        service.submit(request_id, [1], priority=priority, max_tokens=1)
    started = [new.request.request_id for plan in service.run_until_idle() for new in plan.new_sequences]
    assert started == ["b", "d", "a", "c"]


def test_nobody_is_admitted_past_a_waiting_group_that_does_not_fit() -> None:
    service = OneWorker(SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False), num_blocks=4)
    service.submit("a", [1] * 8, max_tokens=4)
    service.submit("big", [2] * 12, max_tokens=1)
    service.submit("small", [3], max_tokens=1)
    assert [new.request.request_id for new in service.step().new_sequences] == ["a"]
    started = [new.request.request_id for plan in service.run_until_idle() for new in plan.new_sequences]
    assert started == ["big", "small"]


@pytest.mark.parametrize(
    ("prompt", "outputs", "fits"),
    # Of 16 blocks the first holds 4 of which 2 are output: 10 fit. Or 4 that are prompt: 12 fit.
    [(5, 10, 10), (14, 1, 12)],
    ids=["after long output", "after a long prompt"],
)
def test_a_new_request_leaves_room_for_the_growth_of_those_who_run(prompt: int, outputs: int, fits: int) -> None:
    config = SchedulerConfig(watermark=0.0, headroom=1.0, prefix_cache=False)
    for blocks in (fits, fits + 1):
        service = OneWorker(config)
        first = service.submit("first", [1] * prompt, max_tokens=20)
        while len(first.sequences[0].output) < outputs:
            service.step()
        assert service.free_blocks == 12
        service.submit("second", [1] * (4 * blocks), max_tokens=1)
        assert bool(service.plan().new_sequences) == (blocks == fits)


def test_headroom_spares_preemptions() -> None:
    preemptions = {}
    for headroom in (0.0, 0.5):
        service = OneWorker(SchedulerConfig(watermark=0.0, headroom=headroom, prefix_cache=False), num_blocks=40)
        groups = [service.submit(f"{number}", [1] * 8, max_tokens=8 + 11 * number % 40) for number in range(60)]
        service.run_until_idle(2000)
        assert all(group.is_finished for group in groups)
        preemptions[headroom] = sum(service.dispatcher.loads().workers[0].preemptions_total.values())
    assert preemptions[0.5] < preemptions[0.0]


def test_who_was_preempted_comes_back_without_headroom() -> None:
    service = OneWorker(SchedulerConfig(watermark=0.0, headroom=1.0, prefix_cache=False, preemption_mode="recompute"))
    longest = service.submit("longest", [1] * 4, max_tokens=60)
    other = service.submit("other", [1] * 20, max_tokens=20)
    last = service.submit("last", [1] * 20, max_tokens=20)
    while not last.preemptions:
        service.step()
    while not other.is_finished:
        service.step()
    service.step()
    # 8 of 10 free blocks, beside a sequence that holds 6
    assert last.sequences[0].table.blocks
    assert not longest.is_finished


def test_admission_leaves_the_watermark_free_unless_the_pool_is_empty() -> None:
    service = OneWorker(SchedulerConfig(watermark=0.25, prefix_cache=False), num_blocks=8)
    service.submit("a", [1] * 28, max_tokens=1)  # 7 of 8 blocks, but it is alone
    assert len(service.step().new_sequences) == 1
    service.submit("b", [1] * 16, max_tokens=9)
    service.submit("c", [1] * 12, max_tokens=1)  # 4 + 3 blocks would leave 1 of the 2 of the watermark
    assert [new.request.request_id for new in service.step().new_sequences] == ["b"]


# ---- ends


def test_a_sequence_that_stops_runs_once_more_and_that_token_is_dropped() -> None:
    tokens, _ = undisturbed_output(OneWorker().submit("a", [1, 2, 3], max_tokens=8).request, 0)
    service = OneWorker()
    group = service.submit("a", [1, 2, 3], max_tokens=8, stop_ids=frozenset({tokens[2]}))
    for _ in range(2):
        service.plan()
    service.apply()
    service.plan()
    service.apply()
    service.plan()
    assert service.apply().token_ids == [tokens[2]]
    (sequence,) = group.sequences
    assert sequence.finish is not None
    assert (sequence.finish.reason, sequence.finish.matched_token_id) == (FinishReason.STOP, tokens[2])
    assert service.apply().token_ids == []
    assert sequence.output == tokens[:3]
    assert service.free_blocks == 16
    assert [type(event) for event in service.dispatcher.take_events()] == [Admitted, Finished]


def test_a_stop_token_before_min_tokens_does_not_end_a_sequence() -> None:
    service = OneWorker()
    group = service.submit("a", [1], max_tokens=6, min_tokens=4, stop_ids=frozenset(range(64)) - {1})
    service.run_until_idle()
    assert group.sequences[0].output[:4] == [1, 1, 1, 1]
    assert len(group.sequences[0].output) >= 5


def test_a_sequence_that_ends_by_length_is_not_in_the_next_plan() -> None:
    service = OneWorker()
    service.submit("a", [1], max_tokens=2)
    service.submit("b", [2], max_tokens=3)
    assert service.plan().chunk_slots == [0, 1]
    assert service.plan().decode_add == [0, 1]
    service.apply()
    assert service.plan().release_slots == [0]
    service.apply()
    result = service.execute()
    assert len(result.token_ids) == 1
    service.apply(result)


def test_one_token_wanted_means_no_decode_step() -> None:
    service = OneWorker()
    group = service.submit("a", LONG, max_tokens=1)
    plans = service.run_until_idle()
    assert len(plans) == 1
    assert group.sequences[0].finish is not None
    assert group.sequences[0].finish.reason is FinishReason.LENGTH
    assert service.free_blocks == 16


def test_a_row_of_an_ended_sequence_is_filled_again_only_in_a_plan_that_releases_it() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    service.submit("a", [1], max_tokens=1)
    service.submit("b", [2], max_tokens=1)
    assert [new.slot for new in service.plan().new_sequences] == [0]
    second = service.plan()
    assert second.release_slots == [0]
    assert [(new.slot, new.request.request_id) for new in second.new_sequences] == [(0, "b")]


def test_a_stop_string_trims_the_output_and_frees_the_blocks_at_once() -> None:
    service = OneWorker()
    group = service.submit("a", LONG, max_tokens=20, logprobs=1)
    for _ in range(5):
        service.step()
    tokens = group.sequences[0].output.copy()
    service.plan()
    assert service.dispatcher.stop_sequence("a", 0, 3, "END", service.tick())
    finish = group.sequences[0].finish
    assert finish is not None
    assert (finish.reason, finish.matched_stop, finish.usage.completion_tokens) == (FinishReason.STOP, "END", 3)
    assert finish.cumulative_logprob == -1.5
    assert group.sequences[0].output == tokens[:3]
    assert service.free_blocks == 16
    assert service.apply().token_ids == []
    assert not service.dispatcher.stop_sequence("a", 0, 3, "END", service.tick())


def test_a_stop_string_cannot_keep_more_tokens_than_there_are() -> None:
    service = OneWorker()
    service.submit()
    service.step()
    assert not service.dispatcher.stop_sequence("a", 0, 2, "END", service.tick())
    assert not service.dispatcher.stop_sequence("a", 1, 0, "END", service.tick())


# ---- parallel samples


def test_samples_fork_at_the_last_chunk_and_copy_the_shared_partial_block_in_the_next_plan() -> None:
    service = OneWorker()
    group = service.submit("a", [1, 2, 3, 4, 5, 6], n=3)
    first = service.plan()
    assert len(first.new_sequences) == 1
    assert first.forks == [Fork(0, 1, 1), Fork(0, 2, 2)]
    second = service.plan()
    assert second.copies == BlockMoves([1, 1], [2, 3])
    assert (second.replace_slots, second.replace_indices, second.replace_blocks) == ([0, 1], [1, 1], [2, 3])
    assert second.decode_add == [0, 1, 2]
    assert [sequence.table.blocks for sequence in group.sequences] == [[0, 2], [0, 3], [0, 1]]
    service.run_until_idle()
    assert [sequence.output for sequence in group.sequences] == [
        undisturbed_output(group.request, index)[0] for index in range(3)
    ]


def test_samples_of_a_prompt_that_ends_with_a_block_share_it_without_a_copy() -> None:
    service = OneWorker()
    group = service.submit("a", [1, 2, 3, 4], n=2)
    service.plan()
    second = service.plan()
    assert second.copies == BlockMoves()
    assert (second.append_slots, second.append_blocks) == ([0, 1], [1, 2])
    assert [sequence.table.blocks for sequence in group.sequences] == [[0, 1], [0, 2]]


def test_recomputed_samples_share_the_full_prompt_blocks_again() -> None:
    service = OneWorker(SchedulerConfig(prefix_cache=False))
    group = service.submit("a", [1, 2, 3, 4, 5, 6], n=2, max_tokens=6)
    service.step()
    service.step()
    service.dispatcher.remove_worker("w", service.tick())
    service.join(epoch=2)
    plan = service.plan()
    assert [(new.index, new.computed_tokens, new.blocks) for new in plan.new_sequences] == [(0, 0, [0, 1])]
    assert plan.chunk_tokens == [8]
    following = service.plan()
    assert [(new.index, new.computed_tokens, new.blocks) for new in following.new_sequences] == [(1, 4, [0, 2])]
    assert following.chunk_tokens == [4]
    service.run_until_idle()
    for index, sequence in enumerate(group.sequences):
        assert sequence.output == undisturbed_output(group.request, index)[0]
    assert group.recomputed_tokens == 7 + 3


# ---- prefix cache


def test_a_second_request_shares_the_full_blocks_of_a_common_prefix() -> None:
    service = OneWorker()
    service.submit("a", LONG, max_tokens=20)
    service.plan()
    group = service.submit("b", [*LONG[:9], 99])
    (new,) = service.plan().new_sequences
    assert (new.computed_tokens, new.blocks) == (8, [0, 1, 3])
    assert group.cached_tokens == 8


def test_blocks_are_not_shared_within_the_plan_that_computes_them() -> None:
    service = OneWorker()
    service.submit("a", LONG)
    service.submit("b", LONG)
    assert [new.computed_tokens for new in service.plan().new_sequences] == [0, 0]


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    service = OneWorker()
    service.submit("a", LONG[:8])
    service.run_until_idle()
    service.submit("b", LONG[:8])
    (new,) = service.plan().new_sequences
    assert new.computed_tokens == 4


def test_blocks_of_a_chunk_can_be_shared_before_the_prompt_is_complete() -> None:
    service = OneWorker(SchedulerConfig(token_budget=8))
    service.submit("a", list(range(20)))
    service.plan()
    service.dispatcher.abort("a", FinishReason.CANCELLED, service.tick())
    service.submit("b", list(range(20)))
    (new,) = service.plan().new_sequences
    assert new.computed_tokens == 8


def test_generated_blocks_are_found_by_the_next_turn_of_a_conversation() -> None:
    service = OneWorker()
    group = service.submit("a", [1, 2, 3], max_tokens=10)
    service.run_until_idle()
    following = service.submit("b", [1, 2, 3, *group.sequences[0].output, 7, 7])
    service.run_until_idle()
    # 13 tokens were known, the KV of the last was never computed: 12 are in three full blocks.
    assert following.cached_tokens == 12


def test_tenants_do_not_share_prefixes() -> None:
    service = OneWorker()
    service.submit("a", LONG, tenant="x")
    service.run_until_idle()
    other = service.submit("b", LONG, tenant="y")
    same = service.submit("c", LONG, tenant="x")
    service.run_until_idle()
    assert (other.cached_tokens, same.cached_tokens) == (0, 8)


def test_the_prefix_cache_can_be_turned_off() -> None:
    service = OneWorker(SchedulerConfig(prefix_cache=False))
    service.submit("a", LONG)
    service.run_until_idle()
    group = service.submit("b", LONG)
    service.run_until_idle()
    assert group.cached_tokens == 0
    assert service.dispatcher.loads().workers[0].kv_blocks_cached == 0


def test_prompt_logprobs_are_collected_over_chunks_and_skip_the_cache() -> None:
    service = OneWorker(SchedulerConfig(token_budget=4))
    service.submit("a", LONG)
    service.run_until_idle()
    service.dispatcher.take_events()
    group = service.submit("b", LONG, prompt_logprobs=1)
    service.step()
    assert service.dispatcher.take_events() == []
    service.run_until_idle()
    assert group.cached_tokens == 0
    assert list(group.prompt_logprobs) == [logprob_of(token) for token in LONG[1:]]
    assert service.dispatcher.take_events()[0] == Admitted(group)


# ---- preemption


def tight(mode: str, **sizes: int) -> OneWorker:
    """Two requests that start in a pool of 6 blocks, of which each will need 4."""
    sizes.setdefault("num_blocks", 6)
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode=mode, prefix_cache=False)  # type: ignore[arg-type]
    service = OneWorker(config, **sizes)
    service.submit("a", [1] * 7, max_tokens=9)
    service.submit("b", [2] * 7, max_tokens=9)
    return service


def test_swap_moves_the_younger_group_out_and_back_and_it_decodes_at_once() -> None:
    service = tight("swap")
    plans = service.run_until_idle()
    (out,) = [plan for plan in plans if plan.swap_out]
    (back,) = [plan for plan in plans if plan.swap_in]
    assert (out.release_slots, out.swap_out) == ([1], BlockMoves([2, 3, 5], [0, 1, 2]))
    assert back.swap_in.sources == [0, 1, 2]
    (new,) = back.new_sequences
    assert new.computed_tokens == len(new.token_ids) - 1
    assert back.decode_add == [new.slot]
    group = service.dispatcher.find("b")
    assert group is not None
    assert (group.preemptions, group.swapped_bytes, group.recomputed_tokens) == (1, 6000, 0)
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_recompute_drops_the_younger_group_and_computes_its_tokens_again() -> None:
    service = tight("recompute")
    plans = service.run_until_idle()
    assert not any(plan.swap_out for plan in plans)
    group = service.dispatcher.find("b")
    assert group is not None
    assert (group.preemptions, group.swapped_bytes, group.recomputed_tokens) == (1, 0, 12)
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]
    assert service.dispatcher.loads().workers[0].preemptions_total == {"swap": 0, "recompute": 1}


@pytest.mark.parametrize("host_blocks", [0, 2])
def test_a_swap_arena_without_room_means_recompute(host_blocks: int) -> None:
    service = tight("swap", host_blocks=host_blocks)
    service.run_until_idle()
    assert service.dispatcher.loads().workers[0].preemptions_total == {"swap": 0, "recompute": 1}


@pytest.mark.parametrize(
    ("rates", "mode"),
    [(TransferRates(10**9, 10**9, 10**3), "swap"), (TransferRates(10**3, 10**3, 10**9), "recompute")],
)
def test_auto_takes_the_cheaper_by_the_workers_rates(rates: TransferRates, mode: str) -> None:
    service = OneWorker(SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False), rates, num_blocks=6)
    service.submit("a", [1] * 7, max_tokens=9)
    service.submit("b", [2] * 7, max_tokens=9)
    scheduler = service.dispatcher._schedulers["w"]
    while not sum(scheduler.preemptions_total.values()):  # without results, so that nothing is learned
        scheduler.costs.step_time = type(scheduler.costs.step_time)(rates.prefill_tokens_per_second)
        service.step()
    assert scheduler.preemptions_total[mode] == 1


def test_a_preempted_group_waits_for_the_results_of_its_last_steps() -> None:
    service = tight("recompute")
    while not (plan := service.plan()).release_slots:
        if len(service.pending) == 2:
            service.apply()
    group = service.dispatcher.find("b")
    assert group is not None
    assert group.sequences[0].status is SequenceStatus.PREEMPTED
    assert group.resumable_after == plan.step - 1


def test_a_preempted_group_is_resumed_before_anybody_new_but_for_higher_priority() -> None:
    service = tight("recompute", num_blocks=7)
    group = service.dispatcher.find("b")
    assert group is not None
    while not group.preemptions:
        service.step()
    service.submit("new", [3], max_tokens=1)
    service.submit("urgent", [4], max_tokens=1, priority=1)
    started = [new.request.request_id for plan in service.run_until_idle() for new in plan.new_sequences]
    assert started == ["urgent", "b", "new"]


def test_all_sequences_of_a_group_are_preempted_and_resumed_together() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="swap", prefix_cache=False)
    service = OneWorker(config, num_blocks=8)
    service.submit("a", [1] * 7, max_tokens=16)
    pair = service.submit("b", [2] * 7, n=2, max_tokens=9)
    plans = service.run_until_idle()
    (out,) = [plan for plan in plans if plan.swap_out]
    (back,) = [plan for plan in plans if plan.swap_in]
    assert len(out.release_slots) == len(back.decode_add) == 2
    # The full prompt block is shared: it is copied once, each way.
    assert len(out.swap_out) == len(set(out.swap_out.sources)) == 5
    assert len(back.swap_in) == 5
    assert [sequence.output for sequence in pair.sequences] == [undisturbed_output(pair.request, i)[0] for i in (0, 1)]


def test_samples_that_are_swapped_before_their_first_copy_on_write_come_back_with_blocks_of_their_own() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="swap", prefix_cache=False)
    service = OneWorker(config, num_blocks=5)
    service.submit("a", [1] * 7, max_tokens=8)
    service.step()
    pair = service.submit("b", [2] * 6, n=2, max_tokens=3)
    service.step()
    out = service.step()  # the elder needs a block in the step in which the pair would copy one, and one is free
    assert out.swap_out == BlockMoves([2, 3], [0, 1])
    (back,) = [plan for plan in service.run_until_idle() if plan.swap_in]
    assert back.swap_in.sources == [0, 1, 1]
    assert [sequence.output for sequence in pair.sequences] == [undisturbed_output(pair.request, i)[0] for i in (0, 1)]


def test_when_the_head_outgrows_the_pool_those_who_yielded_to_it_start_in_the_same_plan() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="recompute", prefix_cache=False)
    service = OneWorker(config, num_blocks=4)
    service.submit("head", [1] * 4, n=2, max_tokens=20)
    for _ in range(4):
        service.step()
    service.submit("next", [2] * 3, max_tokens=2)
    service.step()
    plan = service.plan()
    assert [new.request.request_id for new in plan.new_sequences] == ["next"]
    failed = service.dispatcher.take_events()[-1]
    assert isinstance(failed, Failed)
    assert failed.group.request.request_id == "head"


def test_a_queueing_group_whose_first_sequence_ends_looks_up_the_next_ones_blocks() -> None:
    config = SchedulerConfig(watermark=0.25, preemption_mode="recompute")
    service = OneWorker(config, num_blocks=8)
    pair = service.submit("pair", [1] * 4, n=2, max_tokens=20)
    service.step()
    service.submit("urgent", [2] * 8, priority=1, max_tokens=20)
    while not pair.preemptions:
        service.step()
    service.step()
    assert pair.sequences[0].status is SequenceStatus.PREEMPTED
    assert service.dispatcher.stop_sequence("pair", 0, 1, "END", service.tick())
    assert service.dispatcher.abort("urgent", FinishReason.CANCELLED, service.tick())
    service.run_until_idle()
    assert pair.sequences[1].output == undisturbed_output(pair.request, 1)[0]


def test_a_request_that_outgrows_the_whole_pool_alone_fails_by_name() -> None:
    service = OneWorker(num_blocks=3)
    service.submit("a", [1] * 7, max_tokens=50)
    service.run_until_idle()
    failed = service.dispatcher.take_events()[-1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.reason) == (StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED")
    assert failed.message == "the request has outgrown the KV pool of 3 blocks of 4 tokens"
    assert service.free_blocks == 3


def test_the_oldest_group_is_never_preempted_and_everybody_ends() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False)
    service = OneWorker(config, num_blocks=8, host_blocks=3)
    groups = [service.submit(str(number), [number] * 5, max_tokens=20) for number in range(8)]
    service.run_until_idle()
    assert groups[0].preemptions == 0
    assert sum(group.preemptions for group in groups) > 0
    for group in groups:
        assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


# ---- cancelling, in every state


def test_cancelling_frees_blocks_in_every_state() -> None:
    for steps in range(12):
        for in_flight in (0, 1, 2):
            service = OneWorker(
                SchedulerConfig(
                    watermark=0.0, headroom=0.0, token_budget=4, preemption_mode="swap", prefix_cache=False
                ),
                num_blocks=6,
            )
            service.submit("a", [1] * 7, max_tokens=12)
            service.submit("b", [2] * 6, n=2, max_tokens=8)
            for _ in range(steps):
                service.step()
            for _ in range(in_flight):
                service.maybe_plan()
            for request_id in ("b", "a"):
                assert service.dispatcher.abort(request_id, FinishReason.CANCELLED, service.tick())
                service.dispatcher.check_integrity()
            assert service.free_blocks == 6
            assert service.dispatcher.loads().workers[0].host_blocks_used == 0
            assert not service.dispatcher.abort("a", FinishReason.CANCELLED, service.tick())
            while service.pending:
                assert service.apply().token_ids == []
            assert service.maybe_plan() is None


# ---- results


def test_a_result_is_accepted_once_and_others_are_counted_and_ignored() -> None:
    service = OneWorker()
    group = service.submit()
    service.plan()
    first = service.execute()
    assert service.apply(first).accepted
    assert not service.apply(first).accepted
    assert not service.apply(StepResult(epoch=1, step=7, token_ids=[1])).accepted
    assert not service.apply(StepResult(epoch=9, step=2, token_ids=[1])).accepted
    assert not service.dispatcher.apply("nobody", first, service.tick()).accepted
    assert service.dispatcher.loads().stale_results_total == 4
    assert len(group.sequences[0].output) == 1


def test_a_result_that_overtakes_another_takes_effect_in_its_turn() -> None:
    service = OneWorker()
    group = service.submit(logprobs=1)
    service.plan()
    service.plan()
    first, second = service.execute(), service.execute()
    early = service.apply(second)
    assert (early.accepted, early.token_ids) == (False, [])
    output = service.apply(first)
    assert output.token_ids == group.sequences[0].output == first.token_ids + second.token_ids
    assert output.logprobs == {position: logprob_of(token) for position, token in enumerate(output.token_ids)}
    assert service.dispatcher.loads().stale_results_total == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": []},
        {"token_ids": [1, 2]},
        {"token_ids": [1], "logprob_rows": [1], "logprobs": [logprob_of(1)]},
        {"token_ids": [1], "logprob_rows": [0]},
        {"token_ids": [1], "nonfinite_rows": [1]},
    ],
)
def test_a_result_that_contradicts_its_plan_raises_and_changes_nothing(wrong: dict[str, list[int]]) -> None:
    service = OneWorker()
    group = service.submit()
    service.plan()
    with pytest.raises(ResultError):
        service.apply(StepResult(epoch=1, step=1, **wrong))  # type: ignore[arg-type]
    assert group.sequences[0].output == []
    assert service.apply().accepted


def test_rows_that_are_not_finite_fail_their_request_only_and_their_blocks_are_not_found_again() -> None:
    service = OneWorker()
    service.submit("bad", LONG, payload=Behaviour(nonfinite_at=2))
    good = service.submit("good", [9, 9, 9])
    service.run_until_idle()
    failed = [event for event in service.dispatcher.take_events() if isinstance(event, Failed)]
    assert [(event.group.request.request_id, event.code, event.reason) for event in failed] == [
        ("bad", StatusCode.INTERNAL, "NONFINITE_LOGITS")
    ]
    assert good.sequences[0].output == undisturbed_output(good.request, 0)[0]
    again = service.submit("again", LONG)
    service.run_until_idle()
    assert again.cached_tokens == 0


def test_a_request_on_shared_blocks_that_is_not_finite_is_computed_once_more_on_its_own() -> None:
    service = OneWorker()
    service.submit("a", LONG)
    service.run_until_idle()
    service.dispatcher.take_events()
    group = service.submit("b", LONG, max_tokens=3, payload=Behaviour())
    service.plan()
    result = service.execute()
    poisoned = StepResult(epoch=1, step=result.step, token_ids=result.token_ids, nonfinite_rows=[0])
    assert service.apply(poisoned).token_ids == []
    (new,) = service.plan().new_sequences
    assert new.computed_tokens == 0
    service.run_until_idle()
    assert group.failure is None
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_a_row_without_memory_fails_its_request_and_whoever_shares_its_blocks_starts_over() -> None:
    service = OneWorker()
    service.submit("bad", LONG, payload=Behaviour(out_of_memory_at=10))
    service.plan()
    good = service.submit("good", LONG)
    service.plan()
    assert good.cached_tokens == 8
    service.apply()
    failed = [event for event in service.dispatcher.take_events() if isinstance(event, Failed)]
    assert [(event.code, event.reason) for event in failed] == [(StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY")]
    assert service.apply().token_ids == []
    service.run_until_idle()
    assert good.sequences[0].output == undisturbed_output(good.request, 0)[0]


# ---- figures


def test_waste_is_the_empty_part_of_last_blocks() -> None:
    service = OneWorker()
    service.submit("a", [1, 2, 3, 4, 5])
    service.submit("b", [1, 2])
    service.plan()
    # 3 blocks of 4 slots hold 7 tokens; the next step adds one to each.
    assert service.dispatcher.loads().workers[0].kv_waste_ratio == pytest.approx(5 / 12)
    service.plan()
    assert service.dispatcher.loads().workers[0].kv_waste_ratio == pytest.approx(3 / 12)


def test_shared_blocks_waste_only_once() -> None:
    service = OneWorker()
    service.submit("a", [1, 2, 3, 4, 5], n=3)
    service.plan()
    assert service.dispatcher.loads().workers[0].kv_waste_ratio == pytest.approx(3 / 8)


def test_usage_says_what_a_sequence_cost() -> None:
    service = OneWorker()
    group = service.submit("a", LONG, max_tokens=2)  # accepted at 1
    service.plan()  # started at 2
    service.plan()
    service.apply()  # first token at 4
    service.apply()  # ended at 5
    (sequence,) = group.sequences
    assert sequence.finish is not None
    usage = sequence.finish.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (10, 2, 0)
    assert (usage.queue_ns, usage.first_token_ns, usage.total_ns) == (1, 3, 4)
