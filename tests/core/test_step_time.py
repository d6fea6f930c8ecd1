"""What is learned about the time of a step, and how many prompt tokens fit into one."""

from __future__ import annotations

import random

import pytest

from scheduler.dispatcher import SchedulerConfig, TransferRates
from scheduler.step_time import LEAST_CHUNK, StepTime
from tests.core.factories import OneWorker


def taught(seed: int, steps: int = 300) -> StepTime:
    """Has seen steps of 3 ms + 10 us per decode + 25 us per chunk token, a fifth of them 3 % off."""
    dice, learned = random.Random(seed), StepTime()
    for _ in range(steps):
        decodes, chunk = dice.randint(1, 200), dice.choice([0, 0, dice.randint(1, 800)])
        exact = 3_000_000 + 10_000 * decodes + 25_000 * chunk
        learned.observe(decodes, chunk, round(exact * dice.choice([0.97, 1, 1, 1, 1.03])))
    return learned


@pytest.mark.parametrize("seed", range(5))
def test_the_three_costs_are_told_apart(seed: int) -> None:
    learned = taught(seed)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.02)
    assert learned.ns(100, 0) == pytest.approx(4_000_000, rel=0.02)
    assert learned.ns(50, 400) == pytest.approx(13_500_000, rel=0.02)


def test_decode_time_is_not_on_the_prompts_bill() -> None:
    learned = StepTime()
    for chunk in (100, 300, 200, 400):
        learned.observe(256, 0, 8_000_000)
        learned.observe(256, chunk, 8_000_000 + 25_000 * chunk)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.01)


def test_what_decodes_alone_cost_is_known_although_every_step_was_full_of_prompts() -> None:
    def took(decodes: int, chunk: int) -> int:
        return 3_000_000 + 10_000 * decodes + 25_000 * chunk

    learned = StepTime(prefill_tokens_per_second=40_000)
    for decodes in (80, 82, 85, 81, 90, 84) * 20:
        learned.observe(decodes, 2048 - decodes, took(decodes, 2048 - decodes))
    # All steps are of one size, which hardly tells decodes and prompts apart; shorter ones, once they are made, do.
    assert 0 < learned.ns(83, 0) < 1.5 * took(83, 0)
    for _ in range(50):
        chunk = learned.chunk_budget(1965, round(2 * learned.ns(83, 0)), 83)
        assert chunk < 300
        learned.observe(83, chunk, took(83, chunk))
    assert learned.ns(83, 0) == pytest.approx(took(83, 0), rel=0.05)
    learned.observe(83, 0, 4_500_000)
    assert learned.ns(83, 0) == pytest.approx(4_500_000, rel=0.01), "what has been seen counts"


def test_one_slow_step_changes_little() -> None:
    learned = taught(0)
    learned.observe(100, 500, 30_000_000_000)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.05)


def test_days_of_decode_do_not_wear_away_what_is_known_about_prefill() -> None:
    learned = taught(0)
    for _ in range(10_000):
        learned.observe(100, 0, 4_000_000)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.03)


def test_steps_that_only_prefill_count_as_prefill() -> None:
    learned = StepTime()
    for _ in range(10):
        learned.observe(0, 2048, 51_200_000)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.01)


def test_the_start_rate_holds_until_a_chunk_has_been_computed() -> None:
    assert StepTime().prefill_tokens_per_second == 0
    learned = StepTime(40_000)
    learned.observe(100, 0, 4_000_000)
    learned.observe(100, 10, 0)  # a worker that measures nothing teaches nothing
    assert learned.prefill_tokens_per_second == pytest.approx(40_000)


def test_no_coefficient_is_negative_whatever_the_steps_were() -> None:
    dice = random.Random(1)
    for _ in range(200):
        learned = StepTime(dice.choice([0.0, 1000.0]))
        for _ in range(dice.randint(1, 20)):
            learned.observe(dice.choice([0, 1, 300]), dice.choice([0, 1, 5000]), dice.randint(1, 10**9))
            assert learned.ns(0, 0) >= 0
            assert learned.ns(10, 10) <= learned.ns(11, 10) <= learned.ns(11, 11)
            assert learned.prefill_tokens_per_second >= 0


def test_the_chunk_that_fits_is_what_the_target_leaves() -> None:
    learned = taught(0)
    assert learned.chunk_budget(2048, 9_000_000, 100) == pytest.approx(200, abs=8)
    assert learned.chunk_budget(150, 9_000_000, 100) == 150
    assert learned.chunk_budget(2048, 3_500_000, 100) == LEAST_CHUNK  # decoding alone takes longer
    assert learned.chunk_budget(2048, 3_500_000, 0) == 2048  # nobody waits for a token
    assert StepTime().chunk_budget(2048, 1, 100) == 2048


def test_where_any_chunk_is_dear_prompts_are_not_cut_into_more_dear_steps() -> None:
    dice, learned = random.Random(3), StepTime()
    for _ in range(300):  # a step with a chunk is launched kernel by kernel: 8 ms more, whatever the chunk
        decodes, chunk = dice.randint(10, 60), dice.choice([0, 0, dice.randint(1, 800)])
        learned.observe(decodes, chunk, 5_000_000 + 10_000 * decodes + (8_000_000 + 25_000 * chunk) * (chunk > 0))
    assert learned.first_chunk_ns(50) == pytest.approx(8_000_000, rel=0.02)
    assert learned.prefill_tokens_per_second == pytest.approx(40_000, rel=0.02)
    assert learned.ns(50, 0) == pytest.approx(5_500_000, rel=0.01)
    assert learned.ns(50, 100) == pytest.approx(16_000_000, rel=0.01)
    # 12 ms are out of reach of any chunk: 320 tokens cost 8 ms once more. 30 ms leave more than that.
    assert learned.chunk_budget(2048, 12_000_000, 50) == pytest.approx(320, abs=10)
    assert learned.chunk_budget(2048, 30_000_000, 50) == pytest.approx(660, abs=10)


def test_a_prompt_beside_decodes_is_cut_to_the_target_and_alone_it_is_not() -> None:
    # The simulated worker takes a microsecond per token; the target leaves room for LEAST_CHUNK at least.
    config = SchedulerConfig(token_budget=1024, target_itl_ns=100_000, prefix_cache=False, watermark=0.0, headroom=0.0)
    rates = TransferRates(prefill_tokens_per_second=1_000_000)
    service = OneWorker(config, rates, num_blocks=2000, max_step_tokens=1024)
    service.submit("a", [1] * 500, max_tokens=200)
    assert service.step().chunk_tokens == [500]
    for _ in range(3):
        service.step()
    service.submit("b", [2] * 500)
    chunk = service.step().chunk_tokens[0]
    assert LEAST_CHUNK <= chunk <= 105
    service.run_until_idle()
