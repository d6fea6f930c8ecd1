"""The scheduler's policies with a real worker: every load runs, and its rows tell what they are there to tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import policy_measured
from benchmarks.decode_step import ROOT


def test_every_experiment_runs_and_its_rows_agree_with_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--num-blocks 130 --host-blocks 400 --max-model-len 512 --max-num-seqs 32 --limit-s 120"
    arguments = f"{tmp_path} --small --device cpu --model {ROOT / 'configs' / 'tiny'} {sizes}"
    monkeypatch.setattr(sys, "argv", ["policy_measured", *arguments.split()])
    assert policy_measured.main() == 0

    def rows(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        return found

    assert [(row["how"], "heavy_ttft_ms" in row) for row in rows("tenants")] == [
        ("alone", False),
        ("beside", True),
        ("one queue", True),
    ]
    off, on = rows("conversations")
    assert off["scheduler"]["found_tokens"]["host"] == 0
    assert off["turns"] == on["turns"] > 0
    # What the clients were told is what the scheduler counted.
    for row in (off, on):
        assert row["cached_tokens"] == sum(row["scheduler"]["found_tokens"].values()) > 0
    one_off = rows("one_off")
    assert [row["host_prefix_cache"] for row in one_off] == [False, True] * 3
    assert not any(sum(row["scheduler"]["found_tokens"].values()) for row in one_off), "a request came back"
    greedy, samples, beams, mixed = rows("groups")
    assert greedy["rows"] == samples["rows"] == beams["rows"] == 12
    assert samples["most_blocks"] < greedy["most_blocks"]
    assert all(mixed["requests"].values())
    (parking,) = rows("parking")
    assert min(parking["park_ms"], parking["continue_ms"], parking["new_request_ms"]) > 0
