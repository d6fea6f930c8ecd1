"""What grows with the number of workers: what one event costs the dispatcher and the engine, and a simulated pool.

    python -m benchmarks.simulator.scale                    prints tables, writes benchmarks/results/scaling.json
    python -m benchmarks.simulator.scale --workers 1000     the pool of 1,000 workers alone

The load grows with the pool, so a cost per event that stays the same is linear growth in all, and one that grows with
the workers is quadratic. Times are CPU time of one process, so that a busy machine counts for little; the pools' wall
time is told as well. The engine is the real one, with worker links and a session, but without sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.planning import commit, cpu
from benchmarks.simulator.profiles import A100_OPT_13B_LEAN
from benchmarks.simulator.simulation import Simulation
from benchmarks.simulator.traces import ALPACA_LIKE
from pagewire.runtime import logs
from pagewire.v1 import scheduler_pb2, worker_pb2
from scheduler.config import SchedulerSettings
from scheduler.dispatcher import Admission, Dispatcher, SchedulerConfig
from scheduler.engine import Engine
from scheduler.gateway_link import Session
from scheduler.sequence import Request
from scheduler.step_plan import StepPlan, StepResult
from scheduler.worker_link import WorkerLink

RESULTS = Path(__file__).parents[1] / "results" / "scaling.json"
PER_WORKER = 32  # sequences that decode on each
PROMPT = array("I", [0] * 32)
BACKLOG = 4000  # requests that wait while the pool comes up, and fill the queue


def microseconds(calls: int, do: Callable[[], Any]) -> float:
    """CPU time per call."""
    start = time.process_time_ns()
    for _ in range(calls):
        do()
    return round((time.process_time_ns() - start) / calls / 1e3, 2)


def join_with_a_backlog(num_workers: int) -> dict[str, Any]:
    """A pool that comes up while requests wait, and what a refused request costs when the queue is full."""
    profile = A100_OPT_13B_LEAN
    dispatcher = Dispatcher(SchedulerConfig(prefix_cache=False, max_waiting=BACKLOG))
    for number in range(BACKLOG):
        dispatcher.submit(Request(str(number), PROMPT, max_tokens=400), 0)
    joins = iter(range(1, 1 << 30))

    def join() -> None:
        epoch = next(joins)
        dispatcher.add_worker(str(epoch), profile.capacity, profile.rates, epoch, 0)

    def refuse() -> None:
        assert dispatcher.submit(Request("one more", PROMPT, max_tokens=4), 0).admission is Admission.LATER

    return {
        "join_into_backlog_ms": round(microseconds(num_workers, join) / 1e3, 3),
        "refuse_at_full_queue_us": microseconds(200, refuse),
    }


def dispatcher_costs(num_workers: int) -> dict[str, Any]:
    """Microseconds per call in a pool whose every worker decodes 32 sequences."""
    profile = A100_OPT_13B_LEAN
    config = SchedulerConfig(max_num_seqs=256, prefix_cache=False, max_waiting=100_000, max_retained=0)
    dispatcher = Dispatcher(config)
    epochs = iter(range(1, 1 << 30))
    names = [str(number) for number in range(num_workers)]

    joined = iter(range(num_workers))

    def join(name: str) -> None:
        dispatcher.add_worker(name, profile.capacity, profile.rates, next(epochs), 0)

    join_us = microseconds(num_workers, lambda: join(names[next(joined)]))
    submitted = iter(range(1 << 30))

    def submit() -> None:
        assert dispatcher.submit(Request(str(next(submitted)), PROMPT, max_tokens=400), 0).group is not None

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
    gc.collect()
    gc.freeze()  # or a full collection falls into one of the figures
    arrival_us = microseconds(500, submit)
    loads_us = microseconds(3, dispatcher.loads)
    expiry_us = microseconds(200, dispatcher.next_expiry)
    lost_us = microseconds(1, lambda: dispatcher.remove_worker(names[-1], 0))
    back_us = microseconds(1, lambda: join(names[-1]))
    gc.unfreeze()
    return {
        "workers": num_workers,
        "join_us": join_us,
        "submit_us": submit_us,
        "submit_into_running_us": arrival_us,
        "schedule_and_apply_us": step_us,
        "next_expiry_us": expiry_us,
        "loads_us": loads_us,
        "lose_a_worker_ms": round(lost_us / 1e3, 2),
        "rejoin_ms": round(back_us / 1e3, 2),
        **join_with_a_backlog(num_workers),
    }


async def engine_costs(num_workers: int, per_worker: int = 4) -> dict[str, Any]:
    """Microseconds of the engine per request and per result, its turn included, with `per_worker` requests each."""
    engine = Engine(SchedulerSettings(max_workers=4096, max_waiting=100_000), wall_ms=1)
    links = []
    capacity, model = A100_OPT_13B_LEAN.capacity, worker_pb2.ModelInfo(vocab_size=1000, max_model_len=2048)
    for number in range(num_workers):
        hello = worker_pb2.WorkerHello(protocol_version=1, worker_id=str(number), model=model)
        hello.capacity.block_size, hello.capacity.num_blocks = capacity.block_size, capacity.num_blocks
        hello.capacity.block_bytes, hello.capacity.max_slots = capacity.block_bytes, capacity.max_slots
        hello.capacity.max_step_tokens = capacity.max_step_tokens
        links.append(WorkerLink(hello, engine.next_epoch(), engine.clock))
        engine.join(links[-1])
    session = Session("session", scheduler_pb2.GatewayHello(gateway_id="bench", credit=1), 1 << 30)
    engine.open(session)
    gc.collect()
    gc.freeze()
    start = time.process_time_ns()
    for number in range(per_worker * num_workers):
        submit = scheduler_pb2.Submit(stream=number + 1, request_id=str(number), token_ids=[5] * 20)
        submit.sampling.temperature = 0.0
        submit.stop.max_tokens = 1000
        engine.submit(session, submit)
        await asyncio.sleep(0)  # its turn
    submitted = time.process_time_ns() - start
    spent = rounds = 0
    rows = dict.fromkeys(links, 0)
    for round_ in range(5):
        for link in links:
            plan = worker_pb2.JoinResponse.FromString(await link.outgoing()).step_plan
            rows[link] += len(plan.decode_add)
            tokens = [9] * (rows[link] + len(plan.chunk_slots))  # every prompt is one chunk
            result = worker_pb2.StepResult(epoch=plan.epoch, step=plan.step, token_ids=tokens)
            link.heard()
            start = time.process_time_ns()
            engine.result(link, result)
            await asyncio.sleep(0)
            if round_ > 1:
                spent += time.process_time_ns() - start
                rounds += 1
    gc.unfreeze()
    return {
        "workers": num_workers,
        "submit_and_turn_us": round(submitted / (per_worker * num_workers) / 1e3, 1),
        "result_and_turn_us": round(spent / rounds / 1e3, 1),
    }


def pool_under_load(num_workers: int, seconds: float, rate_per_worker: float) -> dict[str, Any]:
    """A whole simulated pool: wall time per request and per step, and how evenly the work fell."""
    profile = A100_OPT_13B_LEAN
    arrivals = ALPACA_LIKE.arrivals(rate_per_worker * num_workers, seconds)
    simulation = Simulation([profile] * num_workers, arrivals)
    gc.collect()
    gc.freeze()  # the pool stays: collections need not go through it
    start, cpu_start = time.perf_counter(), time.process_time()
    outcome = simulation.run()
    wall, spent = time.perf_counter() - start, time.process_time() - cpu_start
    gc.unfreeze()
    steps = sum(tally.steps for tally in outcome.workers)
    tokens = sorted(tally.tokens for tally in outcome.workers)
    return {
        "workers": num_workers,
        "requests": len(outcome.completions),
        "steps": steps,
        "wall_s": round(wall, 2),
        "requests_per_wall_second": round(len(outcome.completions) / wall),
        "cpu_s": round(spent, 2),
        "requests_per_cpu_second": round(len(outcome.completions) / spent),
        "cpu_us_per_step": round(spent / steps * 1e6, 1),
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
    if min(options.workers) < 1:
        parser.error("--workers: at least 1")
    logs.configure("scheduler", "error")
    costs = [dispatcher_costs(count) for count in options.workers]
    engines = [asyncio.run(engine_costs(count)) for count in options.workers]
    pools = [pool_under_load(count, options.seconds, options.rate) for count in options.workers]
    for row in (*costs, *engines, *pools):
        print(row)
    report = {
        "machine": cpu(),
        "python": platform.python_version(),
        "commit": commit(),
        "command": "python -m " + " ".join(["benchmarks.simulator.scale", *sys.argv[1:]]),
        "seed": 0,
        "dispatcher": costs,
        "engine": engines,
        "pools": pools,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
