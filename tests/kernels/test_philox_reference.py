from __future__ import annotations

import pytest
import torch

from kernels import reference

# Known answers of Philox4x32-10 from the Random123 distribution (kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(expected)


def test_philox_works_row_by_row() -> None:
    counters = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])
    keys = torch.tensor([key for _, key, _ in KNOWN_ANSWERS])
    assert reference.philox4x32(counters, keys).tolist() == [list(expected) for _, _, expected in KNOWN_ANSWERS]


def test_a_draw_is_the_first_word_of_its_seed_index_and_position() -> None:
    seed = 0x299F31D0A4093822
    word = reference.philox4x32(torch.tensor([9, 0, 3, 0]), torch.tensor([seed & 0xFFFFFFFF, seed >> 32]))[0].item()
    draw = reference.uniform_draws(torch.tensor([seed]), torch.tensor([3]), torch.tensor([9]))
    assert draw.dtype == torch.float64
    assert draw.item() == (word + 0.5) / 2**32


def test_the_highest_seed_is_passed_as_minus_one() -> None:
    word = reference.philox4x32(torch.tensor([0, 0, 0, 0]), torch.tensor([0xFFFFFFFF, 0xFFFFFFFF]))[0].item()
    draw = reference.uniform_draws(torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))
    assert draw.item() == (word + 0.5) / 2**32


def test_draws_differ_by_seed_by_index_and_by_position() -> None:
    seeds = torch.tensor([1, 2, 1, 1])
    indices = torch.tensor([0, 0, 1, 0])
    positions = torch.tensor([0, 0, 0, 1])
    draws = reference.uniform_draws(seeds, indices, positions).tolist()
    assert len(set(draws)) == 4
    assert all(0 < draw < 1 for draw in draws)


def test_draws_are_spread_evenly() -> None:
    count, bins = 20_000, 20
    draws = reference.uniform_draws(torch.full((count,), 7), torch.zeros(count).long(), torch.arange(count))
    observed = torch.histc(draws, bins=bins, min=0, max=1)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum().item()
    assert chi_square < 43.8  # the 99.9th percentile of chi-square with 19 degrees of freedom
