"""The loss of a worker under load, with real workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import worker_loss
from benchmarks.decode_step import ROOT
from pagewire.bench.session import BenchError, Times


def test_one_of_two_workers_dies_and_every_stream_gets_all_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "loss.json"
    options = "--device cpu --num-blocks 400 --max-num-seqs 16 --requests 40 --rate 20 --after-s 1 --limit-s 200"
    arguments = [str(out), "--model", str(ROOT / "configs" / "tiny"), "--length-scale", "0.3", *options.split()]
    monkeypatch.setattr(sys, "argv", ["worker_loss", *arguments])
    assert worker_loss.main() == 0
    whole, lossy = json.loads(out.read_text())["rows"]
    assert "loss" not in whole
    assert whole["out_tokens"] == lossy["out_tokens"]
    assert len(lossy["loss"]["running"]) == 2
    assert lossy["loss"]["streams"] <= sum(lossy["loss"]["running"]) + 1


def test_a_pause_is_the_gap_around_the_loss_and_only_of_streams_that_ran_then() -> None:
    ms = 1_000_000
    ran = Times(arrivals=[1 * ms, 4 * ms, 14 * ms, 15 * ms])
    waited, over = Times(arrivals=[9 * ms, 10 * ms]), Times(arrivals=[1 * ms, 2 * ms])
    found = worker_loss.pauses([ran, waited, over], 5 * ms)
    assert found["streams"] == 1
    assert found["longest_pause_ms"] == found["pause_ms"]["p50"] == 10
    with pytest.raises(BenchError, match="--after-s"):
        worker_loss.pauses([over], 5 * ms)
