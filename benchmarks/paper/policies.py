"""The memory policies side by side: which scheduler each is, and the highest rate that it sustains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulator.allocation import OrcaMax, OrcaOracle, OrcaPow2, StaticBatcher
from benchmarks.simulator.likelihoods import Likelihoods
from benchmarks.simulator.profiles import WorkerProfile
from benchmarks.simulator.simulation import Arrival, Observer, Outcome, Simulation, WorkerFactory
from benchmarks.simulator.worker import VirtualWorker
from scheduler.dispatcher import SchedulerConfig
from scheduler.policy import PreemptionMode
from scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Policy:
    """An engine to compare: the same but for its scheduler."""

    name: str
    scheduler: type[Scheduler]
    answers_whole_batches: bool = False


PAGEWIRE = Policy("pagewire", Scheduler)
ORCA_MAX = Policy("orca-max", OrcaMax)
ORCA_POW2 = Policy("orca-pow2", OrcaPow2)
ORCA_ORACLE = Policy("orca-oracle", OrcaOracle)
STATIC = Policy("static-batcher", StaticBatcher, answers_whole_batches=True)

POLICIES = (STATIC, ORCA_MAX, ORCA_POW2, ORCA_ORACLE, PAGEWIRE)
ORCAS = (ORCA_MAX, ORCA_POW2, ORCA_ORACLE)

BOUND = 0.2
"""Seconds per output token: a rate is sustained while the mean normalized latency stays under it."""


def simulate(
    policy: Policy,
    profile: WorkerProfile,
    arrivals: list[Arrival],
    *,
    prefix_cache: bool = False,
    preemption_mode: PreemptionMode = "auto",
    observer: Observer | None = None,
    give_up_ns: int | None = None,
    likelihoods: Likelihoods | None = None,
    make_worker: WorkerFactory = VirtualWorker,
) -> Outcome:
    """One run; raises RuntimeError unless everybody is answered or `give_up_ns` was given."""
    config = SchedulerConfig(
        max_num_seqs=profile.max_num_seqs,
        token_budget=profile.token_budget,
        prefix_cache=prefix_cache,
        host_prefix_cache=False,  # the paper's has one tier
        preemption_mode=preemption_mode,
        max_waiting=len(arrivals) + 1,
        retention_ns=0,
        max_retained=0,
    )
    simulation = Simulation(
        [profile],
        arrivals,
        config=config,
        make_scheduler=policy.scheduler,
        observer=observer,
        answers_whole_batches=policy.answers_whole_batches,
        give_up_ns=give_up_ns,
        likelihoods=likelihoods,
        make_worker=make_worker,
    )
    outcome = simulation.run()
    if give_up_ns is None and len(outcome.completions) != len(arrivals):
        raise RuntimeError(f"{policy.name}: {len(arrivals) - len(outcome.completions)} requests have no answer")
    return outcome


LatencyAt = Callable[[float], float]
"""Normalized latency in seconds at a request rate."""


def remembered(latency_at: LatencyAt) -> LatencyAt:
    known: dict[float, float] = {}

    def look_up(rate: float) -> float:
        if rate not in known:
            known[rate] = latency_at(rate)
        return known[rate]

    return look_up


def sustained_rate(latency_at: LatencyAt, start: float, bound: float = BOUND, tolerance: float = 0.02) -> float:
    """The highest rate under the bound, to within `tolerance` of itself, found by doubling and halving from `start`.

    Latency is taken to grow with the rate, which it does but for noise near the bound."""
    low, high = start, start * 1.5
    for _ in range(20):
        if latency_at(low) <= bound:
            break
        low, high = low / 1.5, low
    for _ in range(20):
        if latency_at(high) > bound:
            break
        low, high = high, high * 1.5
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        if latency_at(middle) <= bound:
            low = middle
        else:
            high = middle
    return low
