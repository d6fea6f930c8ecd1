"""A card's clock while rows run, from nvidia-smi's samples and a scheduler's log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import power

SAMPLES = """\
2026/11/28 12:00:00.500, 0, 345 MHz, 3201 MHz, 80.00 W, 36, 0x0000000000000001
2026/11/28 12:00:01.500, 0, 1500 MHz, 3201 MHz, 690.00 W, 60, 0x0000000000000004
2026/11/28 12:00:01.500, 1, 1980 MHz, 3201 MHz, 99.00 W, 70, 0x0000000000000000
2026/11/28 12:00:02.500, 0, 1900 MHz, 3201 MHz, 300.00 W, 61, 0x0000000000000000
2026/11/28 12:00:03.500, 0, 1400 MHz, 3201 MHz, 700.00 W, 66, 0x0000000000000024
2026/11/28 12:00:09.000, 0, 1980 MHz, 3201 MHz, 126.00 W, 40, 0x0000000000000000
"""


def log(*sessions: tuple[str, int, int]) -> str:
    """Of sessions of these gateways, opened and closed so many seconds after noon."""
    lines: list[dict[str, str]] = [{"event": "serving", "time": "2026-11-28T12:00:00Z"}]
    for number, (gateway, begin, end) in enumerate(sessions):
        for event, at in (("session opened", begin), ("session closed", end)):
            time = f"2026-11-28T12:00:0{at}.000000Z"
            lines.append({"event": event, "gateway": gateway, "session": f"session-{number}", "time": time})
    return "\n".join(map(json.dumps, lines))


def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: str, said: str) -> Path:
    out, taken, scheduler = (tmp_path / name for name in ("power.json", "clocks.csv", "scheduler.log"))
    taken.write_text(samples)
    scheduler.write_text(said)
    monkeypatch.setattr(sys, "argv", ["power", *map(str, (out, taken, scheduler))])
    power.main()
    return out


def test_a_row_has_the_samples_of_all_its_runs_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = log(("bench-1-decode-b8-55", 1, 2), ("bench-1-decode-b8-56", 3, 4), ("bench-1-warm-up", 8, 9))
    (row,) = json.loads(main(tmp_path, monkeypatch, SAMPLES, said).read_text())["rows"]
    assert row == {
        "workload": "decode-b8",
        "runs": 2,
        "samples": 2,
        "sm_mhz": {"least": 1400.0, "median": 1450.0, "most": 1500.0},
        "watts": 695.0,
        "celsius": 66.0,
        "at_power_cap": 1.0,
    }


def test_what_nvidia_smi_does_not_write_so_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(tmp_path, monkeypatch, "timestamp, index\n", log())
    assert "cannot read the samples or the log" in capsys.readouterr().err.splitlines()[-1]
