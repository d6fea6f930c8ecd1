"""The paper's comparison of memory policies with a real worker: `python -m benchmarks.paper.measured OUT.json`.

The same scheduler and worker as processes, once for each policy, on a pool that the load overfills: requests of a
workload all at once, so that a row's throughput is the rate that the policy sustains. Orca's policies reserve
contiguous chunks (`benchmarks.simulator.allocation`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.arguments import add_model
from benchmarks.paper.policy_scheduler import LONGEST, POLICIES
from pagewire.bench import results, suite
from pagewire.bench.service import Launch
from pagewire.bench.workloads import Scale

WORKLOADS = ("sharegpt-like-1000", "alpaca-like-2000")


def main() -> int:
    """Command line. Exit code 1: a row has no value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the results")
    add_model(parser)
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--num-blocks", type=int, default=6144, help="pool, in blocks of 16 tokens; default: 12 GiB")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--limit-s", type=float, default=170.0, help="seconds for one policy")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--length-scale", type=float, default=1.0)
    given = parser.parse_args()
    rows: list[results.Row] = []
    for policy in given.policy:
        launch = Launch(
            model=given.model,
            load_format=given.load_format,
            device=given.device,
            max_model_len=LONGEST,
            num_blocks=given.num_blocks,
            max_num_seqs=given.max_num_seqs,
            token_budget=2048,
            scheduler_module=("benchmarks.paper.policy_scheduler", policy),
        )
        with tempfile.TemporaryDirectory() as folder:
            offline = Path(folder) / "offline.json"
            plan = suite.Plan(
                offline=tuple(given.workload),
                scale=Scale(given.scale, given.length_scale),
                row_limit_s=given.limit_s,
                limit_s=given.limit_s,
                offline_output=offline,
            )
            print(policy, flush=True)
            uvloop.run(suite.main(plan, launch))
            content = json.loads(offline.read_text())
        rows += [{"policy": policy, **row} for row in content.pop("rows")]
        # After each policy: what a limit cuts off is only the one that runs.
        results.write(given.out, {**content, "command": results.command(), "rows": rows})
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
