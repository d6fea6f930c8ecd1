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
    options = "--device cpu --pool 130 --host-blocks 128 --requests 12 --length-scale 0.05 --limit-s 100"
    options += " --mode auto recompute:0 swap:0"
    arguments = [str(out), "--model", str(ROOT / "configs" / "tiny"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["pressure", *arguments])
    assert pressure.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mode"], row["headroom"]) for row in rows] == [("auto", 0.3), ("recompute", 0.0), ("swap", 0.0)]
    assert len({row["out_tokens"] for row in rows}) == 1
    assert rows[0]["out_tokens"] > 0
    assert rows[1]["preemptions"]["swap"] == rows[2]["preemptions"]["recompute"] == 0
    assert capsys.readouterr().out.count("starting scheduler") == 1


def test_a_mode_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("swop", "auto:much"):
        monkeypatch.setattr(sys, "argv", ["pressure", "rows.json", "--mode", mode])
        with pytest.raises(SystemExit):
            pressure.main()
        assert f"'{mode}' is not one of auto, recompute, swap, nor MODE:HEADROOM" in capsys.readouterr().err


def test_rows_of_several_calls_are_made_one_file_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for blocks in (1333, 500):
        content = {"commit": "abc", "command": f"run --pool {blocks}", "rows": [{"num_blocks": blocks}]}
        files.append(tmp_path / f"{blocks}.json")
        files[-1].write_text(json.dumps(content))
    out = tmp_path / "all.json"
    monkeypatch.setattr(sys, "argv", ["pressure", str(out), "--merge", *map(str, files)])
    assert pressure.main() == 0
    assert [row["num_blocks"] for row in json.loads(out.read_text())["rows"]] == [1333, 500]
    files[1].write_text(json.dumps({"commit": "abd", "command": "run", "rows": []}))
    with pytest.raises(SystemExit):
        pressure.main()
    assert "--merge: the files differ in commit" in capsys.readouterr().err
