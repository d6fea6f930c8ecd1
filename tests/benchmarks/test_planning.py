"""The benchmark of planning, over a few steps."""

from __future__ import annotations

import pytest

from benchmarks import planning


@pytest.mark.parametrize("crowded", [False, True])
def test_steps_of_a_steady_decode_set_are_planned_without_a_wait(crowded: bool) -> None:
    row = planning.steady_decode(8, 5, crowded=crowded)
    assert (row["running"], row["steps"]) == (8, 5)
    assert row["plan_bytes"]["max"] > 0


def test_every_round_admits_all_its_requests() -> None:
    row = planning.admission(2)
    assert row["plan_bytes_per_request"] > planning.PROMPT
