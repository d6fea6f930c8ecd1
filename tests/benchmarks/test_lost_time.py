"""A recorded run's steps, by workload and kind, beside the limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import lost_time, run_rows
from benchmarks.decode_step import ROOT
from pagewire.simulation.batch import StepLoad
from pagewire.simulation.costs import Step


def test_steps_of_a_recorded_run_are_put_together_by_workload_and_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, out = tmp_path / "run.rec", tmp_path / "lost.json"
    monkeypatch.setenv("PAGEWIRE_RECORD", str(recording))
    options = "--device cpu --workload decode-b1 decode-b8 --rate --repeat 1 --scale 1 --length-scale 0.1 --limit-s 100"
    arguments = [str(tmp_path / "rows"), "--model", str(ROOT / "configs" / "tiny"), *options.split()]
    monkeypatch.setattr(sys, "argv", ["run_rows", *arguments, "--max-num-seqs", "8", "--num-blocks", "400"])
    with pytest.raises(SystemExit) as ended:
        run_rows.main()
    assert ended.value.code == 0
    measured = {row["workload"]: row for row in json.loads((tmp_path / "rows" / "offline.json").read_text())["rows"]}
    monkeypatch.setattr(sys, "argv", ["lost_time", str(recording), str(out), "--card", "h100"])
    assert lost_time.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["workload"] for row in rows} == {"decode-b1", "decode-b8"}
    for workload, row in measured.items():
        own = [each for each in rows if each["workload"] == workload]
        assert sum(each["steps"] for each in own if not each["chunks"]) > 0
        # Every token but the last of a sequence is computed, by a chunk or by a decode step; no primer is counted.
        assert sum(each["tokens"] for each in own) == row["in_tokens"] + row["out_tokens"] - row["requests"]
        assert sum(each["steps"] for each in own) <= row["steps"] + 2


def test_copies_to_the_arena_run_beside_a_step_and_are_not_its_device_time() -> None:
    step = Step(
        StepLoad(decode_tokens=4, decode_context=40),
        computing_ns=6_000_000,
        copying_ns=1_000_000,
        swapping_ns=20_000_000,
        turnaround_ns=9_000_000,
    )
    (row,) = lost_time.rows_of([("decode-b8", step)], "h200")
    assert (row["device_s"], row["between_s"]) == (0.007, 0.002)


@pytest.mark.parametrize(
    ("request_id", "workload"),
    [
        ("decode-b1-87901327988-0", "decode-b1"),
        ("prefill-64x4096-134676216392-12", "prefill-64x4096"),
        ("decode-b1-87901327988-primer0", ""),
        ("warm-up-3", ""),
        ("chat-1-2", ""),
    ],
)
def test_measured_requests_are_told_from_others_by_their_names(request_id: str, workload: str) -> None:
    assert lost_time.workload_of(request_id) == workload


def test_a_file_that_is_no_recording_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not a recording")
    monkeypatch.setattr(sys, "argv", ["lost_time", str(other), str(tmp_path / "out.json"), "--card", "h100"])
    assert lost_time.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "notes.txt" in said
