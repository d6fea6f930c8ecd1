"""What recording costs the scheduler per steady decode step: the same run, recorded and not in turns. CPU only.

    python -m benchmarks.recording           prints a table, writes benchmarks/results/recording.json

The load is that of benchmarks.planning, with a pause after every step as a device would make it, in which the writing
thread has its turn. Twenty steps are recorded, twenty are not, and so on, so both kinds see the same machine. The event
loop's time is that of schedule, encode and apply; the writer's is its thread's processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.planning import PROMPT, SEED, answer, commit, cpu, make_dispatcher, make_request, spread, timed
from pagewire.v1 import recording_pb2, worker_pb2
from scheduler.codec import encode_plan
from scheduler.policy import SchedulerConfig
from scheduler.recorder import RecordedDispatcher, Recorder
from scheduler.step_plan import StepPlan

RESULTS = Path(__file__).parent / "results" / "recording.json"
TURN = 20
"""Steps of a kind in a row; the first of them is left out."""
PAUSE_S = 0.004


def recorded_and_not(num_seqs: int, turns: int) -> dict[str, Any]:
    """Microseconds per step with and without recording, and what the file grows by."""
    dice = random.Random(SEED)
    hello = worker_pb2.WorkerHello(worker_id="w", protocol_version=1)
    hello.model.name = "none"
    dispatcher = make_dispatcher(num_seqs, make=partial(RecordedDispatcher, hello_of=lambda _: hello))
    assert isinstance(dispatcher, RecordedDispatcher)
    for number in range(num_seqs):
        length = min(1024, max(4, round(dice.lognormvariate(math.log(PROMPT) - 0.5, 1.0))))
        dispatcher.submit(make_request(number, [dice.randrange(10, 31000) for _ in range(length)]), 0)
    step = 0

    def one_step() -> int:
        nonlocal step
        parts: list[int] = []
        plan: StepPlan = timed(parts, partial(dispatcher.schedule, "w", step))
        timed(parts, partial(encode_plan, plan))
        result = answer(plan, len(dispatcher.schedulers[0].in_flight[0].rows), dice)
        timed(parts, partial(dispatcher.apply, "w", result, step))
        dispatcher.take_events()
        step += 1
        return sum(parts)

    while len(dispatcher.schedulers[0].running) < num_seqs or dispatcher.schedulers[0].prefilling:
        one_step()
    times: dict[bool, list[int]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        present = recording_pb2.RecordedWorkerPresent(hello=hello, epoch=1)
        recorder = Recorder(Path(folder) / "run.rec", SchedulerConfig(), {}, in_mid_run=True, present=[present])
        others_before, size_before = _others_ns(), recorder.num_bytes
        for turn in range(2 * turns):
            dispatcher.recorder = recorder if turn % 2 else None
            for number in range(TURN):
                took = one_step()
                if number:
                    times[turn % 2 == 1].append(took)
                time.sleep(PAUSE_S)
        dispatcher.recorder = None
        recorder.stop()
        recorded_steps = turns * TURN
        writer_us = (_others_ns() - others_before) / recorded_steps / 1e3
        file_bytes = (recorder.num_bytes - size_before) / recorded_steps
    return {
        "running": num_seqs,
        "steps_of_each_kind": len(times[True]),
        "not_recorded_us": spread(times[False]),
        "recorded_us": spread(times[True]),
        "ratio_of_medians": round(median(times[True]) / median(times[False]), 3),
        "writer_thread_us_per_step": round(writer_us, 1),
        "file_bytes_per_step": round(file_bytes),
    }


def _others_ns() -> int:
    """Processor time of all threads but this one."""
    return time.process_time_ns() - time.thread_time_ns()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20, help="turns of each kind, of twenty steps")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [recorded_and_not(num_seqs, arguments.turns) for num_seqs in (64, 256, 1024)]
    result = {
        "machine": cpu(),
        "command": "python -m benchmarks.recording",
        "commit": commit(),
        "unit": "microseconds per step; median, 10th and 90th percentile",
        "steady_decode": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
