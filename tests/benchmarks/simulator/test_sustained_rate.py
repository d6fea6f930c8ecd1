"""Finding the highest rate under a bound."""

from __future__ import annotations

import pytest

from benchmarks.paper.policies import sustained_rate


@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
def test_the_search_finds_the_knee_from_anywhere(start: float) -> None:
    asked: list[float] = []

    def latency_at(rate: float) -> float:
        asked.append(rate)
        return 0.05 if rate <= 7.0 else 3.0

    found = sustained_rate(latency_at, start)
    assert 7.0 / 1.02 <= found <= 7.0
    assert len(asked) < 45
