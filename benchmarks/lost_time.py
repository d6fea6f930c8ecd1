"""Where the time of offline rows goes: `python -m benchmarks.lost_time RECORDING OUT.json --card h100`.

RECORDING is of a run of `benchmarks.run_rows` whose scheduler had PAGEWIRE_RECORD set. Its scheduling is simulated
once more, which tells what each step had to do; the recorded times of the worker's device are held against the limit,
what weights, arithmetic and KV of that very step need at the card's rates. Steps are put together by kind: decode steps
by the number of rows, steps with chunks by the number of tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

from benchmarks import cards
from benchmarks.host_path import limit
from pagewire.bench import results
from pagewire.bench.anchors import OFFLINE
from pagewire.recording import Recording, RecordingError
from pagewire.simulation.batch import Batch, RequestRow
from pagewire.simulation.costs import Step, StepWatch, steps_of
from scheduler.draft import StepOutput
from scheduler.step_plan import StepPlan, StepResult

UPTO = (1, 8, 32, 64, 128, 256, 384, 512, 1024, 2048, 4096)
"""Tokens of a step: the sizes that kinds are divided by. More are a kind of their own."""


class RowSteps(StepWatch):
    """Knows of each step to which workload it belongs: the requests of `run_rows` are named after theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.named: list[tuple[str, Step]] = []
        self._workload: dict[tuple[int, int], str] = {}

    def sampling(self, plan: StepPlan, batch: Batch[RequestRow]) -> None:
        row = next(iter(batch.rows.values()), None)
        self._workload[plan.epoch, plan.step] = "" if row is None else workload_of(row.request.request_id)

    def applied(self, worker_id: str, result: StepResult, output: StepOutput, now: int) -> None:
        before = len(self.steps)
        super().applied(worker_id, result, output, now)
        self.named += [(self._workload[result.epoch, result.step], step) for step in self.steps[before:]]


def workload_of(request_id: str) -> str:
    """The workload of a measured request; empty for those that only warm up."""
    found = re.fullmatch(r"(.+)-\d+-\d+", request_id)
    return found[1] if found and found[1] in OFFLINE else ""


def rows_of(steps: Iterable[tuple[str, Step]], card: str) -> list[results.Row]:
    """A row for every workload and kind of step: their number, tokens, and seconds of the device and of the limit."""
    needed = limit(*cards.RATES[card])
    order = list(OFFLINE)
    rows: dict[tuple[int, bool, int], results.Row] = {}
    for workload, step in steps:
        if not workload:
            continue
        tokens, chunks = step.load.decode_tokens + step.load.chunk_tokens, step.load.chunk_tokens > 0
        size = bisect_left(UPTO, tokens)
        row = rows.setdefault(
            (order.index(workload), chunks, size),
            {
                "workload": workload,
                "chunks": chunks,
                "tokens_upto": UPTO[size] if size < len(UPTO) else None,
                "steps": 0,
                "tokens": 0,
                "device_s": 0.0,
                "limit_s": 0.0,
                "between_s": 0.0,
            },
        )
        row["steps"] += 1
        row["tokens"] += tokens
        device_ns = step.computing_ns + step.copying_ns  # copies to and from the arena run beside other steps
        row["device_s"] += device_ns / 1e9
        row["limit_s"] += needed(step.load) / 1e9
        row["between_s"] += max(0, step.turnaround_ns - device_ns) / 1e9
    return [{key: round(v, 4) if isinstance(v, float) else v for key, v in rows[kind].items()} for kind in sorted(rows)]


def main() -> int:
    """Command line. Exit code 1: the recording is not of such a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path, help="file for the results")
    parser.add_argument("--card", choices=cards.RATES, required=True)
    parser.add_argument("--measured", type=Path, help="the run's offline.json: where and with what it was taken")
    given = parser.parse_args()
    watch = RowSteps()
    try:
        steps_of(Recording(given.recording), watch)
    except (RecordingError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = rows_of(watch.named, given.card)
    if not rows:
        print(f"{given.recording}: no request of a workload of benchmarks.run_rows is in it", file=sys.stderr)
        return 1
    head = results.header()
    if given.measured is not None:
        measured = json.loads(given.measured.read_text())
        head |= {key: measured[key] for key in ("gpu", "cpu", "versions", "commit", "model", "settings")}
    results.write(given.out, {**head, "command": results.command(), "card": given.card, "rows": rows})
    for row in rows:
        print({key: value for key, value in row.items() if value is not None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
