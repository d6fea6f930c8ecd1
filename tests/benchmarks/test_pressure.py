"""Modes of preemption under memory pressure with a real worker: one worker for all modes of a pool."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import pressure
from benchmarks.decode_step import ROOT


def test_every_mode_serves_the_whole_load_on_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    options = "--device cpu --pool 130 --host-blocks 64 --requests 12 --length-scale 0.05 --limit-s 100"
    arguments = [str(out), "--model", str(ROOT / "configs" / "tiny"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["pressure", *arguments])
    assert pressure.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["auto", "recompute", "swap"]
    assert len({row["out_tokens"] for row in rows}) == 1
    assert rows[0]["out_tokens"] > 0
    assert capsys.readouterr().out.count("starting scheduler") == 1
