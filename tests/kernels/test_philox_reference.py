from __future__ import annotations

import pytest
import torch

from kernels.reference import philox

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
    assert philox.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(expected)


def test_philox_works_row_by_row() -> None:
    counters = torch.tensor([counter for counter, _, _ in KNOWN_ANSWERS])
    keys = torch.tensor([key for _, key, _ in KNOWN_ANSWERS])
    assert philox.philox4x32(counters, keys).tolist() == [list(expected) for _, _, expected in KNOWN_ANSWERS]


def test_a_number_is_the_token_s_word_of_its_seed_index_and_position() -> None:
    seed, position = 0x299F31D0A4093822, 9 + (5 << 32)
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    words = philox.philox4x32(torch.tensor([25, 3, 9, 5]), key).tolist()
    same = [torch.full((4,), value) for value in (seed, 3, position)]
    numbers = philox.token_uniforms(*same, torch.arange(100, 104))
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [(word + 0.5) / 2**32 for word in words]


def test_the_highest_seed_is_passed_as_minus_one() -> None:
    word = philox.philox4x32(torch.tensor([0, 0, 0, 0]), torch.tensor([0xFFFFFFFF, 0xFFFFFFFF]))[0].item()
    zero = torch.tensor([0])
    assert philox.token_uniforms(torch.tensor([-1]), zero, zero, zero).item() == (word + 0.5) / 2**32


def test_numbers_of_a_stretch_of_the_vocabulary_are_those_of_its_tokens() -> None:
    seeds, indices, positions = torch.tensor([7, -(2**63), 8]), torch.tensor([0, 3, 127]), torch.tensor([0, 2**33, 900])
    for begin, end in ((0, 4), (8, 21), (128252, 128256), (4, 5)):
        token_ids = torch.arange(begin, end)
        stretch = philox.vocabulary_uniforms(seeds, indices, positions, begin, end)
        assert stretch.shape == (3, end - begin)
        for row in range(3):
            same = [column[row].expand(len(token_ids)) for column in (seeds, indices, positions)]
            assert stretch[row].equal(philox.token_uniforms(*same, token_ids))


def test_numbers_differ_by_seed_by_index_by_position_and_by_token() -> None:
    seeds = torch.tensor([1, 2, 1, 1, 1, 1, 1])
    indices = torch.tensor([0, 0, 1, 0, 0, 0, 0])
    positions = torch.tensor([0, 0, 0, 1, 2**32, 0, 0])
    token_ids = torch.tensor([0, 0, 0, 0, 0, 1, 4])
    numbers = philox.token_uniforms(seeds, indices, positions, token_ids).tolist()
    assert len(set(numbers)) == 7
    assert all(0 < number < 1 for number in numbers)


@pytest.mark.parametrize("along", ["positions", "tokens"])
def test_numbers_are_spread_evenly(along: str) -> None:
    count, bins = 20_000, 20
    counted, zeros = torch.arange(count), torch.zeros(count).long()
    positions, token_ids = (counted, zeros) if along == "positions" else (zeros, counted)
    numbers = philox.token_uniforms(torch.full((count,), 7), zeros, positions, token_ids)
    observed = torch.histc(numbers, bins=bins, min=0, max=1)
    chi_square = ((observed - count / bins) ** 2 / (count / bins)).sum().item()
    assert chi_square < 43.8  # the 99.9th percentile of chi-square with 19 degrees of freedom
