"""The peers' rows are counted as ours are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import peers
from pagewire.bench.workloads import Scale, offline, totals


@pytest.mark.parametrize(("engine", "batch"), [("static-batch", {"batch": 3}), ("continuous-batching", {})])
def test_a_peer_s_row_counts_what_was_asked_for_and_not_what_padding_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, batch: dict[str, int]
) -> None:
    out = tmp_path / "peers.json"
    arguments = ["peers", str(out), "--model", str(peers.CONFIGS / "tiny"), "--engine", engine, "--batch", "3"]
    arguments += ["--workload", "alpaca-like-2000", "--scale", "0.0025", "--length-scale", "0.1"]
    monkeypatch.setattr("sys.argv", arguments)
    assert peers.main() == 0
    (row,) = json.loads(out.read_text())["rows"]
    jobs = offline("alpaca-like-2000", Scale(0.0025, 0.1))
    assert row.items() >= {"engine": engine, "workload": "alpaca-like-2000", "requests": 5, **batch}.items()
    assert row["out_tok_s"] * row["seconds"] == pytest.approx(totals(jobs)[1], rel=0.01)


def test_a_row_that_fails_is_recorded_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "peers.json"
    arguments = ["peers", str(out), "--model", str(peers.CONFIGS / "tiny"), "--limit-s", "-1", "--scale", "0.001"]
    monkeypatch.setattr("sys.argv", arguments)
    assert peers.main() == 1
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(peers.WORKLOADS) * len(peers.ENGINES)
    assert {row["error"] for row in rows} == {"no time left"}


def test_a_row_that_takes_too_long_is_given_up_and_says_how_far_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "peers.json"
    arguments = ["peers", str(out), "--model", str(peers.CONFIGS / "tiny"), "--engine", "static-batch"]
    arguments += ["--workload", "decode-b8", "--length-scale", "0.01", "--row-limit-s", "-1"]
    monkeypatch.setattr("sys.argv", arguments)
    assert peers.main() == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["error"] == "RuntimeError: 0 of 8 requests were done when the time was over"
