"""What the scheduler tells Prometheus, and the page that tells it.

Counting costs plain additions on plain integers: everything is rendered when somebody asks. Latencies that every token
has are observed once per step, with the number of tokens as the weight.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from scheduler.loads import Loads, WorkerLoads

NS_PER_S = 1_000_000_000

# Seconds. Latencies of a request: from a warm small model's to a queue's; of a token and of a step: finer and lower.
REQUEST_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
STEP_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Histogram:
    """Counts per bucket, with weighted observations."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` are the buckets' upper limits in seconds, ascending, without infinity."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Counts `times` observations of the same value."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper limit, as Prometheus wants them."""
        cumulative = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            cumulative += count
            rows.append((bound, float(cumulative)))
        return rows


def _by_label(bounds: Sequence[float]) -> Callable[[], defaultdict[str, Histogram]]:
    return lambda: defaultdict(lambda: Histogram(bounds))


@dataclass
class Metrics:
    """What has happened since the scheduler started. The engine adds, the page reads."""

    prompt_tokens: int = 0
    """Prompt tokens of requests that began to run."""
    generation_tokens: int = 0
    """Tokens accepted into sequences."""
    finished: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Sequences that ended, by finish reason in lower case."""
    swap_bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """KV bytes copied, by direction: out, in."""
    swap_ns: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Nanoseconds that workers spent on them, by direction."""
    idle_ns: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Nanoseconds that a worker's device waited for a plan, by worker."""
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    step_time: defaultdict[str, Histogram] = field(default_factory=_by_label(STEP_BUCKETS))
    """By part: plan, wire, forward, sample."""
    stale_results: int = 0
    """Results that arrived on a stream after it was given up; the core counts the others."""
    past: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    """What workers had counted when they left, by counter and mode, so that totals never fall."""

    def retire(self, worker: WorkerLoads) -> None:
        """Keeps the counters of a worker that leaves."""
        self.idle_ns.pop(worker.worker_id, None)
        for key, value in _counters(worker):
            self.past[key] += value


def _counters(worker: WorkerLoads) -> Iterator[tuple[tuple[str, str], int]]:
    """The counters that the core keeps per worker: ((counter, mode), value)."""
    for mode, count in worker.preemptions_total.items():
        yield ("preemptions", mode), count
    for mode, nanoseconds in worker.preemption_cost_predicted_ns.items():
        yield ("predicted_ns", mode), nanoseconds
    for mode, nanoseconds in worker.preemption_cost_actual_ns.items():
        yield ("actual_ns", mode), nanoseconds
    yield ("queries", ""), worker.prefix_cache_query_tokens_total
    yield ("hits", "gpu"), worker.prefix_cache_hit_tokens_total
    yield ("hits", "host"), worker.prefix_cache_host_hit_tokens_total


class SchedulerCollector(Collector):
    """Renders `Metrics` and the core's own figures when the page is asked for."""

    def __init__(self, metrics: Metrics, read_loads: Callable[[], Loads]) -> None:
        self._metrics = metrics
        self._read_loads = read_loads

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not call into the core."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families, with consistent values: nothing else runs meanwhile."""
        loads = self._read_loads()
        yield from _gauges(loads)
        yield from self._core_counters(loads)
        yield from self._own_counters(loads)
        yield from self._histograms()

    def _core_counters(self, loads: Loads) -> Iterator[Metric]:
        totals = defaultdict(int, self._metrics.past)
        for worker in loads.workers:
            for key, value in _counters(worker):
                totals[key] += value
        preemptions = CounterMetricFamily(
            "pagewire_preemptions", "Sequence groups moved out of GPU memory.", labels=["mode"]
        )
        cost = SummaryMetricFamily(
            "pagewire_preemption_cost_seconds",
            "Predicted and actual cost of preemptions; recomputing after lost workers is in the actual one.",
            labels=["mode", "kind"],
        )
        for mode in ("swap", "recompute"):
            count = totals["preemptions", mode]
            preemptions.add_metric([mode], count)
            for kind in ("predicted", "actual"):
                cost.add_metric([mode, kind], count, totals[f"{kind}_ns", mode] / NS_PER_S)
        yield preemptions
        yield cost
        queries = CounterMetricFamily("pagewire_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        queries.add_metric([], totals["queries", ""])
        yield queries
        hits = CounterMetricFamily(
            "pagewire_prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels=["tier"]
        )
        for tier in ("gpu", "host"):
            hits.add_metric([tier], totals["hits", tier])
        yield hits

    def _own_counters(self, loads: Loads) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter("prompt_tokens", "Prompt tokens of requests that began to run.", metrics.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", metrics.generation_tokens)
        stale = loads.stale_results_total + metrics.stale_results
        yield _counter("stale_results", "Step results ignored because they were old or unasked for.", stale)
        success = CounterMetricFamily(
            "pagewire_request_success", "Sequences that ended, by finish reason.", labels=["finish_reason"]
        )
        for reason in ("stop", "length", "cancelled", "deadline", "error", "parked"):
            success.add_metric([reason], metrics.finished[reason])
        yield success
        moved = CounterMetricFamily("pagewire_swap_bytes", "KV bytes swapped.", labels=["direction"])
        spent = CounterMetricFamily("pagewire_swap_seconds", "Time workers spent on swaps.", labels=["direction"])
        for direction in ("out", "in"):
            moved.add_metric([direction], metrics.swap_bytes[direction])
            spent.add_metric([direction], metrics.swap_ns[direction] / NS_PER_S)
        yield moved
        yield spent
        idle = CounterMetricFamily(
            "pagewire_worker_gpu_idle_seconds", "Time a worker's device waited for a plan.", labels=["worker"]
        )
        for worker in loads.workers:
            idle.add_metric([worker.worker_id], metrics.idle_ns.get(worker.worker_id, 0) / NS_PER_S)
        yield idle

    def _histograms(self) -> Iterator[Metric]:
        metrics = self._metrics
        named = [
            ("time_to_first_token_seconds", "Acceptance to first token.", metrics.time_to_first_token),
            ("inter_token_latency_seconds", "Time between tokens of a stream, by step.", metrics.inter_token_latency),
            ("e2e_request_latency_seconds", "Acceptance to the end of a request.", metrics.e2e_latency),
            ("request_queue_seconds", "Acceptance to the first step that ran a request.", metrics.queue_time),
        ]
        for name, text, histogram in named:
            family = HistogramMetricFamily(f"pagewire_{name}", text)
            family.add_metric([], histogram.buckets(), histogram.total)
            yield family
        parts = HistogramMetricFamily("pagewire_step_seconds", "Where the time of a step goes.", labels=["part"])
        for part in ("plan", "wire", "forward", "sample"):
            histogram = metrics.step_time[part]
            parts.add_metric([part], histogram.buckets(), histogram.total)
        yield parts


def _counter(name: str, text: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(f"pagewire_{name}", text, value=value)


def _gauges(loads: Loads) -> Iterator[Metric]:
    counts = [
        ("requests_running", "Requests with sequences on a worker.", loads.running),
        ("requests_waiting", "Requests that wait to run or to be recomputed.", loads.waiting + loads.preempted),
        ("requests_swapped", "Preempted requests whose KV is in a host arena.", loads.swapped),
        ("requests_parked", "Requests that wait to be continued: parked, or held after their end.", loads.parked),
    ]
    for name, text, value in counts:
        yield GaugeMetricFamily(f"pagewire_{name}", text, value=value)
    usage = GaugeMetricFamily("pagewire_kv_cache_usage_ratio", "Used share of a KV pool, 0..1.", labels=["worker"])
    blocks = GaugeMetricFamily("pagewire_kv_blocks", "Blocks of a KV pool or host arena.", labels=["worker", "state"])
    epoch = GaugeMetricFamily("pagewire_worker_epoch", "Epoch of a worker's stream.", labels=["worker"])
    waste = GaugeMetricFamily(
        "pagewire_kv_waste_ratio", "Allocated slots that hold no token over allocated slots.", labels=["worker"]
    )
    lead = GaugeMetricFamily(
        "pagewire_plan_lead_seconds",
        "How long before a worker needs it a plan is made, while requests keep coming; by the step before it.",
        labels=["worker", "behind"],
    )
    wait = GaugeMetricFamily(
        "pagewire_gathering_wait_seconds",
        "For how long a worker is idle when a plan waits for the result of the step before it, to have its beams too.",
        labels=["worker"],
    )
    for worker in loads.workers:
        name = worker.worker_id
        total = worker.kv_blocks_free + worker.kv_blocks_used
        usage.add_metric([name], worker.kv_blocks_used / total if total else 0.0)
        blocks.add_metric([name, "used"], worker.kv_blocks_used)
        blocks.add_metric([name, "cached"], worker.kv_blocks_cached)
        blocks.add_metric([name, "free"], worker.kv_blocks_free - worker.kv_blocks_cached)
        blocks.add_metric([name, "host_used"], worker.host_blocks_used)
        blocks.add_metric([name, "host_cached"], worker.host_blocks_cached)
        blocks.add_metric([name, "host_free"], worker.host_blocks_free - worker.host_blocks_cached)
        epoch.add_metric([name], worker.epoch)
        waste.add_metric([name], worker.kv_waste_ratio)
        for behind, lead_ns in worker.plan_lead_ns.items():
            lead.add_metric([name, behind], lead_ns / NS_PER_S)
        wait.add_metric([name], worker.gathering_wait_ns / NS_PER_S)
    yield from (usage, blocks, epoch, waste, lead, wait)
