"""Gives each of several workers on one machine a GPU of its own.

A worker takes the first GPU that it sees, so it is shown no other. That has to be said before it starts: CUDA reads the
variable once, and every thread of a process begins on its first GPU.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

VARIABLE = "CUDA_VISIBLE_DEVICES"
COMMAND = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
LIMIT_S = 10.0


def visible(environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs that a process with this environment sees, by index or UUID; empty where there are none or nothing tells."""
    if VARIABLE in environment:
        return [name.strip() for name in environment[VARIABLE].split(",") if name.strip()]
    try:
        told = subprocess.run(COMMAND, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return told.stdout.split()


def for_workers(count: int, device: str | None) -> list[str]:
    """GPUs to share out among `count` workers on `device`; none where nobody has to be shown one."""
    return visible() if count > 1 and device != "cpu" else []


def share(number: int, names: list[str]) -> dict[str, str]:
    """What the environment of worker `number` (from 0) has to say. With more workers than GPUs they start over."""
    return {VARIABLE: names[number % len(names)]} if names else {}
