"""The kernel tests under compute-sanitizer on a machine with a CUDA device: `python -m benchmarks.sanitize OUT_FOLDER`.

Only Pagewire's own kernels are checked, and every tensor is an allocation of its own, so that memcheck sees where each
ends. The tests of a file are dealt out to processes of a few tests; a few kernels with planted defects come first.
OUT_FOLDER/sanitize.json has a row for each tool and file, and for each tool and planted defect; sanitize-logs.tgz has
what the tools said. Exit code 1: something was found, a test failed or was not reached.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import planted_defects
from kernels.compile import CSRC
from pagewire.bench import results
from pagewire.bench.results import ROOT

TOOLS = tuple(planted_defects.DEFECTS)
# The project's pytest settings name plugins that such a machine may lack; kernel tests need none of them.
PYTEST = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider", "-m", "gpu")
REAL_SIZES = "tests/kernels/gpu"
"""Left out: the captured graphs among them need torch's allocator, and large sizes take long under a tool."""
TESTS_PER_PROCESS = 8
PORTS_PER_PROCESS = 16
"""compute-sanitizer looks for a free port among ten, which other ones beside it may hold."""
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.*\[ *\d+%\]$", re.MULTILINE)
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", re.MULTILINE)
TOOL_FAILED = "Internal Sanitizer Error"
"""It then counts the process that it has ended as an error."""


@dataclass(frozen=True)
class Part:
    """What one process runs: some tests of a file, or a kernel with a planted defect."""

    tool: str
    name: str
    """The file's, or the defect's."""
    tests: Sequence[str]
    """None of them: a planted defect."""
    log: Path


@dataclass(frozen=True)
class Outcome:
    """What became of them."""

    outcomes: Counter[str]
    errors: int | None
    """What the tool has found; None: it was cut short before its summary, or failed itself."""


def read(log: str) -> Outcome:
    """The outcome that a log tells of."""
    found = [] if TOOL_FAILED in log else SUMMARY.findall(log)
    return Outcome(Counter(OUTCOME.findall(log)), sum(map(int, found)) if found else None)


@functools.cache
def kernel_names() -> list[str]:
    """Of all kernels, of the one that the tests of wgmma write themselves, and of the planted ones."""
    head = re.compile(r'extern "C" __global__ [^;{}]*?\b(\w+)\((?!THREADS|CTA_ROWS|\d)')
    return sorted(
        {name for file in CSRC.glob("*.cu") for name in head.findall(file.read_text())}
        | {"probe", planted_defects.NAME}
    )


def collect(keywords: str) -> dict[str, list[str]]:
    """The GPU tests by file."""
    command = [*PYTEST, "-q", "--collect-only", "tests/kernels", f"--ignore={REAL_SIZES}", "-k", keywords]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests: dict[str, list[str]] = {}
    for line in found.stdout.splitlines():
        if "::" in line:
            tests.setdefault(Path(line.partition("::")[0]).stem, []).append(line)
    if not tests:
        raise SystemExit(f"pytest finds no GPU tests:\n{found.stdout}{found.stderr}")
    return tests


def parts(tools: Sequence[str], tests: dict[str, list[str]], folder: Path) -> list[Part]:
    """All processes to run, the planted defects first."""
    found = [
        Part(tool, name, (), folder / f"{tool}-planted-{i}.log")
        for tool in tools
        for i, name in enumerate(planted_defects.DEFECTS[tool])
    ]
    for tool in tools:
        for file, names in tests.items():
            count = -(-len(names) // TESTS_PER_PROCESS)
            found += [Part(tool, file, names[i::count], folder / f"{tool}-{file}-{i}.log") for i in range(count)]
    return found


def check(part: Part, port: int, ends: float) -> Outcome:
    """Runs one part until the time `ends`."""
    left = ends - time.monotonic()
    if left < 5:
        return Outcome(Counter(), None)
    filters = [argument for name in kernel_names() for argument in ("--kernel-name", f"kne={name}")]
    command = ["compute-sanitizer", "--tool", part.tool, "--port", str(port), "--print-limit", "20", *filters]
    command += ["--report-api-errors", "no", "--show-backtrace", "device", "--destroy-on-device-error", "kernel"]
    if part.tool == "memcheck":  # or the next allocation begins where one ends
        command += ["--padding", "512"]
    arguments = part.log.with_suffix(".txt")
    if part.tests:
        arguments.write_text("\n".join(part.tests))
        command += [*PYTEST, "-v", f"@{arguments}"]
    else:
        command += [sys.executable, "-m", planted_defects.__name__, part.name]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with part.log.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    arguments.unlink(missing_ok=True)
    return read(part.log.read_text(errors="replace"))


def row(tool: str, file: str, tests: int, outcomes: Sequence[Outcome]) -> results.Row:
    """What the parts of one file come to; `errors` is None if one of them had no summary."""
    counts = sum((one.outcomes for one in outcomes), Counter())
    errors = [one.errors for one in outcomes]
    failed = counts["FAILED"] + counts["ERROR"]
    return {
        "tool": tool,
        "file": file,
        "errors": None if None in errors else sum(filter(None, errors)),
        "passed": counts["PASSED"],
        "skipped": counts["SKIPPED"],
        "failed": failed,
        "not_reached": tests - counts["PASSED"] - counts["SKIPPED"] - failed,
    }


def main() -> int:
    """Exit code 1: something was found, failed or not reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--tool", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--jobs", type=int, default=14, help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("-k", dest="keywords", default="", help="expression that chooses tests, as pytest takes it")
    given = parser.parse_args()
    begin = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    tests = collect(given.keywords)
    todo = parts(given.tool, tests, given.out.absolute())
    ports = [49152 + PORTS_PER_PROCESS * i for i in range(len(todo))]
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(pool.map(lambda part, port: check(part, port, begin + given.limit_s - 5), todo, ports))
    recorder = results.Recorder(given.out / "sanitize.json", results.header())
    found: dict[tuple[str, str], list[Outcome]] = {}
    for part, outcome in zip(todo, outcomes, strict=True):
        found.setdefault((part.tool, part.name), []).append(outcome)
    for (tool, name), some in found.items():
        planted = {"tool": tool, "planted": name, "errors": some[0].errors}
        recorder.add(row(tool, name, len(tests[name]), some) if name in tests else planted)
        print(recorder.rows[-1], flush=True)
    with tarfile.open(given.out / "sanitize-logs.tgz", "w:gz") as archive:
        for part in todo:
            if part.log.exists():
                archive.add(part.log, part.log.name)
                part.log.unlink()
    print(f"{time.monotonic() - begin:.0f} s")
    checked = [one for one in recorder.rows if "file" in one]
    return 1 if any(one["errors"] != 0 or one["failed"] or one["not_reached"] for one in checked) else 0


if __name__ == "__main__":
    sys.exit(main())
