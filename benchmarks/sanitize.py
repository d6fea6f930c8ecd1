"""The kernel tests under compute-sanitizer on a machine with a CUDA device: `python -m benchmarks.sanitize OUT_FOLDER`.

Only Pagewire's own kernels are checked. For memcheck every tensor is an allocation of its own, so that it sees where
each ends. The tests of a file are dealt out to processes of a few tests; if the tool fails in one of them, its tests
are run again without options of the tool, then one by one. A few kernels with planted defects come first, then tests
of real sizes.
OUT_FOLDER/sanitize.json has a row for each tool and file, and for each tool and planted defect; sanitize-logs.tgz has
what the tools said. Exit code 1: something was found, a test failed or was not reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
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
REAL_SIZES = "test_real_sizes"
"""The file whose tests take long under a tool: a process each. Not under racecheck, for which they take too long; what
it looks at, shared memory, small sizes use in the same way."""
CAPTURED = "captured_graph"
"""In the names of tests that capture a graph, which needs torch's allocator."""
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
    bare: bool = False
    """Without any option: the tool looks at all kernels."""


@dataclass(frozen=True)
class Outcome:
    """What became of them."""

    outcomes: Counter[str]
    errors: int | None
    """What the tool has found; None: it was cut short before its summary, or failed itself."""
    seconds: float = 0.0


def read(log: str, seconds: float = 0.0) -> Outcome:
    """The outcome that a log tells of."""
    found = [] if TOOL_FAILED in log else SUMMARY.findall(log)
    return Outcome(Counter(OUTCOME.findall(log)), sum(map(int, found)) if found else None, seconds)


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
    command = [*PYTEST, "-q", "--collect-only", "tests/kernels", "-k", keywords]
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
    for file, names in sorted(tests.items(), key=lambda item: item[0] != REAL_SIZES):
        count = len(names) if file == REAL_SIZES else -(-len(names) // TESTS_PER_PROCESS)
        for tool in tools:
            if (tool, file) != ("racecheck", REAL_SIZES):
                found += [Part(tool, file, names[i::count], folder / f"{tool}-{file}-{i}.log") for i in range(count)]
    return found


def check(part: Part, port: int, ends: float) -> list[tuple[Part, Outcome]]:
    """Runs a part until the time `ends`. Where the tool fails itself, the part is run without options, and then each of
    its tests by itself."""
    outcome = run(part, port, ends)
    if outcome.errors is not None or not part.tests or time.monotonic() > ends:
        return [(part, outcome)]
    if not part.bare:
        return check(dataclasses.replace(part, bare=True, log=part.log.with_stem(f"{part.log.stem}-bare")), port, ends)
    if len(part.tests) == 1:
        return [(part, outcome)]
    alone = [
        dataclasses.replace(part, tests=(test,), log=part.log.with_stem(f"{part.log.stem}-{i}"))
        for i, test in enumerate(part.tests)
    ]
    return [(one, run(one, port, ends)) for one in alone]


def run(part: Part, port: int, ends: float) -> Outcome:
    """Runs one process until the time `ends`."""
    begin = time.monotonic()
    if ends - begin < 5:
        return Outcome(Counter(), None)
    command = ["compute-sanitizer", "--tool", part.tool, "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not part.bare:
        command += ["--print-limit", "20", "--report-api-errors", "no", "--show-backtrace", "device"]
        command += [argument for name in kernel_names() for argument in ("--kernel-name", f"kne={name}")]
    if not part.bare and part.tool != "racecheck":
        command += ["--destroy-on-device-error", "kernel"]
    if part.tool == "memcheck":
        command += ["--padding", "512"]  # or the next allocation begins where one ends
        if not any(CAPTURED in test for test in part.tests):
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    arguments = part.log.with_suffix(".txt")
    if part.tests:
        arguments.write_text("\n".join(part.tests))
        command += [*PYTEST, "-v", f"@{arguments}"]
    else:
        command += [sys.executable, "-m", planted_defects.__name__, part.name]
    with part.log.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(ends - begin)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    arguments.unlink(missing_ok=True)
    outcome = read(part.log.read_text(errors="replace"), time.monotonic() - begin)
    print(f"{part.log.stem}: {dict(outcome.outcomes)}, errors {outcome.errors}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def row(tool: str, file: str, found: Sequence[tuple[Part, Outcome]]) -> results.Row:
    """What the parts of one file come to. `errors` are those of processes that came to their end, `unfinished` the
    tests of the others."""
    counts = sum((outcome.outcomes for _, outcome in found), Counter())
    tests = sum(len(part.tests) for part, _ in found)
    failed = counts["FAILED"] + counts["ERROR"]
    return {
        "tool": tool,
        "file": file,
        "errors": sum(outcome.errors or 0 for _, outcome in found),
        "passed": counts["PASSED"],
        "skipped": counts["SKIPPED"],
        "failed": failed,
        "not_reached": tests - counts["PASSED"] - counts["SKIPPED"] - failed,
        "without_options": sum(len(part.tests) for part, _ in found if part.bare),
        "unfinished": [test for part, outcome in found if outcome.errors is None for test in part.tests],
        "seconds": round(sum(outcome.seconds for _, outcome in found)),
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
        done = list(pool.map(lambda part, port: check(part, port, begin + given.limit_s - 5), todo, ports))
    recorder = results.Recorder(given.out / "sanitize.json", results.header())
    found: dict[tuple[str, str], list[tuple[Part, Outcome]]] = {}
    for part, outcome in itertools.chain.from_iterable(done):
        found.setdefault((part.tool, part.name), []).append((part, outcome))
    for (tool, name), some in found.items():
        planted = {"tool": tool, "planted": name, "errors": some[0][1].errors}
        recorder.add(row(tool, name, some) if name in tests else planted)
        print(recorder.rows[-1], flush=True)
    with tarfile.open(given.out / "sanitize-logs.tgz", "w:gz") as archive:
        for log in sorted(given.out.glob("*.log")):
            archive.add(log, log.name)
            log.unlink()
    print(f"{time.monotonic() - begin:.0f} s")
    bad = ("errors", "failed", "not_reached", "unfinished")
    return 1 if any(one[name] for one in recorder.rows if "file" in one for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
