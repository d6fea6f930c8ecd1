from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tests.worker.toy import MAX_MODEL_LEN, VOCAB, Steps, ToyModel, make_executor
from worker.executor import Executor
from worker.step import BlockMoves, Fork, NewSequence, PlanError, Sampling, StepPlan, StepResult

GREEDY = Sampling(temperature=0.0)
PROMPT = [7, 3, 30, 11, 25, 2, 19, 8, 40, 13]


def new(slot: int, tokens: list[int], blocks: list[int], **fields: Any) -> NewSequence:
    fields = {"prompt_tokens": len(tokens), "computed_tokens": 0, "sampling": GREEDY, **fields}
    return NewSequence(slot=slot, token_ids=tokens, blocks=blocks, **fields)


def start(model: ToyModel, **sizes: int) -> tuple[Executor, Steps]:
    executor = make_executor(model, **sizes)
    return executor, Steps(executor)


def prefill_and_decode(steps: Steps, slot: int, prompt: list[int], blocks: list[int], count: int) -> list[int]:
    """One sequence alone, its blocks given at the start: `count` tokens."""
    tokens = list(
        steps.run(new_sequences=[new(slot, prompt, blocks)], chunk_slots=[slot], chunk_tokens=[len(prompt)]).token_ids
    )
    for number in range(count - 1):
        tokens += steps.run(decode_add=[slot] if number == 0 else []).token_ids
    steps.run(release_slots=[slot])
    return tokens


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prefill_and_decode_equal_the_dense_computation(block_size: int, window: int | None) -> None:
    model = ToyModel(sliding_window=window)
    _, steps = start(model, block_size=block_size)
    blocks = random.Random(1).sample(range(40), -(-22 // block_size))
    assert prefill_and_decode(steps, 5, PROMPT, blocks, 12) == model.greedy(PROMPT, 12)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill_equals_prefill_at_once(chunk: int) -> None:
    model = ToyModel()
    executor, steps = start(model)
    fields: dict[str, Any] = {"new_sequences": [new(0, PROMPT, [9, 2, 31])]}
    for first in range(0, len(PROMPT), chunk):
        part = min(chunk, len(PROMPT) - first)
        result = steps.run(chunk_slots=[0], chunk_tokens=[part], **fields)
        fields = {}
        assert bool(result.token_ids) == (first + part == len(PROMPT))
    assert list(result.token_ids) == model.greedy(PROMPT, 1)
    assert executor.batch.computed[0] == len(PROMPT)


def test_a_mixed_step_answers_decode_rows_then_finishing_chunks_in_plan_order() -> None:
    model = ToyModel()
    _, steps = start(model)
    steps.run(new_sequences=[new(3, PROMPT, [0, 1, 2, 3])], chunk_slots=[3], chunk_tokens=[10])
    steps.run(new_sequences=[new(1, PROMPT[:5], [4, 5])], decode_add=[3], chunk_slots=[1], chunk_tokens=[5])
    result = steps.run(
        new_sequences=[new(0, [4, 9, 21], [6]), new(2, PROMPT[::-1], [7, 8, 9]), new(4, [33, 12], [10])],
        decode_add=[1],
        chunk_slots=[4, 2, 0],
        chunk_tokens=[2, 6, 3],
    )
    assert list(result.token_ids) == [
        model.greedy(PROMPT, 3)[2],
        model.greedy(PROMPT[:5], 2)[1],
        model.greedy([33, 12], 1)[0],
        model.greedy([4, 9, 21], 1)[0],
    ]
    assert (result.timings.decode_tokens, result.timings.chunk_tokens) == (2, 11)
    assert result.timings.forward_ns > 0


def test_logits_are_computed_only_for_rows_that_sample() -> None:
    model = ToyModel()
    _, steps = start(model)
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[9])
    assert model.logit_rows == []
    steps.run(new_sequences=[new(1, PROMPT, [3, 4, 5])], chunk_slots=[0, 1], chunk_tokens=[1, 4])
    assert model.logit_rows == [1]


def test_blocks_are_appended_as_the_sequence_grows() -> None:
    model = ToyModel()
    executor, steps = start(model, block_size=1)
    steps.run(new_sequences=[new(0, [5, 6], []), new(1, [8], [30])], append_slots=[0, 1, 0], append_blocks=[9, 12, 4])
    assert executor.batch.block_tables[0, :2].tolist() == [9, 4]
    assert executor.batch.block_tables[1, :2].tolist() == [30, 12]
    first = steps.run(chunk_slots=[0, 1], chunk_tokens=[2, 1]).token_ids
    second = steps.run(decode_add=[0, 1], append_slots=[0], append_blocks=[39]).token_ids
    assert [first[0], second[0]] == model.greedy([5, 6], 2)
    assert [first[1], second[1]] == model.greedy([8], 2)


@pytest.mark.parametrize(("buckets", "computed"), [((), 2), ((1, 3, 8), 3), ((8,), 8)])
def test_padding_of_the_decode_set_changes_no_token_and_writes_no_slot(buckets: tuple[int, ...], computed: int) -> None:
    model = ToyModel()
    executor = make_executor(model, buckets=buckets)
    steps = Steps(executor)
    hot = Sampling(temperature=1.3, seed=8, top_p=0.9)
    steps.run(
        new_sequences=[new(6, PROMPT, [0, 1, 2, 3]), new(1, PROMPT[:5], [4, 5, 6], sampling=hot)],
        chunk_slots=[6, 1],
        chunk_tokens=[10, 5],
    )
    tokens = [list(steps.run(decode_add=[6, 1] if number == 0 else []).token_ids) for number in range(4)]
    assert model.forward_rows[1:] == [computed] * 4
    assert [greedy for greedy, _ in tokens] == model.greedy(PROMPT, 5)[1:]
    # Positions 0..13 and 0..8 are computed; nothing else was written, block 0 of the pool least of all.
    written = ~executor.pool.device_blocks[:, 0, 0, 0, :, 0].isnan()
    assert written.sum(dim=1).tolist()[:7] == [4, 4, 4, 2, 4, 4, 1]
    assert not written[7:].any()


def test_chunks_without_memory_are_named_and_the_decode_set_goes_on() -> None:
    model = ToyModel()
    _, steps = start(model)
    steps.run(new_sequences=[new(3, PROMPT, [0, 1, 2, 3])], chunk_slots=[3], chunk_tokens=[10])
    steps.run(decode_add=[3])
    model.memory_rows = 8
    fields = {"new_sequences": [new(1, PROMPT, [4, 5, 6]), new(5, [7] * 12, [7, 8, 9])]}
    result = steps.run(chunk_slots=[1, 5], chunk_tokens=[10, 8], forks=[Fork(1, 2, 1)], **fields)
    assert result.out_of_memory_slots == [1, 5]
    assert len(result.token_ids) == 3, "the decode row, and the rows that would have sampled"
    # Their next plans may be under way already: they go on until the scheduler lets go of them.
    after = steps.run(decode_add=[1], chunk_slots=[5], chunk_tokens=[4], release_slots=[2])
    assert [result.token_ids[0], after.token_ids[0]] == model.greedy(PROMPT, 4)[2:]
    assert not after.out_of_memory_slots


def test_a_decode_row_beside_chunks_without_memory_gets_all_that_it_asked_for() -> None:
    def run(memory_rows: int) -> list[StepResult]:
        model = ToyModel()
        _, steps = start(model)
        likeliest = model.greedy(PROMPT, 2)[1]
        asks = Sampling(temperature=0.0, logit_bias=((likeliest, -100.0),), frequency_penalty=1.5)
        wordy = new(3, PROMPT, [0, 1, 2, 3], sampling=asks, logprobs=2)
        steps.run(new_sequences=[wordy], chunk_slots=[3], chunk_tokens=[10])
        model.memory_rows = memory_rows
        other = new(1, PROMPT, [4, 5, 6], logprobs=1)
        results = [steps.run(decode_add=[3], new_sequences=[other], chunk_slots=[1], chunk_tokens=[10])]
        return [*results, steps.run(release_slots=[1])]

    for with_memory, without in zip(run(100), run(8), strict=True):
        assert without.token_ids[0] == with_memory.token_ids[0]
        assert list(without.logprob_rows) == [0]
        found, expected = without.logprobs[0], with_memory.logprobs[0]
        assert (found.rank, found.top_ids) == (expected.rank, expected.top_ids)
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_rows_leave_the_decode_set_and_the_others_keep_their_order() -> None:
    model = ToyModel()
    executor, steps = start(model)
    prompts = {slot: [slot + 1, 2 * slot + 3] for slot in range(4)}
    steps.run(
        new_sequences=[new(slot, prompt, [2 * slot, 2 * slot + 1]) for slot, prompt in prompts.items()],
        chunk_slots=[0, 1, 2, 3],
        chunk_tokens=[2, 2, 2, 2],
    )
    steps.run(decode_add=[2, 0, 3, 1])
    steps.run(decode_remove=[0])
    assert executor.batch.decode_slots.tolist() == [2, 3, 1]
    result = steps.run(release_slots=[3], decode_add=[0])
    assert executor.batch.decode_slots.tolist() == [2, 1, 0]
    # Row 0 sat out one step: it has one token less.
    assert list(result.token_ids) == [
        model.greedy(prompts[2], 4)[3],
        model.greedy(prompts[1], 4)[3],
        model.greedy(prompts[0], 3)[2],
    ]


def test_forks_share_the_prompt_and_part_by_copy_on_write() -> None:
    model = ToyModel()
    executor, steps = start(model)
    sampling = Sampling(temperature=1.0, seed=99)
    sequence = new(0, PROMPT, [3, 1, 7], sampling=sampling)
    result = steps.run(
        new_sequences=[sequence], chunk_slots=[0], chunk_tokens=[10], forks=[Fork(0, 4, 1), Fork(0, 2, 2)]
    )
    assert model.logit_rows == [1]
    outputs = [[token] for token in result.token_ids]
    assert len({tuple(output) for output in outputs}) > 1, "this seed gives the samples different tokens"
    # Two of three rows copy the last block, which they will write to; one keeps it.
    result = steps.run(
        copies=BlockMoves([7, 7], [20, 21]),
        replace_slots=[4, 2],
        replace_indices=[2, 2],
        replace_blocks=[20, 21],
        decode_add=[0, 4, 2],
    )
    for _ in range(2):
        for output, token in zip(outputs, result.token_ids, strict=True):
            output.append(token)
        result = steps.run(append_slots=[0, 4, 2], append_blocks=[30, 31, 32]) if len(outputs[0]) == 2 else steps.run()
    assert executor.batch.block_tables[4, :4].tolist() == [3, 1, 20, 31]
    # Each sample equals a sequence of its own with the same seed and index.
    for index, output in enumerate(outputs):
        _, alone = start(model)
        tokens = list(
            alone.run(
                new_sequences=[new(6, PROMPT, [5, 6, 7, 8], sampling=sampling, index=index)],
                chunk_slots=[6],
                chunk_tokens=[10],
            ).token_ids
        )
        tokens += alone.run(decode_add=[6]).token_ids
        tokens += alone.run().token_ids
        assert output == tokens


def test_a_swapped_sequence_continues_where_it_stopped() -> None:
    model = ToyModel()
    executor, steps = start(model)
    expected = model.greedy(PROMPT, 5)
    pool, arena = executor.pool.device_blocks, executor.pool.host_blocks
    tokens = list(steps.run(new_sequences=[new(0, PROMPT, [3, 1, 7])], chunk_slots=[0], chunk_tokens=[10]).token_ids)
    tokens += steps.run(decode_add=[0]).token_ids
    before = pool[[3, 1, 7]].clone()
    result = steps.run(release_slots=[0], swap_out=BlockMoves([3, 1, 7], [19, 0, 5]))
    assert not result.token_ids
    assert result.timings.swap_out_ns > 0
    torch.testing.assert_close(arena[[19, 0, 5]], before, atol=0, rtol=0, equal_nan=True)
    pool[:] = float("nan")
    resumed = new(2, PROMPT + tokens, [30, 31, 32], prompt_tokens=10, computed_tokens=11)
    result = steps.run(swap_in=BlockMoves([19, 0, 5], [30, 31, 32]), new_sequences=[resumed], decode_add=[2])
    assert result.timings.swap_in_ns > 0
    torch.testing.assert_close(pool[[30, 31]], before[:2], atol=0, rtol=0)
    tokens += result.token_ids
    tokens += steps.run(append_slots=[2], append_blocks=[8]).token_ids
    tokens += steps.run().token_ids
    assert tokens == expected


def test_blocks_swapped_out_can_be_refilled_and_copied_in_the_same_plan() -> None:
    model = ToyModel()
    executor, steps = start(model)
    pool, arena = executor.pool.device_blocks, executor.pool.host_blocks
    for block in range(4):
        pool[block] = block
    arena[6] = 60
    steps.run(
        swap_out=BlockMoves([0, 1], [6, 7]), swap_in=BlockMoves([6, 7], [1, 2]), copies=BlockMoves([1, 2, 3], [0, 3, 1])
    )
    # Out first: the arena got blocks 0 and 1; then in: they came back to 1 and 2; then copies one after another.
    assert [arena[block].unique().item() for block in (6, 7)] == [0, 1]
    assert [pool[block].unique().item() for block in range(4)] == [0, 1, 1, 1]


def test_a_recomputed_sequence_continues_where_it_stopped() -> None:
    model = ToyModel()
    _, steps = start(model)
    expected = model.greedy(PROMPT, 5)
    tokens = list(steps.run(new_sequences=[new(0, PROMPT, [3, 1, 7])], chunk_slots=[0], chunk_tokens=[10]).token_ids)
    tokens += steps.run(decode_add=[0]).token_ids
    steps.run(release_slots=[0])
    resumed = new(0, PROMPT + tokens, [20, 21, 22, 23], prompt_tokens=10)
    assert not steps.run(new_sequences=[resumed], chunk_slots=[0], chunk_tokens=[8]).token_ids
    tokens += steps.run(chunk_slots=[0], chunk_tokens=[4]).token_ids
    tokens += steps.run(decode_add=[0]).token_ids
    tokens += steps.run().token_ids
    assert tokens == expected


def test_a_cached_prefix_is_not_computed_again() -> None:
    model = ToyModel()
    _, steps = start(model)
    steps.run(new_sequences=[new(0, PROMPT, [3, 1, 7])], chunk_slots=[0], chunk_tokens=[10])
    longer = [*PROMPT[:8], 9, 9, 9]
    sharing = new(1, longer, [3, 1, 12], computed_tokens=8)
    result = steps.run(new_sequences=[sharing], chunk_slots=[1], chunk_tokens=[3])
    assert result.timings.chunk_tokens == 3
    assert list(result.token_ids) == model.greedy(longer, 1)


SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=20, seed=2**64 - 5, presence_penalty=0.3, repetition_penalty=1.2)


def sample_alone(model: ToyModel, count: int) -> list[int]:
    _, steps = start(model)
    sequence = new(0, PROMPT, [0, 1, 2, 3, 4, 5], sampling=SAMPLING, index=3)
    tokens = list(steps.run(new_sequences=[sequence], chunk_slots=[0], chunk_tokens=[10]).token_ids)
    tokens += steps.run(decode_add=[0]).token_ids
    while len(tokens) < count:
        tokens += steps.run().token_ids
    return tokens


def test_a_seeded_sequence_samples_the_same_alone_in_a_batch_and_recomputed() -> None:
    model = ToyModel()
    expected = sample_alone(model, 8)
    _, steps = start(model)
    mates = [
        new(slot, [slot + 2] * (slot + 1), [6 * slot, 6 * slot + 1, 6 * slot + 2], sampling=Sampling(seed=slot))
        for slot in (0, 1, 3)
    ]
    sequence = new(2, PROMPT, [30, 31, 32], sampling=SAMPLING, index=3)
    result = steps.run(new_sequences=[*mates, sequence], chunk_slots=[2, 0, 1, 3], chunk_tokens=[10, 1, 2, 4])
    tokens = [result.token_ids[0]]
    tokens.append(steps.run(decode_add=[1, 2, 0, 3]).token_ids[1])
    steps.run(release_slots=[2])
    resumed = new(2, PROMPT + tokens, [33, 34, 35, 36, 37], prompt_tokens=10, sampling=SAMPLING, index=3)
    tokens.append(steps.run(new_sequences=[resumed], chunk_slots=[2], chunk_tokens=[12]).token_ids[3])
    tokens.append(steps.run(decode_add=[2]).token_ids[-1])
    tokens.append(steps.run().token_ids[-1])
    tokens.append(steps.run(release_slots=[0]).token_ids[-1])
    tokens += [steps.run().token_ids[-1] for _ in range(2)]
    assert tokens == expected


def test_logprobs_are_raw_and_belong_to_their_rows() -> None:
    model = ToyModel()
    _, steps = start(model)
    hot = Sampling(temperature=5.0, seed=1, logit_bias=((4, 3.0),))
    result = steps.run(
        new_sequences=[new(0, PROMPT, [0, 1, 2]), new(1, PROMPT[:4], [3], sampling=hot, logprobs=3)],
        chunk_slots=[0, 1],
        chunk_tokens=[10, 4],
    )
    assert result.logprob_rows == [1]
    expected = model.dense_logits(PROMPT[:4])[-1].log_softmax(-1)
    order = expected.argsort(descending=True)
    entry = result.logprobs[0]
    assert entry.logprob == pytest.approx(expected[result.token_ids[1]].item(), abs=1e-5)
    assert entry.rank == order.tolist().index(result.token_ids[1]) + 1
    assert list(entry.top_ids) == order[:3].tolist()
    assert list(entry.top_logprobs) == pytest.approx(expected[order[:3]].tolist(), abs=1e-5)


@pytest.mark.parametrize("chunks", [[10], [1, 9], [4, 4, 2]])
def test_prompt_logprobs_cover_every_prompt_token_but_the_first(chunks: list[int]) -> None:
    model = ToyModel()
    _, steps = start(model)
    expected = model.dense_logits(PROMPT).log_softmax(-1)
    fields: dict[str, Any] = {"new_sequences": [new(6, PROMPT, [0, 1, 2], prompt_logprobs=2)]}
    position = 1
    for chunk in chunks:
        result = steps.run(chunk_slots=[6], chunk_tokens=[chunk], **fields)
        fields = {}
        (entry,) = result.prompt_logprobs
        assert (entry.slot, entry.first_token) == (6, position)
        for logprobs in entry.logprobs:
            row = expected[position - 1]
            assert logprobs.logprob == pytest.approx(row[PROMPT[position]].item(), abs=1e-5)
            assert list(logprobs.top_ids) == row.argsort(descending=True)[:2].tolist()
            position += 1
    assert position == len(PROMPT)


def test_prompt_logprobs_do_not_cover_recomputed_output() -> None:
    model = ToyModel()
    _, steps = start(model)
    resumed = new(0, [*PROMPT, 4, 5], [0, 1, 2], prompt_tokens=10, prompt_logprobs=0)
    (entry,) = steps.run(new_sequences=[resumed], chunk_slots=[0], chunk_tokens=[12]).prompt_logprobs
    assert len(entry.logprobs) == 9


def test_min_tokens_keeps_stop_tokens_out_until_then() -> None:
    model = ToyModel()
    _, steps = start(model)
    wanted = model.greedy(PROMPT, 1)[0]
    sequence = new(0, PROMPT, [0, 1, 2, 3], min_tokens=2, stop_token_ids=[wanted, 1])
    tokens = list(steps.run(new_sequences=[sequence], chunk_slots=[0], chunk_tokens=[10]).token_ids)
    logits = model.dense_logits(PROMPT)[-1]
    logits[[wanted, 1]] = -math.inf
    assert tokens == [int(logits.argmax())]
    tokens += steps.run(decode_add=[0]).token_ids
    logits = model.dense_logits(PROMPT + tokens[:1])[-1]
    logits[[wanted, 1]] = -math.inf
    assert tokens[1] == int(logits.argmax())
    tokens += steps.run().token_ids
    assert tokens[2] == int(model.dense_logits(PROMPT + tokens[:2])[-1].argmax())


def test_rows_that_are_not_finite_are_named_and_the_others_unharmed() -> None:
    model = ToyModel()
    model.poisoned_token = 39
    _, steps = start(model)
    result = steps.run(
        new_sequences=[new(0, PROMPT, [0, 1, 2]), new(1, [5, 39], [3]), new(2, PROMPT[:3], [4])],
        chunk_slots=[0, 1, 2],
        chunk_tokens=[10, 2, 3],
    )
    assert result.nonfinite_rows == [1]
    assert [result.token_ids[0], result.token_ids[2]] == [model.greedy(PROMPT, 1)[0], model.greedy(PROMPT[:3], 1)[0]]


def test_reset_empties_the_batch_for_a_new_epoch() -> None:
    model = ToyModel()
    executor, steps = start(model)
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[10])
    steps.run(decode_add=[0])
    executor.reset()
    executor.batch.check_integrity()
    assert executor.batch.decode_slots.size == 0
    assert prefill_and_decode(Steps(executor), 0, PROMPT, [2, 1, 0, 5], 4) == model.greedy(PROMPT, 4)


def running(steps: Steps) -> None:
    """Row 0 decodes, row 1 has 4 of 6 tokens computed; blocks 0..4 are theirs."""
    steps.run(
        new_sequences=[new(0, PROMPT, [0, 1, 2]), new(1, PROMPT[:6], [3, 4])],
        chunk_slots=[0, 1],
        chunk_tokens=[10, 4],
    )
    steps.run(decode_add=[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"release_slots": [5]}, "release_slots"),
        ({"release_slots": [8]}, "release_slots"),
        ({"new_sequences": [new(0, [1], [9])]}, "not empty"),
        ({"new_sequences": [new(8, [1], [9])]}, "slot 8"),
        ({"new_sequences": [new(2, [], [9], prompt_tokens=1)]}, "computed of 0 tokens"),
        ({"new_sequences": [new(2, [1], [40])]}, "blocks of a pool of 40"),
        ({"new_sequences": [new(2, [VOCAB], [9])]}, "vocabulary"),
        ({"new_sequences": [new(2, [1, 2], [9], computed_tokens=2)]}, "2 computed of 2"),
        ({"new_sequences": [new(2, [1] * 6, [9], computed_tokens=5)]}, "cannot hold"),
        ({"new_sequences": [new(2, [1] * (MAX_MODEL_LEN + 1), [9])]}, "65 tokens"),
        ({"new_sequences": [new(2, [1], [9], min_tokens=1, stop_token_ids=[VOCAB])]}, "stop or bias"),
        ({"append_slots": [0, 0], "append_blocks": [9]}, "append"),
        ({"append_slots": [0], "append_blocks": [40]}, "blocks of a pool of 40"),
        ({"append_slots": [7], "append_blocks": [9]}, "append_slots"),
        ({"append_slots": [0] * 14, "append_blocks": list(range(5, 19))}, "beyond max_model_len"),
        ({"replace_slots": [0], "replace_indices": [3], "replace_blocks": [9]}, "replace_indices"),
        ({"replace_slots": [0], "replace_indices": [0], "replace_blocks": []}, "replace"),
        ({"decode_remove": [1]}, "decode_remove"),
        ({"decode_add": [0]}, "in the decode set already"),
        ({"decode_add": [1]}, "not computed yet"),
        ({"chunk_slots": [1], "chunk_tokens": [3]}, "a chunk of 3 tokens, 4 of 6"),
        ({"chunk_slots": [1], "chunk_tokens": [0]}, "a chunk of 0 tokens"),
        ({"chunk_slots": [0], "chunk_tokens": [1]}, "decode set"),
        ({"chunk_slots": [1, 1], "chunk_tokens": [1, 1]}, "twice"),
        ({"new_sequences": [new(2, [1] * 60, [9])], "chunk_slots": [2], "chunk_tokens": [60]}, "no room"),
        (
            {"new_sequences": [new(2, [1] * 64, list(range(5, 21)))], "chunk_slots": [2], "chunk_tokens": [64]},
            "65 tokens",
        ),
        ({"forks": [Fork(1, 2, 1)], "chunk_slots": [1], "chunk_tokens": [1]}, "last chunk"),
        ({"forks": [Fork(1, 0, 1)], "chunk_slots": [1], "chunk_tokens": [2]}, "not empty"),
        ({"swap_out": BlockMoves([0], [20])}, "swap_out"),
        ({"swap_in": BlockMoves([0, 1], [9, 9])}, "appears twice"),
        ({"copies": BlockMoves([0, 1], [9])}, "2 sources, 1 destinations"),
        ({"copies": BlockMoves([], [9])}, "0 sources, 1 destinations"),
    ],
)
def test_a_plan_that_contradicts_the_batch_is_refused_loudly(fields: dict[str, Any], message: str) -> None:
    _, steps = start(ToyModel())
    running(steps)
    with pytest.raises(PlanError, match=message):
        steps.run(**fields)


def test_the_next_step_may_be_launched_before_a_result_is_read() -> None:
    model = ToyModel()
    executor, steps = start(model)
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2, 3], logprobs=1)], chunk_slots=[0], chunk_tokens=[10])
    launched = [executor.launch(StepPlan(epoch=1, step=2, decode_add=[0]))]
    launched += [executor.launch(StepPlan(epoch=1, step=step)) for step in (3, 4)]
    assert executor.progress.last_step == 1, "launched is not finished"
    results = [step.result() for step in launched]
    assert [result.token_ids[0] for result in results] == model.greedy(PROMPT, 4)[1:]
    assert [list(result.logprobs[0].top_ids) for result in results] == [list(result.token_ids) for result in results]
    assert executor.progress.last_step == 4


def test_a_step_says_how_early_its_plan_was() -> None:
    executor, steps = start(ToyModel())
    running(steps)
    assert executor.launch(StepPlan(epoch=1, step=3), waited_ns=5).result().timings.early_ns == 5, "it was in the inbox"


def test_on_a_device_that_runs_behind_the_host_a_plan_is_early_if_it_was_launched_before_the_step_before_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor, steps = start(ToyModel())
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2, 3])], chunk_slots=[0], chunk_tokens=[10])
    monkeypatch.setattr(type(executor.runtime), "runs_ahead", True)
    ahead = [executor.launch(StepPlan(epoch=1, step=2, decode_add=[0])), executor.launch(StepPlan(epoch=1, step=3))]
    assert [step.result() for step in ahead][1].timings.early_ns > 0
    late = executor.launch(StepPlan(epoch=1, step=4)).result()
    assert late.timings.early_ns == 0


def test_a_step_that_ends_after_its_epoch_is_not_progress_of_the_next() -> None:
    executor, steps = start(ToyModel())
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[10])
    launched = executor.launch(StepPlan(epoch=1, step=2, decode_add=[0]))
    executor.reset()
    launched.result()
    assert executor.progress.last_step == 0


def test_a_result_is_computed_once_and_remembered() -> None:
    executor, steps = start(ToyModel())
    running(steps)
    launched = executor.launch(StepPlan(epoch=1, step=3))
    assert launched.result() is launched.result()
    assert len(launched.result().token_ids) == 1


def test_rows_that_continue_beams_are_copies_of_their_parents_with_the_chosen_tokens() -> None:
    model = ToyModel()
    _, steps = start(model)
    asked = new(2, PROMPT, [0, 1, 2], logprobs=5)
    offers = steps.run(new_sequences=[asked], chunk_slots=[2], chunk_tokens=[10]).logprobs
    expected = model.dense_logits(PROMPT)[-1].log_softmax(-1).topk(5)
    assert list(offers[0].top_ids) == expected.indices.tolist()
    assert list(offers[0].top_logprobs) == pytest.approx(expected.values.tolist(), abs=1e-5)
    # Three beams; rows 2 and 4 share block 2, which is copied for row 4 and for row 0.
    steps.run(
        beam_slots=[2, 4, 0],
        beam_parents=[2, 2, 2],
        beam_tokens=[7, 8, 9],
        copies=BlockMoves([2, 2], [3, 4]),
        replace_slots=[4, 0],
        replace_indices=[2, 2],
        replace_blocks=[3, 4],
        decode_add=[2, 4, 0],
    )
    # The first row's beam dies, the two others change places, and one of them has a second child.
    result = steps.run(
        decode_remove=[2, 4, 0],
        beam_slots=[0, 4, 2],
        beam_parents=[4, 0, 0],
        beam_tokens=[11, 12, 13],
        copies=BlockMoves([4], [5]),
        replace_slots=[2],
        replace_indices=[2],
        replace_blocks=[5],
        decode_add=[0, 4, 2],
    )
    for offer, tokens in zip(result.logprobs, ([8, 11], [9, 12], [9, 13]), strict=True):
        expected = model.dense_logits(PROMPT + tokens)[-1].log_softmax(-1).topk(5)
        assert list(offer.top_ids) == expected.indices.tolist()
        assert list(offer.top_logprobs) == pytest.approx(expected.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_slots": [0], "beam_parents": [1], "beam_tokens": [5]}, "rows in use"),
        ({"beam_slots": [1, 1], "beam_parents": [0, 0], "beam_tokens": [5, 6]}, "appears twice"),
        ({"beam_slots": [8], "beam_parents": [0], "beam_tokens": [5]}, "is no row"),
        ({"beam_slots": [1], "beam_parents": [0], "beam_tokens": [VOCAB]}, "beyond the vocabulary"),
        ({"beam_slots": [1], "beam_parents": [3], "beam_tokens": [5]}, "not computed yet"),
        ({"beam_slots": [1], "beam_parents": [0]}, "lists of"),
    ],
)
def test_beams_that_contradict_the_rows_are_refused(fields: dict[str, Any], message: str) -> None:
    _, steps = start(ToyModel())
    both = [new(0, PROMPT, [0, 1, 2]), new(3, PROMPT, [3, 4, 5])]
    steps.run(new_sequences=both, chunk_slots=[0, 3], chunk_tokens=[10, 4])
    with pytest.raises(PlanError, match=message):
        steps.run(**fields)
