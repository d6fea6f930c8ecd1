"""`python -m benchmarks.paper`: what it says before anything runs."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper.experiments import EXPERIMENTS


def test_help_names_every_experiment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["paper", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    shown = capsys.readouterr().out.replace("\n", " ")
    assert [name for name in EXPERIMENTS if name not in shown] == []


def test_plots_without_matplotlib_are_refused_in_one_line_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "write", lambda name: pytest.fail(f"{name} ran"))
    monkeypatch.setattr("sys.argv", ["paper", "waste", "plots"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "plots need matplotlib: pip install -c constraints.txt -e '.[bench]'" in capsys.readouterr().err
