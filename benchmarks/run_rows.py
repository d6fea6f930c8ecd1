"""Offline and online rows of docs/performance.md over one start of the service: `python -m benchmarks.run_rows OUT`.

Writes OUT/offline.json and OUT/online.json after every row and prints the tables last. Needs no installation: torch,
grpcio, transformers and the generated stubs are enough, with the repository's root as the working directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.arguments import add_model
from pagewire.bench import suite
from pagewire.bench.anchors import ONLINE
from pagewire.bench.service import Launch
from pagewire.bench.workloads import OFFLINE, Scale


def main() -> None:
    """Runs the rows; exit code 1 when any has no values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder for the results")
    add_model(parser)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit-s", type=float, default=420.0, help="seconds for everything")
    parser.add_argument("--row-limit-s", type=float, default=90.0, help="seconds for one row, all its runs")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each offline row")
    parser.add_argument(
        "--workload", nargs="*", choices=OFFLINE, default=list(OFFLINE), help="offline rows; default: all"
    )
    parser.add_argument("--rate", type=float, nargs="*", default=list(ONLINE), help="online rows; none: leave them out")
    parser.add_argument("--requests", type=int, help="requests of an online row; default: as recorded for its rate")
    parser.add_argument("--at", nargs="+", choices=("session", "gateway"), default=["session", "gateway"])
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--token-budget", type=int, default=8192, help="of the offline rows")
    parser.add_argument("--online-token-budget", type=int, default=2048)
    parser.add_argument("--online-target-itl-ms", type=float, help="of the scheduler in the online rows; default: none")
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="each with the whole model, on a GPU of its own")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--length-scale", type=float, default=1.0)
    given = parser.parse_args()
    launch = Launch(
        model=given.model,
        load_format=given.load_format,
        device=given.device,
        dtype=given.dtype,
        block_size=given.block_size,
        num_blocks=given.num_blocks,
        max_num_seqs=given.max_num_seqs,
        token_budget=given.token_budget,
        online_token_budget=given.online_token_budget,
        online_target_itl_ms=given.online_target_itl_ms,
        workers=given.workers,
        gateways=given.gateways if given.rate and "gateway" in given.at else 0,
    )
    requests = {rate: given.requests or (ONLINE[rate].requests if rate in ONLINE else 200) for rate in given.rate}
    plan = suite.Plan(
        offline=tuple(given.workload),
        repeat=given.repeat,
        online=tuple(requests.items()),
        places=tuple(given.at),
        scale=Scale(given.scale, given.length_scale),
        row_limit_s=given.row_limit_s,
        limit_s=given.limit_s,
        offline_output=given.out / "offline.json",
        online_output=given.out / "online.json",
        logs=given.out / "logs",
    )
    import uvloop

    sys.exit(0 if uvloop.run(suite.main(plan, launch)) else 1)


if __name__ == "__main__":
    main()
