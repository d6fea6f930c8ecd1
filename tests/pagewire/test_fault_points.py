"""Fault points act when the environment names them, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.runtime.errors import StartError
from pagewire.runtime.fault_points import parse

ROOT = Path(__file__).resolve().parents[2]
VISIT_THREE_TIMES = (
    "import asyncio\n"
    "from pagewire.runtime.fault_points import async_fault_point, fault_point\n"
    "for visit in range(3):\n"
    "    fault_point('here')\n"
    "    asyncio.run(async_fault_point('there'))\n"
    "    print('passed', visit + 1, flush=True)\n"
)


def visit_three_times(fault_points: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FAULT_POINTS": fault_points}
    command = [sys.executable, "-c", VISIT_THREE_TIMES]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("point", ["here", "there"])
def test_a_kill_at_the_second_visit_ends_the_process_there(point: str) -> None:
    ended = visit_three_times(f"{point}:kill@2")
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == "passed 1\n"
    assert ended.stderr == f"fault point {point}: kill (visit 2)\n"


def test_a_stall_lets_the_process_go_on_and_says_that_it_was_hit() -> None:
    ended = visit_three_times("here:sleep=0.01,there:sleep=0@3")
    assert ended.returncode == 0
    assert ended.stderr.count("fault point here: sleep=0.01") == 3
    assert ended.stderr.count("fault point there: sleep=0 (visit 3)") == 1


@pytest.mark.parametrize("text", ["here", "here:", ":kill", "here:die", "here:sleep", "here:sleep=x", "here:sleep=-1"])
def test_a_malformed_entry_names_the_expected_form(text: str) -> None:
    with pytest.raises(StartError, match="NAME:sleep=SECONDS or NAME:kill"):
        parse(text)
    ended = visit_three_times(text)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr


def test_without_the_variable_nothing_happens() -> None:
    assert visit_three_times("").stdout == "passed 1\npassed 2\npassed 3\n"
