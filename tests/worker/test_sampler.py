from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kernels import reference
from worker.device import CpuRuntime
from worker.sampler import Sampled, Sampler, describe_logprobs
from worker.sampling_state import INDEX, SamplingState
from worker.step import Fork, NewSequence, Sampling
from worker.upload import Upload

VOCAB = 50
GREEDY = Sampling(temperature=0.0)


def change(action: Callable[[Upload], object]) -> None:
    """What one step changes, sent and done."""
    upload = Upload(CpuRuntime())
    action(upload)
    upload.send()
    upload.apply()


def make_sampler(*sequences: NewSequence, max_slots: int = 64) -> Sampler:
    state = SamplingState(max_slots, VOCAB, torch.device("cpu"))
    change(lambda upload: state.fill(sequences, upload))
    return Sampler(state, reference)


def new(slot: int, sampling: Sampling = GREEDY, **fields: Any) -> NewSequence:
    fields = {"token_ids": [1], "prompt_tokens": 1, "computed_tokens": 0, "blocks": [], **fields}
    return NewSequence(slot=slot, sampling=sampling, **fields)


def sample(sampler: Sampler, logits: torch.Tensor, slots: list[int], output_lens: list[int]) -> Sampled:
    upload = Upload(CpuRuntime())
    plan = sampler.plan(np.array(slots), np.array(output_lens), upload)
    upload.send()
    return sampler.sample(logits.clone(), torch.tensor(slots), torch.tensor(output_lens), plan)


def leader(*tokens: int) -> torch.Tensor:
    """One row of logits: the named tokens lead in this order, by one each."""
    logits = torch.zeros(1, VOCAB)
    for place, token in enumerate(tokens):
        logits[0, token] = 10.0 - place
    return logits


def test_temperatures_below_1e_5_are_greedy() -> None:
    sampler = make_sampler(new(0, Sampling(temperature=9e-6)), new(1, Sampling(temperature=0.0)))
    assert not sampler.state.random.any()
    assert sample(sampler, leader(7, 3).expand(2, -1), [0, 1], [0, 0]).token_ids.tolist() == [7, 7]


def test_greedy_rows_are_untouched_by_the_random_and_penalised_rows_beside_them() -> None:
    rows = [new(slot) for slot in range(0, 20, 2)]
    hot = Sampling(temperature=2.0, seed=4, repetition_penalty=1.5, logit_bias=((3, 5.0),))
    rows += [new(slot, hot, min_tokens=3, stop_token_ids=[9]) for slot in range(1, 20, 2)]
    sampler = make_sampler(*rows)
    logits = torch.randn(20, VOCAB)
    token_ids = sample(sampler, logits, list(range(20)), [0] * 20).token_ids
    assert token_ids[::2].equal(logits[::2].argmax(-1))


def test_draws_depend_on_seed_index_and_position_but_not_on_the_slot_or_the_batch() -> None:
    flat = torch.zeros(1, VOCAB)

    def token(slot: int, position: int, seed: int = 5, index: int = 0) -> int:
        sampler = make_sampler(new(slot, Sampling(seed=seed), index=index))
        return int(sample(sampler, flat, [slot], [position]).token_ids[0])

    sequence = [token(0, position) for position in range(20)]
    assert [token(33, position) for position in range(20)] == sequence
    assert [token(0, position, seed=6) for position in range(20)] != sequence
    assert [token(0, position, index=1) for position in range(20)] != sequence
    batch = make_sampler(*(new(slot, Sampling(seed=5)) for slot in range(20)))
    assert sample(batch, flat.expand(20, -1), list(range(20)), list(range(20))).token_ids.tolist() == sequence


def test_sampled_tokens_follow_the_distribution() -> None:
    count = 20_000
    logits = torch.randn(1, VOCAB) * 1.5
    sampler = make_sampler(new(0, Sampling(temperature=0.7, seed=11)))
    expected = torch.softmax(logits[0].double() / 0.7, 0) * count
    observed = torch.zeros(VOCAB)
    for first in range(0, count, 2000):
        positions = list(range(first, first + 2000))
        token_ids = sample(sampler, logits.expand(2000, -1), [0] * 2000, positions).token_ids
        observed += torch.bincount(token_ids, minlength=VOCAB)
    common = expected >= 5
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum().item()
    degrees = int(common.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
    assert observed[~common].sum() < 2 * expected[~common].sum() + 10


def test_repetition_penalty_sees_prompt_and_output() -> None:
    penalty = Sampling(temperature=0.0, repetition_penalty=2.0)
    sampler = make_sampler(new(0, penalty, token_ids=[7, 3], prompt_tokens=1))
    assert sample(sampler, leader(7, 3, 4), [0], [1]).token_ids.tolist() == [4]


@pytest.mark.parametrize("sampling", [Sampling(0.0, presence_penalty=1.5), Sampling(0.0, frequency_penalty=1.5)])
def test_presence_and_frequency_penalties_see_the_output_only(sampling: Sampling) -> None:
    sampler = make_sampler(new(0, sampling, token_ids=[7, 7, 7, 3], prompt_tokens=3))
    assert sample(sampler, leader(7, 3, 4), [0], [1]).token_ids.tolist() == [7]
    # Now 7 is in the output too, once, like 3: the leader falls behind 4 only by frequency or presence of one each.
    assert sample(sampler, leader(7, 4, 3), [0], [2]).token_ids.tolist() == [4]


def test_frequency_penalty_grows_with_every_sampled_token() -> None:
    sampler = make_sampler(new(0, Sampling(0.0, frequency_penalty=0.4)))
    chosen = [int(sample(sampler, leader(7, 8), [0], [position]).token_ids[0]) for position in range(6)]
    # 7 leads by 1.0: it is taken until it was seen three times, then both take turns.
    assert chosen == [7, 7, 7, 8, 7, 8]


def test_a_refilled_slot_forgets_what_occurred_before() -> None:
    penalty = Sampling(temperature=0.0, repetition_penalty=5.0)
    sampler = make_sampler(new(0, penalty, token_ids=[7]))
    sample(sampler, leader(3), [0], [0])
    change(lambda upload: sampler.state.fill([new(0, penalty, token_ids=[2])], upload))
    assert sample(sampler, leader(7, 3), [0], [0]).token_ids.tolist() == [7]


def test_occurrence_tables_are_not_allocated_until_a_row_is_penalised() -> None:
    sampler = make_sampler(new(0), new(1, Sampling(seed=1, logit_bias=((3, 1.0),))))
    sample(sampler, torch.randn(2, VOCAB), [0, 1], [0, 0])
    assert sampler.state.output_counts is None
    change(lambda upload: sampler.state.fill([new(2, Sampling(presence_penalty=0.1))], upload))
    assert sampler.state.output_counts is not None


def test_a_fork_inherits_parameters_and_occurrences_and_goes_its_own_way() -> None:
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0, logit_bias=((20, 9.5),))
    sampler = make_sampler(new(0, sampling, token_ids=[7], min_tokens=2, stop_token_ids=[8]))
    change(lambda upload: sampler.state.fork([Fork(0, 5, 1)], upload.put([0]), upload.put([5]), upload))
    assert sampler.state.numbers[INDEX, [0, 5]].tolist() == [0, 1]
    rows = torch.cat((leader(7, 8, 9), leader(7, 8, 9)))
    # 7 is in the prompt, 8 is forbidden, 20 has its bias.
    assert sample(sampler, rows, [0, 5], [0, 0]).token_ids.tolist() == [20, 20]
    sample(sampler, leader(30), [5], [1])
    rows = torch.cat((leader(30), leader(30))).clamp(max=6.0)
    rows[:, 20] = -20.0
    rows[:, 31] = 5.0
    assert sample(sampler, rows, [0, 5], [2, 2]).token_ids.tolist() == [30, 31]


def test_logit_bias_decides_and_bans() -> None:
    biased = Sampling(temperature=0.0, logit_bias=((7, -100.0), (20, 9.5)))
    sampler = make_sampler(new(0, biased), new(1, Sampling(temperature=0.0, logit_bias=((4, 20.0),))), new(2))
    assert sample(sampler, leader(7, 8).repeat(3, 1), [0, 1, 2], [0, 0, 0]).token_ids.tolist() == [20, 4, 7]


def test_stop_tokens_are_masked_only_below_min_tokens() -> None:
    sampler = make_sampler(new(0, min_tokens=2, stop_token_ids=[7, 8]), new(1))
    rows = leader(7, 8, 9).repeat(2, 1)
    assert sample(sampler, rows, [0, 1], [1, 1]).token_ids.tolist() == [9, 7]
    assert sample(sampler, rows, [0, 1], [2, 2]).token_ids.tolist() == [7, 7]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(poison: float) -> None:
    rows = [new(slot, Sampling(seed=slot, top_p=0.9, temperature=1.2)) for slot in range(3)]
    logits = torch.randn(3, VOCAB)
    expected = sample(make_sampler(*rows), logits, [0, 1, 2], [0, 0, 0])
    assert (expected.encoded >= 0).all()
    logits[1, 17] = poison
    sampled = sample(make_sampler(*rows), logits, [0, 1, 2], [0, 0, 0])
    assert (sampled.encoded >= 0).tolist() == [True, False, True]
    assert (sampled.encoded < 0).tolist() == [False, True, False]
    assert sampled.token_ids[[0, 2]].equal(expected.token_ids[[0, 2]])
    assert 0 <= int(sampled.token_ids[1]) < VOCAB


def test_logprobs_are_given_to_the_rows_that_asked() -> None:
    sampler = make_sampler(new(0), new(1, logprobs=0), new(2, logprobs=2))
    plan = sampler.plan(np.arange(3), np.zeros(3, dtype=np.int64), Upload(CpuRuntime()))
    assert (list(plan.logprob_rows), list(plan.num_top)) == ([1, 2], [0, 2])
    sampled = sample(sampler, leader(7, 8, 9).repeat(3, 1), [0, 1, 2], [0, 0, 0])
    assert sampled.logprobs is not None
    entries = describe_logprobs(sampled.logprobs, plan.num_top)
    assert [list(entry.top_ids) for entry in entries] == [[], [7, 8]]
    assert [entry.rank for entry in entries] == [1, 1]
