"""What the scheduler's policies do for latency and throughput: the real core under a virtual clock.

    python -m benchmarks.policy chunking     step times kept to a target: benchmarks/results/chunking.json
    python -m benchmarks.policy fairness     a light tenant beside a heavy one: benchmarks/results/fairness.json
    python -m benchmarks.policy deadlines    deadlines told, or only kept: benchmarks/results/deadlines.json
    python -m benchmarks.policy preemption   modes under memory pressure: benchmarks/results/preemption.json
    python -m benchmarks.policy preemption_speeds   the same on a machine of other speeds:
                                             benchmarks/results/preemption_speeds.json
    python -m benchmarks.policy host_tier    conversations that come back: benchmarks/results/host_tier.json
    python -m benchmarks.policy gathering    beams that wait for results: benchmarks/results/gathering.json
    python -m benchmarks.policy gathering_online   the same beside other requests:
                                             benchmarks/results/gathering_online.json
    python -m benchmarks.policy all

Simulated: no number here was measured on a GPU. Every load has a fixed seed, so a run can be repeated to the digit.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planning import commit
from benchmarks.simulator.profiles import A100_OPT_13B_LEAN, GIB, H200_LLAMA_8B, WorkerProfile
from benchmarks.simulator.simulation import Arrival, Completion, Outcome, Simulation
from benchmarks.simulator.traces import SHAREGPT_LIKE, Load
from benchmarks.simulator.worker import STOP, TOKEN
from pagewire.bench import workloads
from pagewire.bench.workloads import Lengths
from scheduler.policy import PreemptionMode, SchedulerConfig
from scheduler.scheduler import Scheduler

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]

# The H200 with what an engine adds to the limit: decode steps of 5.2 ms and more, prefill at 40 thousand tokens/s.
H200 = replace(H200_LLAMA_8B, step_overhead_ns=1_600_000, compute_rate=620e12, max_num_seqs=256)

# The H100 that docs/performance.md was measured on.
H100 = replace(
    H200_LLAMA_8B,
    name="h100-llama-3.1-8b",
    memory_rate=2.8e12,
    compute_rate=650e12,
    step_overhead_ns=900_000,
    max_num_seqs=192,
)

# The same for the loads of two tenants: with what any chunk costs beyond its tokens there.
H100_CHUNKS = replace(H100, name="h100-llama-3.1-8b, dear chunks", chunk_overhead_ns=2_000_000, max_num_seqs=256)

# The H200 where a step with a chunk is launched kernel by kernel, which takes the host 8 ms more than a graph.
H200_EAGER = replace(H200, name="h200-llama-3.1-8b, eager chunks", chunk_overhead_ns=8_000_000)


def config(profile: WorkerProfile, arrivals: Sequence[Arrival], **settings: Any) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=profile.max_num_seqs,
        token_budget=profile.token_budget,
        prefix_cache=False,
        max_waiting=len(arrivals) + 1,
        retention_ns=0,
        max_retained=0,
        **settings,
    )


def simulate(profile: WorkerProfile, arrivals: Sequence[Arrival], **settings: Any) -> Outcome:
    return Simulation([profile], arrivals, config=config(profile, arrivals, **settings), keeps_gaps=True).run()


def percentiles(nanoseconds: Sequence[int]) -> dict[str, float]:
    """Median, 99th and 99.9th percentile in milliseconds."""
    return {f"p{q:g}": round(float(np.percentile(nanoseconds, q)) / 1e6, 2) for q in (50, 99, 99.9)}


def latencies(outcome: Outcome) -> Result:
    return {
        "ttft_ms": percentiles([done.first_token_ns for done in outcome.completions]),
        "itl_ms": percentiles(outcome.token_gaps),
        "out_tok_s": round(outcome.output_tokens_per_second),
    }


def chunking(
    rates: Sequence[float] = (10, 20, 30),
    targets_ms: Sequence[int] = (0, 7, 8, 9, 10, 12, 14),
    profiles: Sequence[WorkerProfile] = (H200, H200_EAGER),
) -> Result:
    """The online workloads (ShareGPT-like, Poisson) with the prefill of a step kept to a target or not."""
    rows = []
    for profile in profiles:
        for rate in rates:
            for target_ms in targets_ms:
                outcome = simulate(profile, SHAREGPT_LIKE.arrivals(rate, 20.0), target_itl_ns=target_ms * 1_000_000)
                row = {"profile": profile.name, "rate": rate, "target_itl_ms": target_ms}
                row |= latencies(outcome)
                if target_ms:
                    row["itl_p99_over_target"] = round(row["itl_ms"]["p99"] / target_ms, 3)
                rows.append(row)
    return {"load": "sharegpt-like, 20 s of Poisson arrivals, seed 0", "rows": rows}


LONG_PROMPTS = Load("long prompts", Lengths(2000, 0.6, 8000), Lengths(100, 0.6, 400))
"""Documents and short answers: a tenant whose load is nearly all prefill."""


@dataclass(frozen=True)
class TwoTenants:
    """A light tenant's ShareGPT-like load, and one of 20 times as many requests."""

    profile: WorkerProfile
    light_per_s: float
    seconds: float
    heavy: Load = SHAREGPT_LIKE

    def arrivals(self, seed: int = 0) -> tuple[list[Arrival], list[Arrival]]:
        """Of the light tenant, and of the heavy one."""
        light = SHAREGPT_LIKE.arrivals(self.light_per_s, self.seconds, seed=1 + 2 * seed)
        heavy = self.heavy.arrivals(20 * self.light_per_s, self.seconds, seed=2 + 2 * seed)
        return [replace(one, tenant="light") for one in light], [replace(one, tenant="heavy") for one in heavy]


AT_THE_KNEE = TwoTenants(A100_OPT_13B_LEAN, 0.1, 900.0)
"""The heavy tenant alone begins to queue."""
OVERLOAD = TwoTenants(H200, 4.0, 60.0)
"""A full batch, and a queue of the heavy tenant that grows."""
TENANTS = (
    AT_THE_KNEE,
    TwoTenants(A100_OPT_13B_LEAN, 0.2, 600.0),
    TwoTenants(H200, 1.0, 120.0),
    TwoTenants(H200, 2.0, 60.0),
    OVERLOAD,
    TwoTenants(H200, 1.0, 180.0, LONG_PROMPTS),
    TwoTenants(H100_CHUNKS, 1.5, 80.0),
)


def in_order(*loads: Sequence[Arrival]) -> list[Arrival]:
    return sorted((one for load in loads for one in load), key=lambda one: one.at_ns)


def free_batch(profile: WorkerProfile, heavy: Sequence[Arrival], rows: float) -> tuple[WorkerProfile, list[Arrival]]:
    """The floor: as many sequences always decode beside the light tenant's, but their prompts cost nothing (4 tokens)
    and the pool has no end."""
    roomy = replace(profile, kv_bytes=100 * profile.kv_bytes, max_num_seqs=min(profile.max_num_seqs, int(rows) + 4))
    return roomy, [replace(one, prompt=one.prompt[:4], output_tokens=2 * one.output_tokens) for one in heavy]


@dataclass
class Told:
    """What all loads of one kind told together. Nanoseconds."""

    light: list[int] = field(default_factory=list)
    """To first tokens."""
    heavy: list[int] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)
    """Between two tokens, of both."""
    tokens_per_second: list[float] = field(default_factory=list)
    preemptions: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome, light: Collection[int]) -> None:
        """`light`: when the light tenant's requests came."""
        for done in outcome.completions:
            (self.light if done.arrived in light else self.heavy).append(done.first_token_ns)
        self.gaps.extend(outcome.token_gaps)
        self.tokens_per_second.append(outcome.output_tokens_per_second)
        self.preemptions.update(outcome.preemptions)


def fairness(cases: Sequence[TwoTenants] = TENANTS, num_seeds: int = 20) -> Result:
    """A light tenant alone, beside one that sends 20 times as much, beside one whose prompts and memory cost nothing,
    and both in one queue as if they were one tenant. Some 100 light requests a load make a 99th percentile of chance:
    each load is drawn `num_seeds` times, and percentiles are of all together."""
    rows = []
    for case in cases:
        told = {name: Told() for name in ("alone", "beside", "floor", "one_queue")}
        for seed in range(num_seeds):
            light, heavy = case.arrivals(seed)
            both, times = in_order(light, heavy), {one.at_ns for one in light}
            beside = simulate(case.profile, both)
            floor_profile, free = free_batch(case.profile, heavy, beside.mean_rows)
            told["alone"].add(simulate(case.profile, light), times)
            told["beside"].add(beside, times)
            told["floor"].add(simulate(floor_profile, in_order(light, free)), times)
            told["one_queue"].add(simulate(case.profile, [replace(one, tenant="") for one in both]), times)
        row: Result = {
            "profile": case.profile.name,
            "heavy_load": case.heavy.name,
            "light_per_s": case.light_per_s,
            "heavy_per_s": round(20 * case.light_per_s, 1),
            "light_requests": len(told["alone"].light),
        }
        for name, all_of in told.items():
            row[f"light_ttft_ms_{name}"] = percentiles(all_of.light)
            row[f"heavy_ttft_ms_{name}"] = percentiles(all_of.heavy) if all_of.heavy else None
            row[f"itl_ms_{name}"] = percentiles(all_of.gaps)
            row[f"out_tok_s_{name}"] = round(float(np.mean(all_of.tokens_per_second)))
            row[f"preemptions_{name}"] = dict(all_of.preemptions)
        lone = row["light_ttft_ms_alone"]["p99"]
        row["p99_over_lone"] = round(row["light_ttft_ms_beside"]["p99"] / lone, 2)
        row["floor_over_lone"] = round(row["light_ttft_ms_floor"]["p99"] / lone, 2)
        row["throughput_over_one_queue"] = round(row["out_tok_s_beside"] / row["out_tok_s_one_queue"], 3)
        rows.append(row)
    return {
        "load": f"sharegpt-like (light) and as named (heavy), Poisson, {num_seeds} draws, seeds from 1 and 2 on",
        "worst_p99_over_lone": max(row["p99_over_lone"] for row in rows),
        "rows": rows,
    }


URGENT_NS, PATIENT_NS = 4_000_000_000, 20_000_000_000
"""Within so much time every second request wants its whole answer, and the others theirs."""


def in_time(outcome: Outcome, load: Sequence[Arrival]) -> Result:
    """Shares of requests that were answered in time, and what was computed for those that were not."""
    timeouts = {one.at_ns: one.timeout_ns for one in load}
    answered = [done for done in outcome.completions if not done.too_late]
    late = [done for done in outcome.completions if done.too_late]
    row: Result = {}
    for name, timeout in (("urgent", URGENT_NS), ("patient", PATIENT_NS)):
        of = sum(one.timeout_ns == timeout for one in load)
        row[f"{name}_in_time"] = round(sum(timeouts[done.arrived] == timeout for done in answered) / of, 3)
    row["in_time"] = round(len(answered) / len(load), 3)
    row["refused_early"] = round((outcome.refused + len(outcome.failures)) / len(load), 3)
    row["tokens_for_late_answers"] = sum(done.output_tokens for done in late)
    row["tokens_in_time_per_s"] = round(sum(done.output_tokens for done in answered) / (outcome.end_ns * 1e-9))
    return row


def deadlines(rates: Sequence[float] = (40, 55, 70, 110), seconds: float = 60.0) -> Result:
    """Requests with deadlines below, at and beyond what the machine can serve: told to the scheduler, which goes by
    them and refuses early, or only kept by clients that cancel. Every request names the length of its answer."""
    rows = []
    for rate in rates:
        arrivals = SHAREGPT_LIKE.arrivals(rate, seconds)
        load = [
            replace(one, timeout_ns=(URGENT_NS, PATIENT_NS)[number % 2], min_tokens=one.output_tokens - 1)
            for number, one in enumerate(arrivals)
        ]
        row: Result = {"profile": H200.name, "rate": rate}
        for name, tells in (("told", True), ("cancelled", False)):
            row[name] = in_time(Simulation([H200], load, config=config(H200, load), tells_deadlines=tells).run(), load)
        rows.append(row)
    return {"load": "sharegpt-like, Poisson, seed 0; deadlines of 4 s and 20 s in turn", "rows": rows}


def overcommitted(profile: WorkerProfile, arrivals: Sequence[Arrival], overcommit: float, host: float) -> WorkerProfile:
    """The profile with a pool of what its rows need at the mean final length, over `overcommit`, and a host arena of
    `host` pools."""
    mean = float(np.mean([len(one.prompt) + one.output_tokens for one in arrivals]))
    blocks = int(profile.max_num_seqs * mean / overcommit / profile.block_size)
    size = profile.block_bytes
    return replace(profile, kv_bytes=blocks * size, host_bytes=int(host * blocks) * size)


MODES: tuple[PreemptionMode, ...] = ("swap", "recompute", "auto")
PRESSURES = ((1.0, 2.0), (0.5, 2.0), (0.35, 2.0), (0.1, 2.0), (1.0, 0.25))
"""Link rate over the profile's, and host arena over KV pool."""


def one_mode(profile: WorkerProfile, load: Sequence[Arrival], mode: PreemptionMode) -> Result:
    simulation = Simulation([profile], load, config=config(profile, load, preemption_mode=mode))
    outcome, scheduler = simulation.run(), simulation.schedulers["0"]
    per_token = [(done.finished - done.first_token) // max(1, done.output_tokens - 1) for done in outcome.completions]
    return {
        "out_tok_s": round(outcome.output_tokens_per_second, 1),
        "time_per_output_token_ms": percentiles(per_token),
        "preemptions": outcome.preemptions,
        "most_preemptions_of_one": max(done.preemptions for done in outcome.completions),
        "predicted_ms": {mode: round(ns / 1e6, 1) for mode, ns in scheduler.predicted_ns.items()},
        "actual_ms": {mode: round(ns / 1e6, 1) for mode, ns in scheduler.actual_ns.items()},
    }


def preemption(
    overcommits: Sequence[float] = (1.5, 2.0, 4.0), pressures: Sequence[tuple[float, float]] = PRESSURES
) -> Result:
    """A batch of ShareGPT-like requests under memory pressure, by the mode of preemption."""
    rows = []
    a100 = replace(A100_OPT_13B_LEAN, max_num_seqs=64)
    for shape, profile, count in (("GQA", H200, 800), ("MHA", a100, 300)):
        generator = np.random.default_rng(1000)
        prompts, outputs = SHAREGPT_LIKE.prompt.draw(generator, count), SHAREGPT_LIKE.output.draw(generator, count)
        load = [Arrival(0, [0] * prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        for overcommit in overcommits:
            for link, host in pressures:
                sized = overcommitted(replace(profile, link_rate=link * profile.link_rate), load, overcommit, host)
                row: Result = {"profile": profile.name, "shape": shape, "overcommit": overcommit}
                row |= {"link_gb_s": round(sized.link_rate / 1e9, 1), "arena_over_pool": host}
                for mode in MODES:
                    row[mode] = one_mode(sized, load, mode)
                best = max(row["swap"]["out_tok_s"], row["recompute"]["out_tok_s"])
                row["auto_over_best"] = round(row["auto"]["out_tok_s"] / best, 4)
                rows.append(row)
    worst = min(row["auto_over_best"] for row in rows)
    note = "swaps do not overlap with steps in the simulation, which is to their disadvantage"
    return {"load": "sharegpt-like, all at once, seed 1000", "note": note, "worst_auto_over_best": worst, "rows": rows}


def preemption_speeds(pools: Sequence[int] = (1333, 1000, 500), num_speeds: int = 21) -> Result:
    """What `benchmarks.pressure` measured on an H100, on machines whose rates differ by up to 2 % either way: how far a
    99th percentile of 300 requests is chance."""
    jobs, arrivals = workloads.online(30.0, 300)
    load = [Arrival(int(at * 1e9), job.prompt, job.max_tokens) for job, at in zip(jobs, arrivals, strict=True)]
    rows = []
    for blocks in pools:
        size = H100.block_bytes
        sized = replace(H100, kv_bytes=blocks * size, host_bytes=4096 * size)
        found: dict[PreemptionMode, list[Result]] = {mode: [] for mode in MODES}
        for speed in np.linspace(0.98, 1.02, num_speeds):
            rates = {"memory_rate": speed * H100.memory_rate, "compute_rate": speed * H100.compute_rate}
            for mode in MODES:
                found[mode].append(one_mode(replace(sized, **rates), load, mode))
        row: Result = {"profile": H100.name, "num_blocks": blocks}
        for mode, each in found.items():
            late = sorted(one["time_per_output_token_ms"]["p99"] for one in each)
            row[mode] = {
                "out_tok_s": float(np.median([one["out_tok_s"] for one in each])),
                "time_per_output_token_p99_ms": {"median": late[num_speeds // 2], "least": late[0], "most": late[-1]},
            }
        rows.append(row)
    return {"load": "sharegpt-like, 300 requests at 30/s", "speeds": "0.98 to 1.02 of the rates", "rows": rows}


def conversations(count: int, turns: int, rate: float, seed: int) -> list[Arrival]:
    """Turns of conversations in random order, Poisson arrivals: each prompt is everything said before, and a question
    of 100 tokens. The first begins with 800 tokens of its own. The simulated model's answers are known beforehand."""
    generator = np.random.default_rng(seed)
    said = [generator.integers(10, 31_000, 800).tolist() for _ in range(count)]
    order = generator.permutation(np.repeat(np.arange(count), turns))
    times = np.cumsum(generator.exponential(1 / rate, len(order)))
    arrivals = []
    for number, at in zip(order, times, strict=True):
        prompt = [*said[number], *generator.integers(10, 31_000, 100).tolist()]
        answer = int(generator.integers(50, 250))
        arrivals.append(Arrival(int(at * 1e9), prompt, answer))
        said[number] = [*prompt, *[TOKEN] * (answer - 1), STOP]
    return arrivals


def host_tier(counts: Sequence[int] = (40, 80, 160), links: Sequence[float] = (1.0, 0.1)) -> Result:
    """Conversations that come back, in a pool that holds a part of them, with and without the second tier."""
    rows = []
    for count in counts:
        load = conversations(count, 8, 8.0, seed=11)
        tokens = sum(len(one.prompt) for one in load)
        for link in links:
            profile = replace(H200, kv_bytes=8 * GIB, host_bytes=64 * GIB, link_rate=link * H200.link_rate)
            for on in (False, True):
                settings = replace(config(profile, load), prefix_cache=True, host_prefix_cache=on)
                simulation = Simulation([profile], load, config=settings, keeps_gaps=True)
                outcome, scheduler = simulation.run(), simulation.schedulers["0"]
                rows.append(
                    {
                        "conversations": count,
                        "pool_over_history": round(8 * GIB / profile.model.kv_token_bytes / (count * 2800), 2),
                        "link_gb_s": round(profile.link_rate / 1e9, 1),
                        "host_tier": on,
                        "found_in_pool": round(scheduler.hit_tokens_total / tokens, 3),
                        "found_in_arena": round(scheduler.host_hit_tokens_total / tokens, 3),
                        **latencies(outcome),
                    }
                )
    return {"profile": H200.name, "load": "conversations of 8 turns at 8 turns/s, seed 11", "rows": rows}


class PlansAhead(Scheduler):
    """Never waits for a result while there is anything to plan."""

    def _waits_for_beams(self) -> bool:
        return False


POLICIES: dict[str, type[Scheduler]] = {"ahead": PlansAhead, "gathered": Scheduler}
ROWS, GROUP = 72, 4
"""As `benchmarks.policy_measured` has them: all rows of a load, and those of one request that belong together."""
KINDS: tuple[tuple[str, ...], ...] = (
    ("greedy",),
    ("samples",),
    ("beams",),
    ("greedy", "samples", "beams"),
    ("greedy", "beams"),
)
AGAIN_NS = 60_000_000_000
"""When the same load comes again, so that its prompts are found."""


def in_groups(kinds: Sequence[str], tokens: int, at_ns: int) -> list[Arrival]:
    """Every kind its share of the rows, all at once: prompts of 512 tokens."""
    widths: dict[str, dict[str, Any]] = {"greedy": {}, "samples": {"n": GROUP}, "beams": {"beam_width": GROUP}}
    generator = np.random.default_rng(12)
    return [
        Arrival(at_ns, generator.integers(10, 31_000, 512).tolist(), tokens, **widths[kind])
        for kind in kinds
        for _ in range(ROWS // len(kinds) // (1 if kind == "greedy" else GROUP))
    ]


def gathering(
    waits_ms: Sequence[float] = (0.2, 1.0, 1.5, 2.0, 4.0), loads: Sequence[Sequence[str]] = KINDS, tokens: int = 256
) -> Result:
    """What `benchmarks.policy_measured --experiment groups` measures, by the time from a result to the step that was
    planned after it: plans that are always made ahead, and those that wait for beams where that pays."""
    rows = []
    for wait_ms in waits_ms:
        profile = replace(H100, link_delay_ns=round(wait_ms * 1e6 / 2))
        for kinds in loads:
            load = [one for at_ns in (0, AGAIN_NS) for one in in_groups(kinds, tokens, at_ns)]
            row: Result = {"profile": profile.name, "wait_ms": wait_ms, "kinds": list(kinds)}
            for name, policy in POLICIES.items():
                row[name] = decoding(profile, load, policy)
            rows.append(row)
    return {"load": f"{ROWS} rows at once, groups of {GROUP}, prompts found, {tokens} tokens each", "rows": rows}


def gathering_online(
    loads: Sequence[tuple[float, float]] = ((10, 0.2), (16, 0.1)),
    waits_ms: Sequence[float] = (1.0, 2.0),
    targets_ms: Sequence[int] = (0, 10),
    seconds: float = 40.0,
) -> Result:
    """The same where prompts come all the time: ShareGPT-like requests, of which a share are searches."""
    rows = []
    for rate, share in loads:
        searches = np.random.default_rng(13).random(round(2 * rate * seconds)) < share
        arrivals = [
            replace(one, beam_width=GROUP if is_search else 1)
            for one, is_search in zip(SHAREGPT_LIKE.arrivals(rate, seconds), searches, strict=False)
        ]
        for wait_ms in waits_ms:
            profile = replace(H100, link_delay_ns=round(wait_ms * 1e6 / 2))
            for target_ms in targets_ms:
                settings = config(profile, arrivals, target_itl_ns=target_ms * 1_000_000)
                row: Result = {"rate": rate, "searches": share, "wait_ms": wait_ms, "target_itl_ms": target_ms}
                for name, policy in POLICIES.items():
                    simulation = Simulation(
                        [profile], arrivals, config=settings, make_scheduler=policy, keeps_gaps=True
                    )
                    row[name] = beside_searches(simulation)
                rows.append(row)
    return {"profile": H100.name, "load": f"sharegpt-like, {seconds:g} s of Poisson arrivals, seed 0", "rows": rows}


def beside_searches(simulation: Simulation) -> Result:
    """What streams and searches get; a search is told all at once."""
    outcome = simulation.run()
    greedy = [done for done in outcome.completions if kind_of(done) == "greedy"]
    searches = [done for done in outcome.completions if kind_of(done) == "beams"]
    return {
        "steps": outcome.workers[0].steps,
        "beams_ms_per_token": percentiles([round(done.normalized_ns) for done in searches]),
        "greedy_itl_ms": percentiles([gap for gap in outcome.token_gaps if gap]),
        "greedy_ttft_ms": percentiles([done.first_token_ns for done in greedy]),
    }


def kind_of(done: Completion) -> str:
    return "beams" if done.beam_width > 1 else "samples" if done.n > 1 else "greedy"


def decoding(profile: WorkerProfile, load: Sequence[Arrival], policy: type[Scheduler]) -> Result:
    """The second time of a load that comes twice: per token of all and of each kind, and of all rows together."""
    settings = replace(config(profile, load), prefix_cache=True, host_prefix_cache=False)
    outcome = Simulation([profile], load, config=settings, make_scheduler=policy).run()
    again = [done for done in outcome.completions if done.arrived == AGAIN_NS]
    ended: dict[str, int] = {}
    for done in again:
        ended[kind_of(done)] = max(ended.get(kind_of(done), 0), done.finished - AGAIN_NS)
    tokens, last = again[0].output_tokens, max(ended.values())
    rows = sum(max(done.n, done.beam_width) for done in again)
    return {
        "ms_per_token": round(last / tokens / 1e6, 2),
        "ms_per_token_of": {kind: round(ns / tokens / 1e6, 2) for kind, ns in sorted(ended.items())},
        "row_tok_s": round(rows * tokens / (last * 1e-9)),
    }


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "chunking": chunking,
    "fairness": fairness,
    "deadlines": deadlines,
    "preemption": preemption,
    "preemption_speeds": preemption_speeds,
    "host_tier": host_tier,
    "gathering": gathering,
    "gathering_online": gathering_online,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="NAME")
    names = parser.parse_args().names
    for name in EXPERIMENTS if "all" in names else names:
        report = {
            "kind": "simulated: the real scheduler core, a virtual clock, a cost model of the worker",
            "command": f"python -m benchmarks.policy {name}",
            "commit": commit(),
            "python": platform.python_version(),
            **EXPERIMENTS[name](),
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        for row in report["rows"]:
            print(row)


if __name__ == "__main__":
    main()
