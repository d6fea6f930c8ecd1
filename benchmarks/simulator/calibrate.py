"""Fits a profile to steps that a real worker executed.

What each step had to do is found by executing its plan on a virtual worker, so a recording needs plans and the
`forward_ns` of their results and nothing else:

    loads = [VirtualWorker(profile, epoch).execute(plan)[2] ...]      in order of steps, one worker per epoch
    fitted = calibrate(profile, list(zip(loads, forward_ns)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.simulator.profiles import WorkerProfile
from pagewire.simulation.batch import StepLoad

ROUNDS = 30


def calibrate(profile: WorkerProfile, steps: Sequence[tuple[StepLoad, int]]) -> WorkerProfile:
    """The profile with the two overheads and the two rates that fit the steps best, by relative error.

    Least squares, repeated: each round takes a step as bound by memory or by arithmetic, as the round before says. A
    rate that no step depends on stays as it was. Raises ValueError for fewer than 8 steps."""
    steps = [(load, ns) for load, ns in steps if ns > 0 and load.decode_tokens + load.chunk_tokens > 0]
    if len(steps) < 8:
        raise ValueError(f"{len(steps)} steps are too few to fit a profile to")
    for _ in range(ROUNDS):
        fitted = one_round(profile, steps)
        if fitted == profile:
            break
        profile = fitted
    return profile


def one_round(profile: WorkerProfile, steps: Sequence[tuple[StepLoad, int]]) -> WorkerProfile:
    # Columns: 1, rows, seconds per byte, seconds per operation; in nanoseconds, each row over its time.
    weight = profile.model.weight_bytes
    columns = np.zeros((len(steps), 4))
    for line, (load, _) in zip(columns, steps, strict=True):
        flops, kv_bytes = profile.flops(load), profile.kv_traffic(load)
        is_memory_bound = weight / profile.memory_rate >= flops / profile.compute_rate
        line[:] = 1, profile.rows(load), kv_bytes + weight * is_memory_bound, flops * (not is_memory_bound)
    times = np.array([ns for _, ns in steps], dtype=float)
    relative = columns / times[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    free = [column for column in range(4) if columns[:, column].any()]
    found = np.zeros(4)
    while free:
        found[:] = 0
        found[free] = np.linalg.lstsq(relative[:, free] / scale[free], np.ones(len(steps)), rcond=None)[0] / scale[free]
        negative = [column for column in free if found[column] < 0]
        if not negative:
            break
        free.remove(min(negative, key=lambda column: found[column] * scale[column]))
    overhead, per_row, per_byte, per_flop = found
    return replace(
        profile,
        step_overhead_ns=round(overhead),
        row_overhead_ns=round(per_row),
        memory_rate=float(f"{1e9 / per_byte:.6g}") if per_byte > 0 else profile.memory_rate,
        compute_rate=float(f"{1e9 / per_flop:.6g}") if per_flop > 0 else profile.compute_rate,
    )


def mean_error(profile: WorkerProfile, steps: Sequence[tuple[StepLoad, int]]) -> float:
    """Mean relative error of the profile's step times."""
    return float(np.mean([abs(profile.forward_ns(load) - ns) / ns for load, ns in steps]))
