"""Times the worker's inner loop: `python -m benchmarks.decode_step --out results.json`.

One process, no scheduler, no gRPC: an executor with dummy weights gets plans made by hand, two in flight, and a thread
reads the results as the link's would. A row is one batch size in one sampling mode, after prefill of every row:
milliseconds per decode step, tokens per second, the share of time the device waited for plans, and the floor, which is
weight bytes and KV bytes over the device's memory bandwidth. `--eager` launches every kernel by itself.

On the CPU it is a smoke test: `python -m benchmarks.decode_step --config benchmarks/configs/tiny --device cpu
--batch 1 4 --steps 8`.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cards
from kernels.kv_layout import KvLayout
from pagewire.bench import results
from pagewire.bench.results import Row
from worker.config import WorkerSettings
from worker.executor import Executor, LaunchedStep
from worker.models.base import PagedModel
from worker.models.loader import load_model
from worker.start import check_kernels, choose_device, make_executor
from worker.step import BlockMoves, NewSequence, Sampling, StepPlan, StepResult

ROOT = Path(__file__).resolve().parent
BYTES_PER_SECOND, FLOPS_PER_SECOND = (rate * 1e9 for rate in cards.RATES["h200"])
IN_FLIGHT = 2
WARM_UP = 8
PROFILED_STEPS = 8
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "top-k-p": Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=7),
    "penalties": Sampling(temperature=0.8, top_p=0.95, seed=7, repetition_penalty=1.1, frequency_penalty=0.2),
}


Beside = Callable[[int], dict[str, Any]]
"""What else than decodes the plan of step n has."""


def nothing(step: int) -> dict[str, Any]:
    """Decodes alone."""
    return {}


class Driver:
    """Numbers plans and keeps two in flight; results are read on a thread of their own."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.step = 0
        self.launch_ns: list[int] = []
        self.results: list[StepResult] = []
        self._launched: queue.Queue[LaunchedStep | None] = queue.Queue()
        self._results: queue.Queue[StepResult | BaseException] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._unread = 0

    def launch(self, **fields: Any) -> None:
        """Launches a plan, once fewer than two are in flight."""
        while self._unread >= IN_FLIGHT:
            self.result()
        self.step += 1
        plan = StepPlan(epoch=1, step=self.step, **fields)
        started = time.perf_counter_ns()
        launched = self.executor.launch(plan)
        self.launch_ns.append(time.perf_counter_ns() - started)
        self._launched.put(launched)
        self._unread += 1

    def result(self) -> StepResult:
        """The next result."""
        result = self._results.get()
        self._unread -= 1
        if isinstance(result, BaseException):
            raise result
        self.results.append(result)
        return result

    def collect(self) -> list[StepResult]:
        """Waits for all, and forgets what was gathered."""
        while self._unread:
            self.result()
        results, self.results = self.results, []
        self.launch_ns = []
        return results

    def _read(self) -> None:
        while (launched := self._launched.get()) is not None:
            try:
                self._results.put(launched.result())
            except BaseException as error:
                self._results.put(error)

    def close(self) -> None:
        """Ends the reader."""
        self._launched.put(None)
        self._reader.join()


def row_tokens(context: int, steps: int) -> int:
    """Tokens of one row of `measure`, which warms up and then decodes `steps` of them."""
    return context + WARM_UP + steps + 2


def measure(
    executor: Executor,
    batch: int,
    context: int,
    steps: int,
    sampling: Sampling,
    beside: Beside = nothing,
) -> Row:
    """Decodes `steps` tokens in each of `batch` rows of `context` tokens; `beside` says what else step n's plan has."""
    executor.reset()
    driver = Driver(executor)
    layout = executor.pool.layout
    total = row_tokens(context, steps)
    per_row = layout.blocks_for(total)
    if batch * per_row > executor.pool.num_blocks:
        raise ValueError(f"{batch} rows of {total} tokens need {batch * per_row} blocks of {executor.pool.num_blocks}")
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(10, min(31_000, executor.batch.vocab_size), (batch, context), generator=generator).tolist()
    prefill_started = time.perf_counter_ns()
    at_once = max(1, executor.max_step_tokens // context)
    for first in range(0, batch, at_once):
        slots = list(range(first, min(first + at_once, batch)))
        new = [
            NewSequence(
                slot=slot,
                token_ids=tokens[slot],
                prompt_tokens=context,
                computed_tokens=0,
                blocks=list(range(slot * per_row, (slot + 1) * per_row)),
                sampling=sampling,
            )
            for slot in slots
        ]
        driver.launch(new_sequences=new, chunk_slots=slots, chunk_tokens=[context] * len(slots))
    prefill_results = driver.collect()
    prefill_ns = time.perf_counter_ns() - prefill_started
    driver.launch(decode_add=list(range(batch)))
    for _ in range(WARM_UP):
        driver.launch()
    driver.collect()
    started = time.perf_counter_ns()
    for number in range(steps):
        driver.launch(**beside(number))
    launch_ns = list(driver.launch_ns)
    results = driver.collect()
    elapsed_s = (time.perf_counter_ns() - started) / 1e9
    driver.close()
    forward_ms = [(result.timings.forward_ns + result.timings.sample_ns) / 1e6 for result in results]
    idle_ns = sum(result.timings.idle_ns for result in results[1:])
    nonfinite = sum(len(result.nonfinite_rows) for result in results + prefill_results)
    floor_ms = 1e3 * floor_s(executor.model, layout, batch, context + WARM_UP + steps / 2)
    step_ms = 1e3 * elapsed_s / steps
    return {
        "batch": batch,
        "context": context,
        "step_ms": round(step_ms, 4),
        "device_ms": round(statistics.median(forward_ms), 4),
        "tok_s": round(batch * steps / elapsed_s, 1),
        "idle_ratio": round(idle_ns / 1e9 / elapsed_s, 4),
        "launch_ms": round(statistics.median(launch_ns) / 1e6, 4),
        "floor_ms": round(floor_ms, 4),
        "of_floor": round(floor_ms / step_ms, 3),
        "prefill_tok_s": round(batch * context / prefill_ns * 1e9, 1),
        "nonfinite_rows": nonfinite,
    }


def measure_swaps(executor: Executor, batch: int, context: int, steps: int, blocks: int) -> Row:
    """Greedy decode alone, then beside swaps of `blocks` blocks, out in every fourth step and in two steps later."""
    layout, pool = executor.pool.layout, executor.pool
    used = batch * layout.blocks_for(row_tokens(context, steps))
    blocks = min(blocks, pool.num_host_blocks, (pool.num_blocks - used) // 2)
    if blocks < 1:
        return {"skipped": "no blocks to spare for swaps; give --host-blocks"}
    ours, theirs = list(range(used, used + blocks)), list(range(blocks))
    back = list(range(used + blocks, used + 2 * blocks))

    def beside(step: int) -> dict[str, Any]:
        if step % 4 == 0:
            return {"swap_out": BlockMoves(ours, theirs)}
        return {"swap_in": BlockMoves(theirs, back)} if step % 4 == 2 else {}

    alone = measure(executor, batch, context, steps, SAMPLINGS["greedy"])
    swapping = measure(executor, batch, context, steps, SAMPLINGS["greedy"], beside)
    return {
        "batch": batch,
        "swapped_blocks": blocks,
        "step_ms_alone": alone["step_ms"],
        "step_ms_beside_swaps": swapping["step_ms"],
        "slower_by": round(swapping["step_ms"] / alone["step_ms"] - 1, 4),
        "moved_gb_s": round(blocks * layout.block_bytes / 2 / swapping["step_ms"] / 1e6, 2),
    }


def prompts_beside(executor: Executor, batch: int, context: int, steps: int, count: int, length: int) -> Beside:
    """For `measure`: every step computes `count` new prompts of `length` tokens too, in rows behind the batch's, and
    gives up those of the step before."""
    layout = executor.pool.layout
    used = batch * layout.blocks_for(row_tokens(context, max(steps, PROFILED_STEPS)))
    size = layout.blocks_for(length)
    if batch + 2 * count > executor.batch.max_slots or used + 2 * count * size > executor.pool.num_blocks:
        raise ValueError(f"no rows or blocks for {batch} rows and twice {count} prompts")
    tokens = [10 + place % 1000 for place in range(length)]

    def beside(step: int) -> dict[str, Any]:
        now, before = ([batch + turn * count + place for place in range(count)] for turn in (step % 2, (step + 1) % 2))
        new = [
            NewSequence(
                slot=slot,
                token_ids=tokens,
                prompt_tokens=length,
                computed_tokens=0,
                blocks=list(range(used + (slot - batch) * size, used + (slot - batch + 1) * size)),
                sampling=SAMPLINGS["greedy"],
            )
            for slot in now
        ]
        gone = before if step else []
        return {"new_sequences": new, "chunk_slots": now, "chunk_tokens": [length] * count, "release_slots": gone}

    return beside


def floor_s(model: PagedModel, layout: KvLayout, batch: int, context: float) -> float:
    """Seconds of one decode step that memory or arithmetic of the H200 allow; weights are read once, KV once a row."""
    weight_bytes = parameter_bytes(model)
    token_bytes = layout.block_bytes / layout.block_size
    flops = 2 * batch * weight_bytes / layout.dtype.itemsize
    read_s = batch * context * token_bytes / BYTES_PER_SECOND
    return max(weight_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND) + read_s


def parameter_bytes(model: Any) -> int:
    """Bytes of the weights that every decode step reads: all but the input embedding."""
    weights = getattr(model, "_weights", None)
    if weights is None:
        return 0
    tensors = [weights.norm, weights.head]
    for layer in weights.layers:
        tensors += [tensor for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def profile(executor: Executor, batch: int, context: int, beside: Beside = nothing) -> str:
    """A table of the kernels behind the last chunk of prefill, by time.

    Kernels start while the one before runs, so what counts for one is the time from that one's end to its own. On the
    CPU: torch's operations, prefill included.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = torch.cuda.is_available()
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        measure(executor, batch, context, PROFILED_STEPS, SAMPLINGS["greedy"], beside)
    if not cuda:
        return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    kernels = [event for event in recorded.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return exclusive_times([(event.time_range.end, event.name) for event in kernels])


def exclusive_times(ended: Sequence[tuple[float, str]]) -> str:
    """Of kernels' (microsecond of the end, name): what each adds per step, behind the last prefill; a line a name."""
    ordered = sorted(ended)
    last_prefill = max((at for at, (_, name) in enumerate(ordered) if "prefill" in name), default=0)
    steps = sum("argmax" in name for _, name in ordered[last_prefill + 1 :])
    added: dict[str, list[float]] = defaultdict(list)
    for (before, _), (end, name) in itertools.pairwise(ordered[last_prefill:]):
        added[name].append(end - before)
    lines = [f"{'us a step':>9} {'launches':>8} {'us each':>8}"]
    for name, times in sorted(added.items(), key=lambda item: -sum(item[1])):
        whole, launches = sum(times) / max(steps, 1), len(times) / max(steps, 1)
        lines.append(f"{whole:9.1f} {launches:8.1f} {statistics.median(times):8.2f}  {name[:70]}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "llama-3.1-8b", help="folder of config.json")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--context", type=int, default=256, help="prompt tokens of every row")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--sampling", nargs="+", default=["greedy"], choices=list(SAMPLINGS))
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--num-blocks", type=int, default=0)
    parser.add_argument("--host-blocks", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="without decode graphs")
    parser.add_argument("--swap-blocks", type=int, default=0, help="also decode beside swaps of this many blocks")
    parser.add_argument("--profile", type=int, default=0, metavar="BATCH", help="print the kernels of this batch size")
    parser.add_argument("--prompts", type=int, default=0, help="also decode beside so many new prompts in every step")
    parser.add_argument("--prompt-length", type=int, default=22, help="their tokens")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = choose_device(given.device)
    check_kernels(device)
    started = time.perf_counter()
    model = load_model(
        str(given.config), device=device, dtype=given.dtype, load_format="dummy", max_model_len=given.max_model_len
    )
    loaded = time.perf_counter()
    settings = WorkerSettings(
        max_num_seqs=max(given.batch) + 2 * given.prompts,
        token_budget=given.token_budget,
        num_blocks=given.num_blocks,
        host_blocks=given.host_blocks,
        decode_graphs=not given.eager,
    )
    executor = make_executor(settings, model, device)
    ready = time.perf_counter()
    print(f"loaded in {loaded - started:.1f} s, ready in {ready - loaded:.1f} s", flush=True)
    rows: list[Row] = []
    for name in given.sampling:
        for batch in given.batch:
            row = {"sampling": name, **measure(executor, batch, given.context, given.steps, SAMPLINGS[name])}
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if given.swap_blocks:
        print(f"swap rates (out, in): {executor.measure_swaps()}")
        row = measure_swaps(executor, given.batch[-1], given.context, given.steps, given.swap_blocks)
        rows.append(row)
        print(row, flush=True)
    beside = nothing
    if given.prompts:
        batch = given.batch[-1]
        beside = prompts_beside(executor, batch, given.context, given.steps, given.prompts, given.prompt_length)
        row = {
            "prompts": given.prompts,
            "prompt_length": given.prompt_length,
            **measure(executor, batch, given.context, given.steps, SAMPLINGS["greedy"], beside),
        }
        rows.append(row)
        print(row, flush=True)
    if given.profile:
        print(profile(executor, given.profile, given.context, beside))
    if given.out:
        results.write(given.out, {**results.header(), "rows": rows})


if __name__ == "__main__":
    main()
