"""The workloads are the recorded ones, to the token."""

from __future__ import annotations

import pytest

from pagewire.bench import workloads
from pagewire.bench.anchors import OFFLINE as ANCHORS
from pagewire.bench.workloads import Scale, longest, offline, online, totals


@pytest.mark.parametrize(
    ("name", "requests", "tokens_in", "tokens_out"),
    [
        ("decode-b1", 1, 128, 256),
        ("decode-b512", 512, 65_536, 131_072),
        ("sharegpt-like-1000", 1000, 146_781, 323_488),
        ("alpaca-like-2000", 2000, 37_846, 115_287),
        ("prefill-64x4096", 64, 262_144, 64),
        ("shared-prefix-2048", 256, 532_480, 16_384),
    ],
)
def test_totals_are_the_recorded_ones(name: str, requests: int, tokens_in: int, tokens_out: int) -> None:
    jobs = offline(name)
    assert len(jobs) == requests
    assert totals(jobs) == (tokens_in, tokens_out)


def test_every_workload_has_values_to_be_held_against() -> None:
    assert set(workloads.OFFLINE) == set(ANCHORS)


def test_a_workload_is_the_same_every_time() -> None:
    assert offline("alpaca-like-2000", Scale(0.01)) == offline("alpaca-like-2000", Scale(0.01))


def test_prompts_of_a_workload_differ_from_one_another() -> None:
    prompts = {tuple(job.prompt[:16]) for job in offline("decode-b128")}
    assert len(prompts) == 128


def test_shared_prefix_requests_begin_alike_and_end_apart() -> None:
    first, second, *_ = offline("shared-prefix-2048")
    assert first.prompt[:2048] == second.prompt[:2048]
    assert first.prompt[2048:] != second.prompt[2048:]
    assert len(first.prompt) == 2080


def test_a_scaled_workload_is_the_beginning_of_the_whole_one() -> None:
    assert offline("sharegpt-like-1000", Scale(0.01)) == offline("sharegpt-like-1000")[:10]


def test_a_length_scale_shrinks_prompts_and_outputs() -> None:
    (job,) = offline("decode-b1", Scale(lengths=0.125))
    assert (len(job.prompt), job.max_tokens) == (16, 32)
    assert longest([job]) == 48


def test_a_decode_row_keeps_its_batch_when_requests_are_scaled() -> None:
    assert len(offline("decode-b32", Scale(requests=0.01))) == 32


def test_ids_are_folded_into_a_small_vocabulary() -> None:
    jobs = offline("decode-b8", vocab_size=100)
    ids = {token for job in jobs for token in job.prompt}
    assert ids == set(range(10, 100))


def test_online_arrivals_come_at_the_rate_on_average() -> None:
    jobs, arrivals = online(10.0, 200)
    assert len(jobs) == len(arrivals) == 200
    assert arrivals == sorted(arrivals)
    assert totals(jobs) == (33_164, 64_706)
    assert round(arrivals[-1], 3) == 19.265
