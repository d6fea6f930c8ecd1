"""From which length on a preempted sequence is cheaper to swap than to recompute (the paper's Fig. 19), measured:
`python -m benchmarks.crossover OUT.json`.

One process, no scheduler: an executor with dummy weights swaps the blocks of one sequence out and in again, as plans of
their own, and prefills the same number of tokens in one step. Blocks lie scattered in the pool and in the arena, so
every block is a copy of its own. A time runs from before a plan is launched until the device is done, so it has what
the host needs to enqueue the copies; it is the median of REPEATS, after one run that does not count. Shapes: a
grouped-query model, whose token has a quarter of the keys and values, and one without.

On the CPU it is a smoke test: `--config benchmarks/configs/tiny --device cpu --block-size 4 --context 16`.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_step import ROOT, SAMPLINGS, Driver
from pagewire.bench import results
from pagewire.bench.results import Row
from worker.config import WorkerSettings
from worker.executor import Executor
from worker.models.loader import load_model
from worker.start import check_kernels, choose_device, make_executor
from worker.step import BlockMoves, NewSequence

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ("llama-3.1-8b", "llama-2-7b")
REPEATS = 5
SPREAD = 3
"""Times as many blocks as the longest sequence has, so that its blocks lie scattered."""


def milliseconds(device: torch.device, do: Callable[[], None], undo: Callable[[], None] = lambda: None) -> float:
    """Median wall time of one call, until the device is done; what it did is undone after each."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
        undo()
    return round(statistics.median(times[1:]), 4)


def measure(executor: Executor, device: torch.device, context: int) -> Row:
    """One row: a sequence of `context` tokens."""
    executor.reset()
    driver = Driver(executor)
    pool = executor.pool
    draw = random.Random(context)
    count = pool.layout.blocks_for(context)
    blocks = draw.sample(range(pool.num_blocks), count)
    arena = draw.sample(range(pool.num_host_blocks), count)
    tokens = [draw.randrange(10, min(31_000, executor.batch.vocab_size)) for _ in range(context)]
    sequence = NewSequence(
        slot=0,
        token_ids=tokens,
        prompt_tokens=context,
        computed_tokens=0,
        blocks=blocks,
        sampling=SAMPLINGS["greedy"],
    )

    def step(**plan: Any) -> Callable[[], None]:
        def do() -> None:
            driver.launch(**plan)
            driver.collect()

        return do

    row = {
        "swap_out_ms": milliseconds(device, step(swap_out=BlockMoves(blocks, arena))),
        "swap_in_ms": milliseconds(device, step(swap_in=BlockMoves(arena, blocks))),
        "recompute_ms": milliseconds(
            device,
            step(new_sequences=[sequence], chunk_slots=[0], chunk_tokens=[context]),
            undo=step(release_slots=[0]),
        ),
    }
    driver.close()
    return {"block_size": pool.layout.block_size, "context": context, "blocks": count, **row}


def crossovers(rows: Sequence[Row]) -> dict[str, dict[str, int | None]]:
    """By shape and block size: the shortest context from which on out and in take less time than computing it again;
    None: not even the longest."""
    found: dict[str, dict[str, int | None]] = {}
    for row in sorted(rows, key=lambda row: (row["shape"], row["block_size"], row["context"])):
        sizes = found.setdefault(row["shape"], {})
        size = str(row["block_size"])
        swap_wins = row["swap_out_ms"] + row["swap_in_ms"] < row["recompute_ms"]
        sizes[size] = (sizes.get(size) or row["context"]) if swap_wins else None
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the results")
    parser.add_argument("--config", type=Path, nargs="+", default=[ROOT / "configs" / name for name in SHAPES])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--block-size", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS)
    given = parser.parse_args()
    device = choose_device(given.device)
    check_kernels(device)
    longest = max(given.context)
    head = results.header(model=", ".join(path.name for path in given.config), layout="one process")
    recorder = results.Recorder(given.out, head)
    for config in given.config:
        model = load_model(str(config), device=device, dtype="auto", load_format="dummy", max_model_len=longest)
        for block_size in given.block_size:
            blocks = SPREAD * -(-longest // block_size)
            settings = WorkerSettings(
                max_num_seqs=1,
                token_budget=longest,
                block_size=block_size,
                num_blocks=blocks,
                host_blocks=blocks,
                decode_graphs=False,
            )
            executor = make_executor(settings, model, device)
            for context in given.context:
                row = {"shape": config.name, **measure(executor, device, context)}
                recorder.add(row)
                print(row, flush=True)
            del executor
            gc.collect()  # its pool, before the next one is sized
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found = recorder.content["swapping_wins_from"] = crossovers(recorder.rows)
    results.write(given.out, recorder.content)
    for shape, sizes in found.items():
        print(
            f"{shape}: swapping is cheaper from",
            ", ".join(f"{at} tokens (block size {size})" for size, at in sizes.items()),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
