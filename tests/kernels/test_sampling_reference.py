from __future__ import annotations

import math

import pytest
import torch

from kernels import reference
from kernels.reference import sampling
from kernels.reference.philox import token_uniforms

NEVER = float("-inf")


def draw_from(
    logits: list[float] | torch.Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 3,
) -> torch.Tensor:
    """Tokens drawn at positions 0, 1, ... from one row of logits, or from one row each: int64 [count]."""
    return reference.sample(
        torch.as_tensor(logits, dtype=torch.float32).expand(count, -1),
        torch.full((count,), temperature),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        torch.full((count,), seed),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
    )


def kept(logits: list[float], **limits: float) -> set[int]:
    """The tokens that can be drawn at all."""
    return set(draw_from(logits, 2000, **limits).tolist())  # type: ignore[arg-type]


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def shares(logits: list[float], temperature: float) -> list[float]:
    count = 20_000
    drawn = draw_from(logits, count, temperature=temperature)
    return [share / count for share in torch.bincount(drawn, minlength=len(logits)).tolist()]


def test_a_draw_is_the_largest_sum_of_logit_over_temperature_and_noise() -> None:
    logits = torch.randn(37)
    seeds, zeros, positions = (torch.full((37,), value) for value in (3, 0, 5))
    noise = [-math.log(-math.log(u)) for u in token_uniforms(seeds, zeros, positions, torch.arange(37)).tolist()]
    sums = [logit / 0.5 + own for logit, own in zip(logits.tolist(), noise, strict=True)]
    assert draw_from(logits, 6, temperature=0.5)[5] == sums.index(max(sums))


def test_of_equal_sums_the_lowest_id_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_gumbel", torch.zeros_like)
    assert draw_from([1.0, 2.0, 2.0, 2.0], 1).tolist() == [1]
    assert draw_from([1.0] + [2.0] * 20, 1, top_k=3).tolist() == [1]


def test_temperature_divides_the_logits() -> None:
    # At temperature 0.5 probabilities are squared: 1/17 and 16/17; at 2 they are square roots: 1/3 and 2/3.
    # Five standard deviations of a share of 20,000 draws are at most 0.018.
    assert shares(log(0.2, 0.8), 0.5) == pytest.approx([1 / 17, 16 / 17], abs=0.018)
    assert shares(log(0.2, 0.8), 1.0) == pytest.approx([0.2, 0.8], abs=0.018)
    assert shares(log(0.2, 0.8), 2.0) == pytest.approx([1 / 3, 2 / 3], abs=0.018)


@pytest.mark.parametrize("noise", ["every token its own", "one half up, the other down"])
def test_noise_in_the_logits_hardly_ever_changes_a_draw(noise: str) -> None:
    rows, vocab, size = 500, 4096, 2e-6
    halves = torch.where(torch.arange(vocab) < vocab // 2, size, -size)
    changed = 0
    for seed in range(12):
        logits = (torch.randn(vocab) * 0.5).expand(rows, -1)
        nearly = logits + (halves if noise.startswith("one half") else torch.randn(rows, vocab) * size)
        changed += int((draw_from(logits, rows, seed=seed) != draw_from(nearly, rows, seed=seed)).sum())
    assert changed <= 1  # of 6,000; a walk along cumulative sums changes a dozen where halves move against one another


def test_top_k_keeps_exactly_k_tokens_and_of_equal_ones_the_lower_ids() -> None:
    assert kept(log(0.1, 0.2, 0.3, 0.4), top_k=2) == {2, 3}
    assert kept([1.0, 1.0, 1.0, 1.0], top_k=3) == {0, 1, 2}
    assert kept([0.0, 5.0, 5.0], top_k=1) == {1}
    assert kept(log(0.5, 0.5), top_k=7) == {0, 1}
    assert kept([0.0, -0.0, -0.0], top_k=2) == {0, 1}


def test_top_p_keeps_the_shortest_likeliest_prefix_that_reaches_it() -> None:
    logits = log(0.15, 0.4, 0.25, 0.2)
    assert kept(logits, top_p=0.39) == {1}
    assert kept(logits, top_p=0.41) == {1, 2}
    assert kept(logits, top_p=0.64) == {1, 2}
    assert kept(logits, top_p=0.66) == {1, 2, 3}
    assert kept(logits, top_p=1.0) == {0, 1, 2, 3}
    assert kept(logits, top_p=1e-9) == {1}


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    # Of the top two, 0.4 and 0.2, the likeliest has two thirds.
    assert kept(log(0.4, 0.2, 0.2, 0.2), top_k=2, top_p=0.6) == {0}
    assert kept(log(0.4, 0.2, 0.2, 0.2), top_k=2, top_p=0.7) == {0, 1}


def test_min_p_is_relative_to_the_likeliest_token() -> None:
    assert kept(log(0.5, 0.26, 0.24), min_p=0.5) == {0, 1}
    assert kept(log(0.5, 0.26, 0.24), min_p=1.0) == {0}
    assert kept(log(0.5, 0.26, 0.24), min_p=0.1) == {0, 1, 2}


def test_an_impossible_token_is_never_drawn() -> None:
    logits = [NEVER, 0.0, NEVER, 0.0, NEVER]
    assert kept(logits) == {~1, ~3}, "and that the row is not finite is said, too"
    assert kept(logits, top_k=4) == {~1, ~3}


@pytest.mark.parametrize(
    "limits", [{"top_k": 1500}, {"top_p": 0.999}, {"top_k": 4000, "top_p": 0.9}, {"min_p": 1e-4}, {"top_k": 3000}]
)
def test_kept_sets_larger_than_the_candidates_equal_a_full_sort(
    limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(5000)
    narrow = draw_from(logits, 301, **limits)  # type: ignore[arg-type]
    monkeypatch.setattr(sampling, "_CANDIDATES", 5000)
    assert draw_from(logits, 301, **limits).equal(narrow)  # type: ignore[arg-type]


def test_a_row_samples_the_same_alone_and_beside_others() -> None:
    rows = 40
    logits = torch.randn(rows, 3000)
    temperature, top_k = torch.rand(rows) + 0.5, torch.randint(0, 2500, (rows,))
    top_p, min_p = torch.rand(rows) * 0.5 + 0.5, torch.rand(rows) * 0.01
    seeds, indices, positions = (torch.randint(0, 1 << bits, (rows,)) for bits in (62, 7, 40))
    columns = (logits, temperature, top_k, top_p, min_p, seeds, indices, positions)
    together = reference.sample(*columns)
    for row in range(rows):
        alone = reference.sample(*(column[row : row + 1] for column in columns))
        assert alone.item() == together[row].item()


@pytest.mark.parametrize("vocab", [50, 12])
def test_samples_follow_the_distribution_that_is_left(vocab: int) -> None:
    count = 20_000  # of 50 tokens the ten kept ones get their noise one by one, of 12 all get theirs
    logits = torch.randn(vocab)
    probabilities = torch.softmax(logits.double() / 0.8, 0)
    top = probabilities.topk(10).indices
    expected = torch.zeros(vocab, dtype=torch.float64)
    expected[top] = probabilities[top] / probabilities[top].sum() * count
    observed = torch.bincount(draw_from(logits, count, temperature=0.8, top_k=10), minlength=vocab)
    assert observed[expected == 0].sum() == 0
    chi_square = ((observed[top] - expected[top]) ** 2 / expected[top]).sum().item()
    assert chi_square < 27.9  # the 99.9th percentile of chi-square with 9 degrees of freedom


@pytest.mark.parametrize("limits", [{}, {"top_k": 10}, {"top_p": 0.9}])
def test_a_draw_from_a_row_that_is_not_finite_is_a_token_all_the_same(limits: dict[str, float]) -> None:
    logits = torch.zeros(4, 100)
    logits[0] = math.nan
    logits[1] = NEVER
    logits[2, 5] = math.inf
    logits[3, ::3] = math.nan
    assert all(0 <= ~token < 100 for token in draw_from(logits, 4, **limits).tolist())  # type: ignore[arg-type]


def test_penalties_lower_what_has_occurred() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
    prompt_seen = torch.tensor([[True, True, False, False, False]])
    output_counts = torch.tensor([[0, 0, 1, 3, 0]], dtype=torch.int32)
    one, zero = torch.ones(1), torch.zeros(1)

    def penalised(repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor) -> list[float]:
        rows = reference.apply_penalties(logits, prompt_seen, output_counts, repetition, presence, frequency)
        return rows[0].tolist()

    assert penalised(one, zero, zero) == [2, -2, 2, -2, 2]
    assert penalised(2 * one, zero, zero) == [1, -4, 1, -4, 2]
    assert penalised(one, 0.5 * one, zero) == [2, -2, 1.5, -2.5, 2]
    assert penalised(one, zero, 0.5 * one) == [2, -2, 1.5, -3.5, 2]
    assert penalised(2 * one, one, 0.5 * one) == [1, -4, -0.5, -6.5, 2]


def test_bias_and_masks_reach_their_cells_only() -> None:
    logits = torch.zeros(2, 3)
    reference.add_logit_bias(logits, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]), torch.tensor([1.0, -2.0, 3.0]))
    assert logits.tolist() == [[0, 0, 1], [-2, 3, 0]]
    reference.mask_tokens(logits, torch.tensor([1]), torch.tensor([1]))
    assert logits.tolist() == [[0, 0, 1], [-2, NEVER, 0]]


def test_of_equal_logits_the_lowest_id_is_greedy() -> None:
    assert reference.argmax(torch.tensor([[1.0, 3.0, 3.0, 3.0], [5.0, 5.0, 0.0, 1.0]])).tolist() == [1, 0]


def test_logprobs_are_of_the_raw_distribution_with_rank_and_likeliest() -> None:
    logits = torch.tensor(log(0.1, 0.4, 0.2, 0.3)).repeat(2, 1) + 7
    rows = reference.token_logprobs(logits, torch.tensor([2, 1]), 3)
    assert rows.logprobs.exp().tolist() == pytest.approx([0.2, 0.4])
    assert rows.ranks.tolist() == [3, 1]
    assert rows.top_ids.tolist() == [[1, 3, 2], [1, 3, 2]]
    assert rows.top_logprobs[0].exp().tolist() == pytest.approx([0.4, 0.3, 0.2])


def test_ranks_of_equal_logits_count_up_by_id() -> None:
    rows = reference.token_logprobs(torch.zeros(3, 4), torch.tensor([0, 2, 3]), 2)
    assert rows.ranks.tolist() == [1, 3, 4]
    assert rows.top_ids.tolist() == [[0, 1]] * 3
    assert reference.token_logprobs(torch.zeros(1, 4), torch.tensor([1]), 0).top_ids.shape == (1, 0)


def test_order_keys_order_all_floats_and_break_ties_by_id() -> None:
    values = torch.tensor([[NEVER, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 2.0, 3e38]])
    assert sampling.order_keys(values).argsort(descending=True)[0].tolist() == [8, 6, 7, 5, 3, 4, 2, 1, 0]
