"""One function per experiment; each returns what goes into its JSON file beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.paper import published
from benchmarks.paper.beams import CERTAINTY, LOADS, WIDTHS, saved_blocks
from benchmarks.paper.policies import (
    BOUND,
    ORCA_MAX,
    ORCA_ORACLE,
    ORCAS,
    PAGEWIRE,
    POLICIES,
    Policy,
    remembered,
    simulate,
    sustained_rate,
)
from benchmarks.simulator.memory import SlotStates, slot_states
from benchmarks.simulator.profiles import (
    A100_LLAMA_13B,
    A100_OPT_13B,
    A100_OPT_13B_LEAN,
    GIB,
    H200_LLAMA_8B,
    WorkerProfile,
    prefill_load,
)
from benchmarks.simulator.simulation import Arrival, Outcome
from benchmarks.simulator.traces import ALPACA_LIKE, SHAREGPT_LIKE, Load, poisson
from pagewire.bench.workloads import Lengths
from pagewire.simulation.batch import StepLoad
from scheduler.policy import PreemptionMode
from scheduler.scheduler import Scheduler

Result = dict[str, Any]

SHAREGPT_SECONDS = 900.0
ALPACA_SECONDS = 300.0
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def seconds_of(load: Load) -> float:
    return SHAREGPT_SECONDS if load is SHAREGPT_LIKE else ALPACA_SECONDS


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def figures(outcome: Outcome) -> Result:
    """What explains a latency."""
    done = outcome.completions
    return {
        "normalized_latency_s": rounded(outcome.normalized_latency),
        "p50_s": rounded(float(np.median([each.normalized_ns for each in done])) / 1e9),
        "batched": rounded(outcome.mean_rows),
        "out_tok_s": rounded(outcome.output_tokens_per_second),
        "preemptions": outcome.preemptions,
        "utilisation": rounded(outcome.utilisation),
        "requests": len(done),
    }


# ---------------------------------------------------------------------- figure 2


def waste() -> Result:
    """What the token slots hold while requests queue, averaged over time."""
    ours: Result = {}
    for policy in (*ORCAS, PAGEWIRE):
        shares = {"tokens": 0.0, "reserved": 0.0, "internal": 0.0, "other": 0.0}
        weight = 0

        def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
            nonlocal weight
            if scheduler.waiting and scheduler.last_step % 8 == 0:
                weight += duration
                for state, share in slot_states(scheduler).shares().items():
                    shares[state] += share * duration  # noqa: B023

        arrivals = SHAREGPT_LIKE.arrivals(4.0, 450.0)
        simulate(policy, A100_OPT_13B, arrivals, observer=observe, give_up_ns=450_000_000_000)
        ours[policy.name] = {state: round(100 * share / weight, 1) for state, share in shares.items()}
    return {
        "paper": published.WASTE,
        "ours": ours,
        "unit": "percent of the KV pool: tokens; reserved for tokens to come; internal fragmentation; other (free, "
        "between chunks, rounding of chunks to powers of two)",
        "profile": A100_OPT_13B.name,
        "load": "sharegpt-like at 4 requests/s, 450 s, moments at which requests wait",
        "states": SlotStates.__doc__,
    }


# ---------------------------------------------------------------------- figure 12


def latency_curve(policy: Policy, profile: WorkerProfile, load: Load, rates: list[float]) -> list[Result]:
    curve = []
    for rate in rates:
        outcome = simulate(policy, profile, load.arrivals(rate, seconds_of(load)))
        curve.append({"rate": rate, **figures(outcome)})
        if outcome.normalized_latency > 1.0:
            break
    return curve


def find_sustained(
    policy: Policy,
    profile: WorkerProfile,
    load: Load,
    start: float,
    *,
    n: int = 1,
    beam_width: int = 1,
    seconds: float | None = None,
    seed: int = 0,
    bound: float = BOUND,
) -> float:
    def latency_at(rate: float) -> float:
        arrivals = load.arrivals(rate, seconds or seconds_of(load), n=n, beam_width=beam_width, seed=seed)
        return simulate(policy, profile, arrivals).normalized_latency

    return sustained_rate(remembered(latency_at), start, bound)


STARTS = {
    ("sharegpt-like", "static-batcher"): 0.1,
    ("sharegpt-like", "orca-max"): 0.5,
    ("sharegpt-like", "orca-pow2"): 0.8,
    ("sharegpt-like", "orca-oracle"): 1.1,
    ("sharegpt-like", "pagewire"): 2.0,
    ("alpaca-like", "static-batcher"): 0.8,
    ("alpaca-like", "orca-max"): 3.0,
    ("alpaca-like", "orca-pow2"): 16.0,
    ("alpaca-like", "orca-oracle"): 22.0,
    ("alpaca-like", "pagewire"): 30.0,
}

RATES = {
    "sharegpt-like": [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 3.0],
    "alpaca-like": [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 14.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0, 32.0, 36.0],
}


def ratios(sustained: dict[str, float]) -> Result:
    best = sustained["pagewire"]
    return {
        f"over_{name.replace('-', '_')}": round(best / rate, 2)
        for name, rate in sustained.items()
        if name != "pagewire"
    }


def latency_vs_rate() -> Result:
    """Normalized latency by rate, and the rate that each policy sustains."""
    ours: Result = {}
    for load in (SHAREGPT_LIKE, ALPACA_LIKE):
        curves = {p.name: latency_curve(p, A100_OPT_13B, load, RATES[load.name]) for p in POLICIES}
        rates = {p.name: find_sustained(p, A100_OPT_13B, load, STARTS[load.name, p.name]) for p in POLICIES}
        entry: Result = {
            "curves": curves,
            "sustained_per_s": {name: rounded(rate, 3) for name, rate in rates.items()},
            **ratios(rates),
        }
        compared = (ORCA_MAX, ORCA_ORACLE, PAGEWIRE)
        entry["other_seeds"] = [
            ratios({p.name: find_sustained(p, A100_OPT_13B, load, rates[p.name], seed=seed) for p in compared})
            for seed in (1, 2)
        ]
        entry["other_bounds"] = {
            str(bound): ratios(
                {p.name: find_sustained(p, A100_OPT_13B, load, rates[p.name], bound=bound) for p in compared}
            )
            for bound in (0.1, 0.5)
        }
        entry["lean_engine"] = ratios(
            {p.name: find_sustained(p, A100_OPT_13B_LEAN, load, 1.5 * rates[p.name]) for p in (*ORCAS, PAGEWIRE)}
        )
        ours[load.name] = entry
    return {
        "paper": published.SUSTAINED,
        "ours": ours,
        "headline": {
            "sharegpt_over_orca_max": ours["sharegpt-like"]["over_orca_max"],
            "sharegpt_over_orca_oracle": ours["sharegpt-like"]["over_orca_oracle"],
            "alpaca_over_orca_max": ours["alpaca-like"]["over_orca_max"],
        },
        "profile": A100_OPT_13B.name,
        "bound_s_per_token": BOUND,
        "load": "15 minutes of ShareGPT-like, 5 minutes of Alpaca-like arrivals per point",
    }


# ---------------------------------------------------------------------- figure 13


def batched_requests() -> Result:
    """Requests in a step, averaged over time, while arrivals last."""
    ours: Result = {}
    for load, rate in ((SHAREGPT_LIKE, 2.0), (ALPACA_LIKE, 30.0)):
        seconds = seconds_of(load)
        entry = {}
        for policy in (*ORCAS, PAGEWIRE):
            outcome = simulate(
                policy, A100_OPT_13B, load.arrivals(rate, seconds), give_up_ns=round(seconds * 1_000_000_000)
            )
            entry[policy.name] = round(outcome.mean_rows, 2)
        ours[f"{load.name} at {rate:g}/s"] = entry
    return {
        "paper": published.BATCHED,
        "ours": ours,
        "profile": A100_OPT_13B.name,
        "note": "the profile's two overheads are fitted to the paper's two numbers for its own engine; the numbers of "
        "the Orca policies are predictions",
    }


# ---------------------------------------------------------------------- figure 15


BEAM_SECONDS = 100.0
OTHER_CERTAINTIES = (0.5, 0.7, 0.9, 0.97)


def of_searches(policy: Policy, start: float, width: int) -> float:
    """The sustained rate of Alpaca-like beam searches, over 100 seconds per point: they take the simulator longer. Orca
    would also have to copy the KV of a beam that another continues, which costs it nothing here."""
    return find_sustained(
        policy, A100_OPT_13B, ALPACA_LIKE, start / width, n=width, beam_width=width, seconds=BEAM_SECONDS
    )


def sharing() -> Result:
    """Blocks that parallel samples of a prompt, and the beams of a search, save by sharing."""
    ours: Result = {}
    for load, rate, seconds in LOADS:
        samples = {n: load.arrivals(rate, seconds, n=n) for n in WIDTHS}
        searches = {width: load.arrivals(rate, seconds, n=width, beam_width=width) for width in WIDTHS}
        by_certainty = {
            certainty: {str(width): saved_blocks(arrivals, certainty) for width, arrivals in searches.items()}
            for certainty in (CERTAINTY, *OTHER_CERTAINTIES)
        }
        ours[load.name] = {
            "parallel": {str(n): saved_blocks(arrivals) for n, arrivals in samples.items()},
            "beam": by_certainty[CERTAINTY],
            "beam_by_other_certainty": {str(other): by_certainty[other] for other in OTHER_CERTAINTIES},
        }
    over_oracle = {
        str(n): round(
            find_sustained(PAGEWIRE, A100_OPT_13B, ALPACA_LIKE, 30.0 / n, n=n)
            / find_sustained(ORCA_ORACLE, A100_OPT_13B, ALPACA_LIKE, 22.0 / n, n=n),
            2,
        )
        for n in WIDTHS
    }
    ours["alpaca-like"]["sustained_over_orca_oracle"] = over_oracle
    ours["alpaca-like"]["sustained_over_orca_oracle_by_beams"] = {
        str(width): round(of_searches(PAGEWIRE, 24.0, width) / of_searches(ORCA_ORACLE, 14.0, width), 2)
        for width in WIDTHS
    }
    return {
        "paper": published.SHARING,
        "ours": ours,
        "profile": A100_OPT_13B.name,
        "certainty": CERTAINTY,
        "note": "beam searches ask a synthetic model (benchmarks/simulator/likelihoods.py); certainty is the mean "
        "probability of its likeliest token, chosen by the beams of a real model (real_beams.json); no figure was "
        "fitted to the paper's",
    }


# ---------------------------------------------------------------------- figure 16

WMT_SOURCE, WMT_TARGET = Lengths(34, 0.5, 128), Lengths(48, 0.5, 192)


def prefixed_arrivals(prefix: int, rate: float, seconds: float) -> list[Arrival]:
    """Translation requests: the same `prefix` tokens, then a sentence of its own."""
    times = poisson(rate, seconds)
    generator = np.random.default_rng(9)
    sources, targets = WMT_SOURCE.draw(generator, len(times)), WMT_TARGET.draw(generator, len(times))
    shared = list(range(10, 10 + prefix))
    # The first token of a sentence tells it from the others; more is not needed, because prompts differ from there on.
    return [
        Arrival(at, [*shared, 1000 + number, *([7] * (source - 1))], target)
        for number, (at, source, target) in enumerate(zip(times, sources, targets, strict=True))
    ]


def shared_prefix() -> Result:
    """Prefix cache against Orca (Oracle), which computes and keeps the prefix per request."""
    ours: Result = {}
    for name, prefix in (("one-shot, 80 tokens", 80), ("five-shot, 341 tokens", 341)):
        rates: Result = {}
        for policy, cache, start in ((ORCA_ORACLE, False, 14.0), (PAGEWIRE, False, 20.0), (PAGEWIRE, True, 30.0)):

            def latency_at(rate: float, policy: Policy = policy, cache: bool = cache, prefix: int = prefix) -> float:
                arrivals = prefixed_arrivals(prefix, rate, 120.0)
                return simulate(policy, A100_LLAMA_13B, arrivals, prefix_cache=cache).normalized_latency

            label = policy.name + (", prefix cache" if cache else "")
            rates[label] = rounded(sustained_rate(remembered(latency_at), start), 3)
        ours[name] = {
            "sustained_per_s": rates,
            "over_orca_oracle": round(rates["pagewire, prefix cache"] / rates["orca-oracle"], 2),
            "of_which_without_prefix_cache": round(rates["pagewire"] / rates["orca-oracle"], 2),
        }
    return {
        "paper": published.SHARED_PREFIX,
        "ours": ours,
        "profile": A100_LLAMA_13B.name,
        "bound_s_per_token": BOUND,
        "assumed": "sentences of 34 tokens in and 48 out on average, lognormal with sigma 0.5: the paper gives none",
    }


# ---------------------------------------------------------------------- figure 17

MOST_ROUNDS = 8
CONTEXT = 1024


def chat_arrivals(rate: float, seconds: float) -> list[Arrival]:
    """Some round of some conversation: the prompt is the last 1024 tokens of what was said before and the question."""
    times = poisson(rate, seconds)
    generator = np.random.default_rng(11)
    arrivals = []
    for at in times:
        rounds = int(generator.integers(1, MOST_ROUNDS + 1))
        questions = SHAREGPT_LIKE.prompt.draw(generator, rounds)
        answers = SHAREGPT_LIKE.output.draw(generator, rounds)
        prompt = min(CONTEXT, sum(questions) + sum(answers[:-1]))
        arrivals.append(Arrival(at, [0] * prompt, min(CONTEXT, answers[-1])))
    return arrivals


def chatbot() -> Result:
    """Long prompts: sustained rate, KV not kept between rounds."""
    curves: Result = {}
    rates: dict[str, float] = {}
    for policy, start in (*((orca, 0.5) for orca in ORCAS), (PAGEWIRE, 0.9)):

        def latency_at(rate: float, policy: Policy = policy) -> float:
            return simulate(policy, A100_OPT_13B, chat_arrivals(rate, SHAREGPT_SECONDS)).normalized_latency

        known = remembered(latency_at)
        rates[policy.name] = sustained_rate(known, start)
        curves[policy.name] = [
            {"rate": rate, "normalized_latency_s": rounded(known(rate))} for rate in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
        ]
    batched = {
        policy.name: round(
            simulate(policy, A100_OPT_13B, chat_arrivals(1.5, 450.0), give_up_ns=450 * 10**9).mean_rows, 1
        )
        for policy in (*ORCAS, PAGEWIRE)
    }
    prompts = [len(arrival.prompt) for arrival in chat_arrivals(1.0, SHAREGPT_SECONDS)]
    return {
        "paper": published.CHATBOT,
        "ours": {
            "sustained_per_s": {name: rounded(rate, 3) for name, rate in rates.items()},
            **ratios(rates),
            "curves": curves,
            "batched_when_overloaded": batched,
            "prompts_of_1024_tokens": round(sum(length == CONTEXT for length in prompts) / len(prompts), 2),
        },
        "profile": A100_OPT_13B.name,
        "bound_s_per_token": BOUND,
        "assumed": f"a round of 1 to {MOST_ROUNDS}, equally likely, of a conversation with ShareGPT-like lengths",
    }


# ---------------------------------------------------------------------- figure 18


def block_size() -> Result:
    """Normalized latency by block size at one rate; kernels are taken to run equally well at every size."""
    ours: Result = {}
    for load, rate in ((SHAREGPT_LIKE, 2.0), (ALPACA_LIKE, 30.0)):
        ours[f"{load.name} at {rate:g}/s"] = {
            str(size): figures(
                simulate(PAGEWIRE, A100_OPT_13B.with_block_size(size), load.arrivals(rate, seconds_of(load)))
            )
            for size in BLOCK_SIZES
        }
    return {
        "paper": published.BLOCK_SIZE,
        "ours": ours,
        "profile": A100_OPT_13B.name,
        "note": "memory only: that kernels lose speed with small blocks is not in the model",
    }


# ---------------------------------------------------------------------- figure 19


def micro(profile: WorkerProfile, num_tokens: int) -> Result:
    """Milliseconds to swap out and in again, and to recompute, by block size; and from which size on swapping wins.

    Alone, recomputing pays for a step of its own. Among others it only adds to a step that runs anyway, which has
    read the weights and paid the overhead already: that is the case of a preempted sequence."""
    rows: Result = {}
    alone = profile.recompute_ns(num_tokens) / 1e6
    decode = StepLoad(decode_tokens=32, decode_context=32 * 400)
    chunk = prefill_load(num_tokens)
    both = replace(chunk, decode_tokens=decode.decode_tokens, decode_context=decode.decode_context)
    among = (profile.forward_ns(both) - profile.forward_ns(decode)) / 1e6
    for size in BLOCK_SIZES:
        sized = profile.with_block_size(size)
        rows[str(size)] = rounded(2 * sized.swap_ns(-(-num_tokens // size)) / 1e6)
    return {
        "tokens": num_tokens,
        "swap_ms_by_block_size": rows,
        "recompute_alone_ms": rounded(alone),
        "recompute_among_others_ms": rounded(among),
        "swap_wins_from_block_size": {
            "alone": next((int(size) for size, swap in rows.items() if swap < alone), None),
            "among_others": next((int(size) for size, swap in rows.items() if swap < among), None),
        },
    }


def under_pressure(profile: WorkerProfile, rate: float, seconds: float) -> Result:
    """End to end with every mode at a rate that overcommits the memory."""
    rows: Result = {}
    for size in BLOCK_SIZES:
        sized = profile.with_block_size(size)
        entry: Result = {}
        modes: tuple[PreemptionMode, ...] = ("swap", "recompute", "auto")
        for mode in modes:
            outcome = simulate(PAGEWIRE, sized, SHAREGPT_LIKE.arrivals(rate, seconds), preemption_mode=mode)
            entry[mode] = figures(outcome)
        rows[str(size)] = entry
    return rows


def swap_vs_recompute() -> Result:
    """What bringing a preempted sequence back costs, by block size."""
    per_layer = replace(A100_OPT_13B, name="a100 per layer", copies_per_block=2 * A100_OPT_13B.model.num_layers)
    ours: Result = {
        "micro": {
            "a100-opt-13b, keys and values copied per layer (the paper's layout)": micro(per_layer, 256),
            "a100-opt-13b, one copy per block (our layout)": micro(A100_OPT_13B, 256),
            "h200-llama-3.1-8b, one copy per block (our layout)": micro(H200_LLAMA_8B, 256),
            "h200-llama-3.1-8b, 2048 tokens": micro(H200_LLAMA_8B, 2048),
        },
        "end_to_end, paper's layout, sharegpt-like at 2.2/s": under_pressure(per_layer, 2.2, 450.0),
        "end_to_end, our layout, sharegpt-like at 2.2/s": under_pressure(A100_OPT_13B, 2.2, 450.0),
    }
    return {
        "paper": published.SWAP_VS_RECOMPUTE,
        "ours": ours,
        "note": "rates and the overhead per copy are assumed until they are measured; swaps do not overlap with steps",
    }


# ---------------------------------------------------------------------- our own machine


def h200() -> Result:
    """Sustained rates on an H200 with a grouped-query model, by the longest sequence and the size of the pool."""
    bound, seconds = 0.05, 40.0
    ours: Result = {}
    for longest, gib in ((2048, 96), (8192, 96), (2048, 12)):
        model = replace(H200_LLAMA_8B.model, max_model_len=longest)
        profile = replace(H200_LLAMA_8B, kv_bytes=gib * GIB, host_bytes=16 * GIB, model=model)
        rates: dict[str, float] = {}
        batched: Result = {}
        for policy in (ORCA_MAX, ORCA_ORACLE, PAGEWIRE):

            def latency_at(rate: float, policy: Policy = policy, profile: WorkerProfile = profile) -> float:
                return simulate(policy, profile, SHAREGPT_LIKE.arrivals(rate, seconds)).normalized_latency

            rate = rates[policy.name] = sustained_rate(remembered(latency_at), 60.0, bound, tolerance=0.05)
            batched[policy.name] = rounded(simulate(policy, profile, SHAREGPT_LIKE.arrivals(rate, seconds)).mean_rows)
        ours[f"{gib} GiB of KV, sequences up to {longest}"] = {
            "sustained_per_s": {name: rounded(rate, 3) for name, rate in rates.items()},
            "batched": batched,
            **ratios(rates),
        }
    return {
        "paper": None,
        "ours": ours,
        "profile": H200_LLAMA_8B.name,
        "bound_s_per_token": bound,
        "load": f"sharegpt-like, {seconds:g} s per point, at most {H200_LLAMA_8B.max_num_seqs} sequences",
        "note": "overheads are assumed until a run is recorded",
    }


def real_beams() -> Result:
    """How far apart a real model's beams are."""
    from benchmarks.paper import real_beams as experiment  # needs torch

    return experiment.real_beams()


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "waste": waste,
    "latency_vs_rate": latency_vs_rate,
    "batched_requests": batched_requests,
    "sharing": sharing,
    "real_beams": real_beams,
    "shared_prefix": shared_prefix,
    "chatbot": chatbot,
    "block_size": block_size,
    "swap_vs_recompute": swap_vs_recompute,
    "h200": h200,
}
