"""python -m benchmarks.paper NAME...: runs experiments and writes their results, plots and tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path

from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.planning import commit

RESULTS = Path(__file__).parents[1] / "results" / "paper"


def write(name: str) -> None:
    started = time.perf_counter()
    report = EXPERIMENTS[name]()
    report.setdefault("kind", "simulated: the real scheduler core, a virtual clock, a cost model of the worker")
    report["command"] = f"python -m benchmarks.paper {name}"
    report["commit"] = commit()
    report["python"] = platform.python_version()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    choices = [*EXPERIMENTS, "all", "plots", "page"]
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=", ".join(choices))
    names = parser.parse_args().names
    if "plots" in names and importlib.util.find_spec("matplotlib") is None:  # before experiments run
        parser.error("plots need matplotlib: pip install -c constraints.txt -e '.[bench]'")
    for name in EXPERIMENTS if "all" in names else [name for name in names if name in EXPERIMENTS]:
        write(name)
    if "plots" in names:
        from benchmarks.paper.plots import plot_all  # needs matplotlib

        plot_all(RESULTS)
    if "page" in names:
        from benchmarks.paper.page import fill_page

        fill_page(RESULTS)


if __name__ == "__main__":
    main()
