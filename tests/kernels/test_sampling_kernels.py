"""Sampling kernels against their torch twins."""

from __future__ import annotations

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import reference, sampling
from kernels.reference import philox
from tests.kernels.emulator import EmulatorBackend

ROWS, VOCABULARY = 6, 3000
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_like_a_model(device: torch.device, rows: int = ROWS, size: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3).to(device)


def column(values: list[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def keys(device: torch.device, rows: int = ROWS, position: int = 0) -> list[torch.Tensor]:
    """Seeds, indices and positions."""
    seeds = torch.arange(rows, device=device) * 7919 - 3
    return [seeds, torch.zeros_like(seeds), torch.full_like(seeds, position)]


def sample_both(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    position: int = 0,
) -> tuple[list[int], list[int]]:
    rows, device = logits.shape[0], logits.device
    arguments = (
        logits,
        column([temperature] * rows, torch.float32, device),
        column([top_k] * rows, torch.int64, device),
        column([top_p] * rows, torch.float32, device),
        column([min_p] * rows, torch.float32, device),
        *keys(device, rows, position),
    )
    return sampling.sample(*arguments).tolist(), reference.sample(*arguments).tolist()


@pytest.mark.parametrize("size", [3000, 2999])
def test_noise_has_the_twin_s_bits_for_any_seed_index_and_position(device: torch.device, size: int) -> None:
    seeds = column([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0], torch.int64, device)
    indices = column([0, 1, 2, 127, 2**31, 5], torch.int64, device)
    positions = column([0, 1, 2**20, 2**33, 4096, 7], torch.int64, device)
    ones, zeros = torch.ones(ROWS, device=device), torch.zeros_like(seeds)
    arguments = (ones, zeros, ones, torch.zeros_like(ones), seeds, indices, positions)
    # Of equal logits the token of the largest number wins: any other bit would name another token.
    flat = torch.zeros(ROWS, size, device=device)
    numbers = philox.vocabulary_uniforms(seeds, indices, positions, 0, size)
    assert sampling.sample(flat, *arguments).tolist() == numbers.argmax(dim=-1).tolist()
    # And of the tokens of smaller numbers, when those of larger ones cannot be drawn.
    flat[numbers > 0.4] = -float("inf")
    wanted = numbers.masked_fill(numbers > 0.4, 0.0).argmax(dim=-1)
    assert (~sampling.sample(flat, *arguments)).tolist() == wanted.tolist(), "which is not finite, and said to be so"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 1000, 3001])
def test_argmax_takes_the_lowest_id_of_equal_logits(device: torch.device, size: int, dtype: torch.dtype) -> None:
    logits = logits_like_a_model(device, size=size).round().to(dtype)
    assert sampling.argmax(logits).tolist() == reference.argmax(logits).tolist()
    zeros = torch.tensor([[-0.0, 0.0, -1.0]], device=device)
    assert sampling.argmax(zeros).tolist() == [0]


@pytest.mark.parametrize("processors", [1, 9, 64])
def test_several_ctas_find_the_likeliest_token_of_a_row_together(emulator: EmulatorBackend, processors: int) -> None:
    emulator.num_processors = processors
    kernel_compile.register_backend("cpu", emulator)  # forgets what it was asked before
    sampling._shared_among_parts.cache_clear()
    logits = logits_like_a_model(torch.device("cpu"), rows=3, size=3001).round()
    logits[1, 2999] = float("nan")
    for _ in range(3):
        found, wanted = sampling.argmax(logits).tolist(), reference.argmax(logits).tolist()
        assert [found[0], found[2]] == [wanted[0], wanted[2]]
        assert found[1] < 0
        assert not any(number.any() for number in sampling._shared_among_parts(logits.device))
    sampling._shared_among_parts.cache_clear()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.8, 50, 0.95, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.5, 0, 0.9, 0.0),
        (5.0, 0, 0.99, 0.0),
        (1.0, 2999, 0.5, 0.0),
        (0.7, 0, 1.0, 0.05),
        (2.0, 500, 0.9, 0.01),
        (0.01, 10, 0.5, 0.0),
    ],
)
def test_a_sampled_token_is_the_twin_s(
    device: torch.device, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_like_a_model(device)
    for position, dtype in enumerate(DTYPES):
        actual, wanted = sample_both(logits.to(dtype), temperature, top_k, top_p, min_p, position)
        assert actual == wanted


@pytest.mark.parametrize(("top_k", "top_p"), [(7, 1.0), (2600, 1.0), (0, 0.3), (2600, 0.9)])
def test_many_equal_logits_are_cut_by_id(device: torch.device, top_k: int, top_p: float) -> None:
    logits = torch.zeros(3, VOCABULARY, device=device)
    logits[1, 100:2900] = 1.0  # more than fit the list of candidates
    logits[2, ::2] = -float("inf")
    actual, wanted = sample_both(logits, top_k=top_k, top_p=top_p)
    assert actual == wanted
    assert [token < 0 for token in actual] == [False, False, True]


def test_rows_of_different_parameters_do_not_disturb_one_another(device: torch.device) -> None:
    logits = logits_like_a_model(device)
    temperature = column([0.0, 1.0, 0.5, 0.0, 2.0, 1.0], torch.float32, device)
    top_k = column([5, 0, 3, 0, 100, 1], torch.int64, device)
    top_p = column([0.5, 1.0, 0.9, 1.0, 0.7, 1.0], torch.float32, device)
    min_p = column([0.0, 0.1, 0.0, 0.0, 0.02, 0.0], torch.float32, device)
    together = sampling.sample(logits, temperature, top_k, top_p, min_p, *keys(device))
    greedy = reference.argmax(logits)
    assert together[[0, 3, 5]].tolist() == greedy[[0, 3, 5]].tolist()
    for r in (1, 2, 4):
        alone = [x[r : r + 1] for x in (logits, temperature, top_k, top_p, min_p, *keys(device))]
        assert sampling.sample(*alone).tolist() == [int(together[r])] == reference.sample(*alone).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_is_told_apart_and_still_gives_a_token_of_the_vocabulary(
    device: torch.device, dtype: torch.dtype
) -> None:
    logits = logits_like_a_model(device, rows=8).to(dtype)
    logits[0] = float("nan")
    logits[1] = -float("inf")
    logits[2, 5] = float("inf")
    logits[3, ::3] = float("nan")
    logits[4, 2999] = -float("nan")
    logits[5, 17] = -float("inf")
    for actual, wanted in (
        sample_both(logits, top_k=50, top_p=0.9),
        (sampling.argmax(logits).tolist(), reference.argmax(logits).tolist()),
    ):
        assert [token < 0 for token in actual] == [token < 0 for token in wanted] == [True] * 6 + [False] * 2
        assert all(0 <= ~token < VOCABULARY for token in actual[:6])
        assert actual[5:] == wanted[5:], "of minus infinity a draw knows what it means"


def test_drawn_frequencies_follow_the_distribution(device: torch.device) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1], device=device)
    rows = 400
    logits = probabilities.log().repeat(rows, 1)
    actual, wanted = sample_both(logits)
    assert actual == wanted
    counts = torch.bincount(torch.tensor(actual), minlength=4) / rows
    assert (counts - probabilities.cpu()).abs().max() < 0.08


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_ranks_and_top_tokens_are_the_twin_s(device: torch.device, num_top: int, dtype: torch.dtype) -> None:
    logits = logits_like_a_model(device).to(dtype)
    logits[1] = logits[1].round()  # ties
    chosen = column([0, 10, 2999, 77, int(logits[4].argmax()), 5], torch.int64, device)
    actual = sampling.token_logprobs(logits, chosen, num_top)
    wanted = reference.token_logprobs(logits, chosen, num_top)
    assert torch.equal(actual.ranks, wanted.ranks)
    assert torch.equal(actual.top_ids, wanted.top_ids)
    torch.testing.assert_close(actual.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs, wanted.top_logprobs, rtol=1e-5, atol=1e-5)


def test_more_top_tokens_than_the_vocabulary_has_are_all_of_it(device: torch.device) -> None:
    logits = logits_like_a_model(device, rows=2, size=7)
    chosen = column([0, 6], torch.int64, device)
    actual, wanted = (f.token_logprobs(logits, chosen, 20) for f in (sampling, reference))
    assert torch.equal(actual.top_ids, wanted.top_ids)


@pytest.mark.parametrize("by_slots", [False, True])
def test_penalties_equal_their_twin(device: torch.device, by_slots: bool) -> None:
    logits = logits_like_a_model(device, rows=3, size=1500)
    generator = torch.Generator().manual_seed(1)
    seen = (torch.rand(5, 1500, generator=generator) < 0.3).to(device)
    counts = torch.randint(-12, 4, (5, 1500), generator=generator).clamp(min=0).to(torch.int32).to(device)
    penalties = ([1.0, 1.3, 0.8, 2.0, 1.0], [0.0, 0.5, -0.5, 1.0, 0.1], [0.0, 0.2, 0.1, -0.3, 1.0])
    factors = [column(values, torch.float32, device) for values in penalties]
    slots = torch.tensor([4, 0, 3] if by_slots else [0, 1, 2], device=device)
    picked = [x[slots].contiguous() for x in (seen, counts, *factors)]
    wanted = reference.apply_penalties(logits, *picked)
    if by_slots:
        actual = sampling.apply_penalties(logits, seen, counts, *factors, slots=slots)
    else:
        actual = sampling.apply_penalties(logits, *picked)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_bias_is_added_and_masked_tokens_become_impossible(device: torch.device) -> None:
    logits = logits_like_a_model(device)
    wanted = logits.clone()
    rows, ids = column([0, 0, 5], torch.int64, device), column([1, 2999, 7], torch.int64, device)
    bias = column([1.5, -2.0, 100.0], torch.float32, device)
    sampling.add_logit_bias(logits, rows, ids, bias)
    reference.add_logit_bias(wanted, rows, ids, bias)
    assert torch.equal(logits, wanted)
    sampling.mask_tokens(logits, rows, ids)
    reference.mask_tokens(wanted, rows, ids)
    assert torch.equal(logits, wanted)


def test_what_sampling_cannot_take_is_refused_before_the_launch(emulator: EmulatorBackend) -> None:
    logits = torch.zeros(2, 8)
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="bfloat16 or float16 or float32"):
        sampling.argmax(logits.double())
    with pytest.raises(ValueError, match="float32"):
        sampling.mask_tokens(logits.bfloat16(), *[torch.zeros(1, dtype=torch.int64)] * 2)
    with pytest.raises(ValueError, match="top_k"):
        sampling.sample(logits, ones, ones, ones, ones, *keys(logits.device, 2))
    with pytest.raises(ValueError, match="token_ids"):
        sampling.token_logprobs(logits, torch.zeros(3, dtype=torch.int64), 1)
    seen, counts = (torch.zeros(3, 8, dtype=dtype) for dtype in (torch.bool, torch.int32))
    with pytest.raises(ValueError, match="slots"):
        sampling.apply_penalties(logits, seen, counts, ones, ones, ones)
