"""What holds a card's clock down while rows run: `python -m benchmarks.power OUT.json SAMPLES SCHEDULER_LOG`.

SAMPLES is what nvidia-smi wrote beside `benchmarks.run_rows`, on the same host, as

    nvidia-smi --format=csv,noheader -lms 250 --query-gpu=\
    timestamp,index,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active

SCHEDULER_LOG is scheduler.log of that run's logs: every run of a row is a session of its own, and says when it was
opened and closed. A row here is one workload, all its runs: clock, power and the share of samples at the power cap.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pagewire.bench import results
from pagewire.bench.results import Row

POWER_CAP = 0x4
"""The bit of clocks_event_reasons.active for the software's power cap (NVML: SwPowerCap)."""
_GATEWAY = re.compile(r"bench-\d+-(.+)-\d+$")


@dataclass(frozen=True)
class Sample:
    """What nvidia-smi says of one card at one time."""

    at: datetime
    sm_mhz: float
    watts: float
    celsius: float
    capped: bool


def samples(lines: Iterable[str], card: int) -> list[Sample]:
    """Of one card, by its index. Raises ValueError for a line that nvidia-smi does not write so."""
    found = []
    for line in lines:
        at, index, sm, _, power, celsius, reasons = (field.strip() for field in line.split(","))
        if int(index) == card:
            time = datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").replace(tzinfo=UTC)
            capped = bool(int(reasons, 16) & POWER_CAP)
            found.append(Sample(time, float(sm.split()[0]), float(power.split()[0]), float(celsius), capped))
    return found


def runs(lines: Iterable[str]) -> dict[str, list[tuple[datetime, datetime]]]:
    """By workload: when its runs' sessions were opened and closed, from a scheduler's log."""
    opened: dict[str, datetime] = {}
    found: dict[str, list[tuple[datetime, datetime]]] = defaultdict(list)
    for line in lines:
        said = json.loads(line)
        named = _GATEWAY.search(said.get("gateway", ""))
        if named is None:
            continue
        at = datetime.fromisoformat(said["time"])
        if said["event"] == "session opened":
            opened[said["session"]] = at
        elif said["event"] == "session closed":
            found[named[1]].append((opened[said["session"]], at))
    return dict(found)


def rows(taken: Sequence[Sample], when: dict[str, list[tuple[datetime, datetime]]]) -> list[Row]:
    """One row a workload that has samples."""
    found: list[Row] = []
    for workload, spans in when.items():
        own = [sample for sample in taken if any(begin <= sample.at <= end for begin, end in spans)]
        if own:
            clocks = [sample.sm_mhz for sample in own]
            found.append(
                {
                    "workload": workload,
                    "runs": len(spans),
                    "samples": len(own),
                    "sm_mhz": {"least": min(clocks), "median": statistics.median(clocks), "most": max(clocks)},
                    "watts": statistics.median(sample.watts for sample in own),
                    "celsius": max(sample.celsius for sample in own),
                    "at_power_cap": round(sum(sample.capped for sample in own) / len(own), 3),
                }
            )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the results")
    parser.add_argument("samples", type=Path)
    parser.add_argument("scheduler_log", type=Path)
    parser.add_argument("--card", type=int, default=0, help="nvidia-smi's index")
    parser.add_argument("--measured", type=Path, help="the rows' file, for its header")
    given = parser.parse_args()
    try:
        found = rows(
            samples(given.samples.read_text().splitlines(), given.card),
            runs(given.scheduler_log.read_text().splitlines()),
        )
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"cannot read the samples or the log: {error}")
    header = json.loads(given.measured.read_text()) if given.measured else results.header()
    header = {key: header[key] for key in ("gpu", "cpu", "versions", "commit") if key in header}
    command = "python -m benchmarks.power power.json clocks.csv logs/scheduler.log --measured offline.json"
    results.write(given.out, {**header, "command": command, "rows": found})


if __name__ == "__main__":
    main()
