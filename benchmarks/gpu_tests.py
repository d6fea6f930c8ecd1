"""All GPU tests, recorded: `python -m benchmarks.gpu_tests OUT.json [PYTEST OPTIONS]`, as `make test-gpu` runs them.

A row for each file of tests. Exit code: pytest's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pagewire.bench import results
from pagewire.bench.results import ROOT

ENDS = {"failure": "failed", "error": "failed", "skipped": "skipped"}
"""What a test's element holds that has not passed."""


def rows(report: Path) -> list[results.Row]:
    """By file, from pytest's report in JUnit's XML."""
    found: dict[str, results.Row] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        name = test.get("classname", "").replace(".", "/") + ".py"
        row = found.setdefault(name, {"file": name, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        row[next((ENDS[part.tag] for part in test if part.tag in ENDS), "passed")] += 1
        row["seconds"] = round(row["seconds"] + float(test.get("time", 0)), 3)
    return [found[name] for name in sorted(found)]


def main(options: Sequence[str]) -> int:
    """Runs the tests and records them."""
    if not options or options[0].startswith("-"):
        raise SystemExit("usage: python -m benchmarks.gpu_tests OUT.json [PYTEST OPTIONS]")
    with tempfile.TemporaryDirectory() as folder:
        report, begin = Path(folder) / "report.xml", time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *options[1:]]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        recorder = results.Recorder(Path(options[0]), results.header(seconds=round(time.monotonic() - begin)))
        for row in rows(report) if report.exists() else []:
            recorder.add(row)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
