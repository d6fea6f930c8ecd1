"""Which GPU each worker of a machine gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagewire.runtime import gpus


def test_workers_get_the_visible_gpus_in_turns() -> None:
    names = gpus.visible({gpus.VARIABLE: "3, GPU-7f"})
    assert [gpus.share(number, names)[gpus.VARIABLE] for number in range(3)] == ["3", "GPU-7f", "3"]


def test_who_hides_all_gpus_gets_none() -> None:
    assert gpus.visible({gpus.VARIABLE: ""}) == []
    assert gpus.share(0, []) == {}


def test_without_the_variable_the_driver_s_tool_says_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-a; echo GPU-b\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible({}) == []  # not executable
    tool.chmod(0o755)
    assert gpus.visible({}) == ["GPU-a", "GPU-b"]
    tool.write_text("#!/bin/sh\necho no devices were found; exit 6\n")
    assert gpus.visible({}) == []
