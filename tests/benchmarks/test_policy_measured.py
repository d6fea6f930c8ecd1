"""The scheduler's policies with a real worker: every load runs, and its rows tell what they are there to tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import policy_measured
from benchmarks.decode_step import ROOT


def test_every_load_is_measured_on_its_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--num-blocks 130 --host-blocks 400 --max-model-len 512 --max-num-seqs 32 --limit-s 120"
    arguments = f"{tmp_path} --small --device cpu --model {ROOT / 'configs' / 'tiny'} {sizes}"
    monkeypatch.setattr(sys, "argv", ["policy_measured", *arguments.split()])
    assert policy_measured.main() == 0

    tenants = json.loads((tmp_path / "policy_large_pool.json").read_text())["rows"]
    assert [row["how"] for row in tenants] == ["alone", "beside", "one queue"]
    assert ["heavy_ttft_ms" in row for row in tenants] == [False, True, True]

    rows = json.loads((tmp_path / "policy_small_pool.json").read_text())["rows"]
    by_name = {name: [row for row in rows if row["experiment"] == name] for name in ("conversations", "groups")}
    off, on = by_name["conversations"]
    assert off["found_tokens"]["host"] == 0
    assert off["turns"] == on["turns"] > 0
    # Both load the same turns, and what the client was told is what the scheduler counted.
    assert on["cached_tokens"] == sum(on["found_tokens"].values())
    greedy, samples, beams, mixed = by_name["groups"]
    assert greedy["rows"] == samples["rows"] == beams["rows"] == 12
    assert samples["most_blocks"] < greedy["most_blocks"]
    assert all(mixed["requests"].values())
    (parking,) = (row for row in rows if row["experiment"] == "parking")
    assert min(parking["park_ms"], parking["continue_ms"], parking["new_request_ms"]) > 0
