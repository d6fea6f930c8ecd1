"""What grows with the number of workers: the dispatcher's own time per call, and a simulated pool under load.

    python -m benchmarks.simulator.scale              prints a table, writes benchmarks/results/scaling.json

The load grows with the pool, so a cost per call that stays the same is linear growth in all, and one that grows with
the workers is quadratic.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.planning import commit, cpu
from benchmarks.simulator.profiles import A100_OPT_13B_LEAN
from benchmarks.simulator.simulation import Simulation
from benchmarks.simulator.traces import ALPACA_LIKE
from scheduler.dispatcher import Dispatcher, SchedulerConfig
from scheduler.sequence import Request
from scheduler.step_plan import StepPlan, StepResult

RESULTS = Path(__file__).parents[1] / "results" / "scaling.json"
PER_WORKER = 32  # sequences that decode on each


def microseconds(calls: int, do: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        do()
    return round((time.perf_counter_ns() - start) / calls / 1e3, 2)


def dispatcher_costs(num_workers: int) -> dict[str, Any]:
    """Microseconds per call in a pool whose every worker decodes 32 sequences."""
    profile = A100_OPT_13B_LEAN
    config = SchedulerConfig(max_num_seqs=256, prefix_cache=False, max_waiting=100_000, max_retained=0)
    dispatcher = Dispatcher(config)
    epochs = iter(range(1, 1 << 30))
    names = [str(number) for number in range(num_workers)]

    def join(name: str) -> None:
        dispatcher.add_worker(name, profile.capacity, profile.rates, next(epochs), 0)

    start = time.perf_counter_ns()
    for name in names:
        join(name)
    joined = time.perf_counter_ns() - start
    submitted = iter(range(1 << 30))

    def submit() -> None:
        assert dispatcher.submit(Request(str(next(submitted)), [0] * 32, max_tokens=400), 0).group is not None

    gc.collect()
    gc.freeze()
    submit_us = microseconds(PER_WORKER * num_workers, submit)
    flights: dict[str, list[tuple[StepPlan, int]]] = {name: [] for name in names}
    rows: dict[str, int] = dict.fromkeys(names, 0)

    def step(name: str) -> None:
        plan = dispatcher.schedule(name, 0)
        assert plan is not None
        rows[name] += len(plan.decode_add)
        flights[name].append((plan, rows[name] + len(plan.chunk_slots)))  # every prompt is one chunk
        if len(flights[name]) == 2:
            done, count = flights[name].pop(0)
            dispatcher.apply(name, StepResult(done.epoch, done.step, [5] * count), 0)

    def step_all() -> None:
        for name in names:
            step(name)
        dispatcher.take_events()

    for _ in range(4):
        step_all()
    step_us = round(microseconds(3, step_all) / num_workers, 2)
    arrival_us = microseconds(50, submit)
    loads_us = microseconds(3, dispatcher.loads)
    start = time.perf_counter_ns()
    dispatcher.remove_worker(names[-1], 0)
    lost = time.perf_counter_ns() - start
    start = time.perf_counter_ns()
    join(names[-1])
    back = time.perf_counter_ns() - start
    gc.unfreeze()
    return {
        "workers": num_workers,
        "join_all_ms": round(joined / 1e6, 2),
        "submit_us": submit_us,
        "submit_into_running_us": arrival_us,
        "schedule_and_apply_us": step_us,
        "loads_us": loads_us,
        "lose_a_worker_ms": round(lost / 1e6, 2),
        "rejoin_ms": round(back / 1e6, 2),
    }


def pool_under_load(num_workers: int, seconds: float, rate_per_worker: float) -> dict[str, Any]:
    """A whole simulated pool: wall time per request and per step, and how evenly the work fell."""
    profile = A100_OPT_13B_LEAN
    arrivals = ALPACA_LIKE.arrivals(rate_per_worker * num_workers, seconds)
    simulation = Simulation([profile] * num_workers, arrivals)
    start = time.perf_counter()
    outcome = simulation.run()
    wall = time.perf_counter() - start
    steps = sum(tally.steps for tally in outcome.workers)
    tokens = sorted(tally.tokens for tally in outcome.workers)
    return {
        "workers": num_workers,
        "requests": len(outcome.completions),
        "steps": steps,
        "wall_s": round(wall, 2),
        "requests_per_wall_second": round(len(outcome.completions) / wall),
        "wall_us_per_step": round(wall / steps * 1e6, 1),
        "batched": round(outcome.mean_rows, 1),
        "busiest_over_mean": round(tokens[-1] * len(tokens) / sum(tokens), 2),
        "normalized_latency_s": round(outcome.normalized_latency, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=2.0, help="virtual seconds of arrivals")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second and worker")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    costs = [dispatcher_costs(count) for count in options.workers]
    pools = [pool_under_load(count, options.seconds, options.rate) for count in options.workers]
    for row in (*costs, *pools):
        print(row)
    report = {
        "machine": cpu(),
        "python": platform.python_version(),
        "commit": commit(),
        "command": "python -m benchmarks.simulator.scale",
        "dispatcher": costs,
        "pools": pools,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
