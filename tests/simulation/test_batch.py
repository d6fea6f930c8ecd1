"""A worker's rows, followed by its plans."""

from __future__ import annotations

from array import array

from pagewire.simulation.batch import Batch, RequestRow, Row, StepLoad
from scheduler.sequence import Request
from scheduler.step_plan import Fork, NewSequence, StepPlan
from tests.core.factories import OneWorker


def new(slot: int, num_tokens: int, request: Request | None = None) -> NewSequence:
    """A prompt without KV."""
    prompt = array("I", range(num_tokens))
    return NewSequence(slot, prompt, num_tokens, 0, [], 0, request or Request("a", prompt, max_tokens=9))


def test_rows_of_a_plan_are_counted_as_a_worker_counts_them() -> None:
    batch = Batch(Row.of)
    one = OneWorker(num_blocks=64, max_step_tokens=8)
    one.submit("a", [1, 2, 3, 4, 5], max_tokens=3)
    one.submit("b", [1, 2, 3, 4, 5, 6], max_tokens=3)
    seen: list[StepLoad] = []
    followed: list[int] = []
    sampled: list[int] = []
    while (plan := one.maybe_plan()) is not None:
        seen.append(batch.execute(plan))
        followed.append(batch.num_sampling)
        sampled.append(len(one.apply(one.execute()).sequences))
    assert followed == sampled == [1, 2, 2, 1]
    chunks = StepLoad(num_chunks=2, chunk_tokens=8, chunk_context=5 + 3, chunk_pairs=15 + 6)
    assert seen[0] == chunks
    assert seen[0].context_tokens == 8
    assert seen[1] == StepLoad(
        decode_tokens=1, decode_context=6, num_chunks=1, chunk_tokens=3, chunk_context=6, chunk_pairs=3 * 3 + 6
    )
    assert seen[1].context_tokens == 6 + 6
    assert seen[1].attended_pairs == 6 + 15


def test_a_row_that_leaves_the_decode_set_is_known_by_its_length() -> None:
    batch = Batch(Row.of)
    batch.execute(StepPlan(1, 1, new_sequences=[new(0, 4)], chunk_slots=[0], chunk_tokens=[4]))
    assert batch.execute(StepPlan(1, 2, decode_add=[0])).decode_context == 5
    assert batch.execute(StepPlan(1, 3)).decode_context == 6
    assert batch.execute(StepPlan(1, 4, decode_remove=[0])) == StepLoad()
    assert (batch.rows[0].known, batch.rows[0].computed) == (7, 6)
    assert batch.execute(StepPlan(1, 5, decode_add=[0])).decode_context == 7


def test_sampling_rows_stand_in_the_order_of_the_result_each_with_its_position() -> None:
    batch = Batch(RequestRow.of)
    batch.execute(StepPlan(1, 1, new_sequences=[new(0, 4)], chunk_slots=[0], chunk_tokens=[4]))
    batch.execute(StepPlan(1, 2, decode_add=[0]))
    plan = StepPlan(1, 3, new_sequences=[new(1, 2)], chunk_slots=[1], chunk_tokens=[2], forks=[Fork(1, 2, 1)])
    batch.execute(plan)
    assert [(row.index, position) for row, position in batch.sampling()] == [(0, 6), (0, 2), (1, 2)]
    batch.execute(StepPlan(1, 4, release_slots=[0], decode_add=[2, 1]))
    assert [(row.index, position) for row, position in batch.sampling()] == [(1, 3), (0, 3)]


def test_beams_go_on_from_their_parents_as_those_were_before() -> None:
    search = Request("a", array("I", [0, 1]), max_tokens=9, beam_width=2)
    batch = Batch(RequestRow.of)
    batch.execute(StepPlan(1, 1, new_sequences=[new(0, 2, search)], chunk_slots=[0], chunk_tokens=[2]))
    batch.execute(StepPlan(1, 2, beam_slots=[0, 1], beam_parents=[0, 0], beam_tokens=[7, 8], decode_add=[0, 1]))
    plan = StepPlan(
        1, 3, beam_slots=[0, 1], beam_parents=[1, 0], beam_tokens=[5, 6], decode_remove=[0, 1], decode_add=[0, 1]
    )
    assert batch.execute(plan) == StepLoad(decode_tokens=2, decode_context=4 + 4)
    assert [(row.beam, position) for row, position in batch.sampling()] == [((8, 5), 4), ((7, 6), 4)]
