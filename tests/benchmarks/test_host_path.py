"""The device that takes the limit's time."""

from __future__ import annotations

import pytest

from benchmarks.host_path import RATES, limit
from pagewire.bench.anchors import OFFLINE
from pagewire.simulation.batch import StepLoad


def test_the_stand_in_for_an_h200_takes_the_time_of_the_limits_that_rows_are_held_against() -> None:
    step_ns = limit(*RATES["limit-h200"])(StepLoad(decode_tokens=1, decode_context=256))
    assert 1e9 / step_ns == pytest.approx(OFFLINE["decode-b1"].limit, rel=0.01)
