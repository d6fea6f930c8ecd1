"""The benchmark of the inner loop runs, on the CPU and small: its figures mean nothing here, its rows do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import decode_step


def test_it_measures_every_sampling_and_swaps_and_records_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    arguments = "--device cpu --batch 1 3 --steps 4 --context 20 --sampling greedy penalties --max-model-len 128"
    sizes = "--token-budget 40 --num-blocks 64 --host-blocks 8 --swap-blocks 4 --prompts 2 --prompt-length 6"
    config = str(decode_step.ROOT / "configs" / "tiny")
    monkeypatch.setattr(
        sys, "argv", ["decode_step", "--config", config, *arguments.split(), *sizes.split(), "--out", str(out)]
    )
    decode_step.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["sampling"], row["batch"]) for row in rows[:-2]] == [
        ("greedy", 1), ("greedy", 3), ("penalties", 1), ("penalties", 3),
    ]  # fmt: skip
    assert all(row["nonfinite_rows"] == 0 and row["step_ms"] > 0 for row in rows[:-2])
    swaps, prompts = rows[-2:]
    assert swaps["swapped_blocks"] == 4
    assert (prompts["prompts"], prompts["prompt_length"], prompts["nonfinite_rows"]) == (2, 6, 0)


def test_a_kernel_counts_from_the_end_of_the_one_before_and_prefill_does_not_count() -> None:
    ended = [(900.0, "attend"), (1000.0, "prefill_x"), (1010.0, "attend"), (1012.0, "argmax")]
    ended += [(1025.0, "argmax"), (1024.0, "attend")]  # in no order
    lines = decode_step.exclusive_times(ended).splitlines()[1:]
    assert [line.split() for line in lines] == [["11.0", "1.0", "11.00", "attend"], ["1.5", "1.0", "1.50", "argmax"]]
