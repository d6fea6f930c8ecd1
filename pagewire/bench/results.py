"""How results are recorded: one JSON object with where, what and how, and an entry per row, written after every row."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
PACKAGES = (
    "pagewire",
    "torch",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "grpcio",
    "protobuf",
    "transformers",
    "numpy",
    "uvloop",
)
QUERY_TIMEOUT_S = 20.0
PERCENTILES = (50, 90, 95, 99)

Row = dict[str, Any]


def header(**more: Any) -> dict[str, Any]:
    """Everything that a reader needs to reproduce a file, but for its rows."""
    return {
        "gpu": gpu(),
        "cpu": cpu(),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        **more,
    }


class Recorder:
    """Rows in the making. Each is on disk as soon as it is known, so a run that is cut short keeps what it had."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path = path
        self.content = {**head, "rows": []}

    @property
    def rows(self) -> list[Row]:
        """All so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, row: Row) -> None:
        """One row more."""
        self.rows.append(row)
        if self.path is not None:
            write(self.path, self.content)


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Files of several runs as one: all rows in order, under one header whose command names each.

    Raises ValueError where anything else in the headers differs: such rows are not to stand beside each other.
    """
    heads = [{key: value for key, value in content.items() if key not in ("command", "rows")} for content in contents]
    differ = sorted(key for key in set().union(*heads) if any(head.get(key) != heads[0].get(key) for head in heads))
    if differ:
        raise ValueError(f"the files differ in {', '.join(differ)}")
    commands = "; ".join(content["command"] for content in contents)
    rows = [row for content in contents for row in content["rows"]]
    return {**contents[0], "command": commands, "rows": rows}


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """p50, p90, p95 and p99, interpolated."""
    found = np.percentile(values, PERCENTILES)
    return {f"p{one}": round(float(value), digits) for one, value in zip(PERCENTILES, found, strict=True)}


def relative_spread(values: Sequence[float]) -> float | None:
    """Largest minus smallest over the median; None for a single value, which has none."""
    if len(values) < 2:
        return None
    return round((max(values) - min(values)) / float(np.median(values)), 4)


def gpu() -> str | None:
    """The first GPU's name; None: there is none. Asks the driver, so that this process takes none of its memory."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = asked.stdout.strip().splitlines()
    return lines[0] if asked.returncode == 0 and lines else None


def cpu() -> str:
    """The processor's name and how many of it this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical CPUs"


def versions() -> dict[str, str]:
    """Of Python and what matters here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, marked when tracked files differ from it; PAGEWIRE_COMMIT where there is no history."""
    if given := os.environ.get("PAGEWIRE_COMMIT"):
        return given
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cu", "*.cuh", "*.proto"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def command() -> str:
    """The command line, as it can be typed again; of paths outside the checkout only the last name, for they are of
    this machine."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else ""
    begin = "pagewire" if module in ("", "pagewire.cli") else f"python -m {module}"
    arguments = (argument.replace(f"{ROOT}/", "") for argument in sys.argv[1:])
    return " ".join([begin, *(Path(each).name if each.startswith("/") else each for each in arguments)])
