"""Preemption by swap, by recompute and by cost where a load needs more KV memory than there is:
`python -m benchmarks.pressure OUT.json`. A GPU with CuPy.

How many blocks of 16 tokens the online load at 30 requests/s holds at once depends on the card. Pools that are 1.5, 2
and 4 times overcommitted: 1,180, 885 and 440 blocks on an H200, where it holds 1,770 (the default); 1,333, 1,000 and
500 on an H100, where it holds about 2,000. A pool's worker stays while schedulers of the modes take turns; `swap:0` is
`swap` with a headroom of 0, so that new requests leave no room for the growth of the others.
Where a machine is there for one pool at a time, `--merge` makes one file of several.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import uvloop

from benchmarks.arguments import add_model
from pagewire.bench import results, serve, suite
from pagewire.bench.results import Recorder
from pagewire.bench.runner import Runner
from pagewire.bench.serve import DEFAULT_LIMITS, Load
from pagewire.bench.service import Launch
from pagewire.bench.session import loads
from pagewire.bench.workloads import Scale
from scheduler.policy import SchedulerConfig

POOLS = (1180, 885, 440)
MODES = ("auto", "recompute", "swap")
COMPARED = ("auto", "recompute:0", "swap:0")
"""What the page compares: `auto` as it is by default, beside the other two as they are without headroom."""
RATE = 30.0
ROW_LIMIT_S = 200.0


def policy(text: str) -> tuple[str, float]:
    """MODE or MODE:HEADROOM. Raises argparse.ArgumentTypeError."""
    mode, _, headroom = text.partition(":")
    try:
        if mode not in MODES:
            raise ValueError
        return mode, float(headroom) if headroom else SchedulerConfig().headroom
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(MODES)}, nor MODE:HEADROOM") from None


async def measure(given: argparse.Namespace, folder: Path) -> bool:
    """All rows; whether each has values."""
    load, scale = Load(rate=RATE), Scale(1.0, given.length_scale)
    launch = Launch(
        model=given.model,
        load_format=given.load_format,
        device=given.device,
        max_model_len=2048,
        host_blocks=given.host_blocks,
        max_num_seqs=192,
        token_budget=2048,
    )
    recorder = Recorder(given.out, suite.header(launch, None))
    for blocks in given.pool:
        runner = Runner(replace(launch, num_blocks=blocks), folder / str(blocks), limit_s=given.limit_s, say=print)
        try:
            for _ in range(given.repeat):
                for mode, headroom in given.mode:

                    async def values(runner: Runner = runner) -> results.Row:
                        row = await serve.measure(
                            runner,
                            "session",
                            load,
                            given.requests,
                            scale=scale,
                            limits=DEFAULT_LIMITS,
                            vocab_size=await runner.vocab_size(),
                        )
                        # Its scheduler began with this row.
                        (carried,) = (await loads(runner.scheduler)).loads
                        preempted = {"swap": carried.preemptions_swap, "recompute": carried.preemptions_recompute}
                        return {**row, "preemptions": preempted}

                    await runner.replan(preemption_mode=mode, headroom=headroom)
                    row = await runner.row(
                        {"num_blocks": blocks, "mode": mode, "headroom": headroom}, ROW_LIMIT_S, values
                    )
                    recorder.add(row)
                    told = [row.get(name, "") for name in ("out_tok_s", "mean_itl_ms", "preemptions", "error")]
                    print(blocks, mode, headroom, *told, flush=True)
        finally:
            await runner.stop()
    return not any("error" in row for row in recorder.rows)


def main() -> int:
    """Command line. Exit code 1: a row has no value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the results")
    add_model(parser)
    parser.add_argument("--pool", nargs="+", type=int, default=list(POOLS), help="blocks of 16 tokens")
    parser.add_argument("--host-blocks", type=int, default=4096)
    parser.add_argument(
        "--mode",
        nargs="+",
        type=policy,
        default=[policy(mode) for mode in COMPARED],
        help="auto, recompute, swap, or MODE:HEADROOM",
    )
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=1, help="turns of all modes")
    parser.add_argument("--length-scale", type=float, default=1.0)
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds for one pool")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the rows of these files, which were measured on one machine at one commit",
    )
    given = parser.parse_args()
    if given.merge:
        try:
            results.write(given.out, results.merged([json.loads(path.read_text()) for path in given.merge]))
        except (OSError, ValueError) as error:
            parser.error(f"--merge: {error}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if uvloop.run(measure(given, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
