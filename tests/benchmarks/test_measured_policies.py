"""Memory policies compared with a real worker: the processes start, and chunks decide who runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.decode_step import ROOT
from benchmarks.paper import measured, policy_scheduler


def test_a_policy_that_reserves_the_longest_sequence_runs_fewer_requests_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    arguments = f"{out} --model {ROOT / 'configs' / 'tiny'} --device cpu --policy orca-max pagewire --num-blocks 300"
    load = "--workload alpaca-like-2000 --scale 0.01 --length-scale 0.5 --limit-s 100"
    monkeypatch.setattr(sys, "argv", ["measured", *arguments.split(), *load.split()])
    assert measured.main() == 0
    orca, pagewire = json.loads(out.read_text())["rows"]
    assert (orca["policy"], pagewire["policy"]) == ("orca-max", "pagewire")
    assert orca["out_tokens"] == pagewire["out_tokens"] > 0
    # 4,800 slots are two chunks of 2,048 and change: requests run two by two.
    assert orca["steps"] > 2 * pagewire["steps"]


def test_an_unknown_policy_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["policy_scheduler", "orca"])
    with pytest.raises(SystemExit, match="one of orca-max, orca-pow2, orca-oracle, pagewire"):
        policy_scheduler.main()
