"""Swapping against recomputing is measured, on the CPU and small: the figures mean nothing here, the rows do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import crossover


def test_it_measures_every_block_size_and_context_and_records_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.json"
    config = str(crossover.ROOT / "configs" / "tiny")
    arguments = "--device cpu --block-size 4 16 --context 16 40"
    monkeypatch.setattr(sys, "argv", ["crossover", str(out), "--config", config, *arguments.split()])
    assert crossover.main() == 0
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert content["swapping_wins_from"] == crossover.crossovers(rows)
    assert [(row["block_size"], row["context"], row["blocks"]) for row in rows] == [
        (4, 16, 4), (4, 40, 10), (16, 16, 1), (16, 40, 3),
    ]  # fmt: skip
    assert all(min(row["swap_out_ms"], row["swap_in_ms"], row["recompute_ms"]) > 0 for row in rows)


def test_the_crossover_is_the_length_from_which_on_swapping_always_wins() -> None:
    def row(context: int, swap_ms: float, recompute_ms: float, block_size: int = 16) -> crossover.Row:
        times = {"swap_out_ms": swap_ms / 2, "swap_in_ms": swap_ms / 2, "recompute_ms": recompute_ms}
        return {"shape": "a", "block_size": block_size, "context": context, **times}

    rows = [row(256, 2, 3), row(64, 1, 2), row(128, 2, 1), row(64, 9, 2, block_size=1)]
    assert crossover.crossovers(rows) == {"a": {"1": None, "16": 256}}
