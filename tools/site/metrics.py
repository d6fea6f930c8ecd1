"""The metrics of a role as a table, from the collector that its page renders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

SUFFIXES = {"counter": "_total"}
"""What the text format appends to the name of a family of a kind."""


def table(role: str) -> str:
    """A Markdown table with a row per family: name, kind, labels, meaning."""
    rows = ["| metric | kind | labels | what it says |", "|---|---|---|---|"]
    for family in sorted(families(role), key=lambda family: family.name):
        labels = ", ".join(f"`{name}`" for name in _labels(family))
        name = family.name + SUFFIXES.get(family.type, "")
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(rows)


def families(role: str) -> Iterable[Metric]:
    """Every family on the page of a role with nothing to do."""
    return COLLECTORS[role]().collect()


def _labels(family: Metric) -> tuple[str, ...]:
    # What a family is made with; Metric itself, which has no samples yet, does not tell.
    labels: tuple[str, ...] = tuple(getattr(family, "_labelnames", ()))
    return labels


def _scheduler() -> Collector:
    from scheduler.loads import Loads
    from scheduler.metrics import Metrics, SchedulerCollector

    idle = Loads(
        workers=[],
        waiting=0,
        unassigned=0,
        running=0,
        swapped=0,
        preempted=0,
        retained=0,
        parked=0,
        stale_results_total=0,
    )
    return SchedulerCollector(Metrics(), lambda: idle)


def _gateway() -> Collector:
    from gateway.metrics import GatewayCollector

    return GatewayCollector(cast(Any, SimpleNamespace(ready=True, live_requests=0)))


def _worker() -> Collector:
    from worker.metrics import WorkerCollector

    executor = SimpleNamespace(progress=SimpleNamespace(count=0))
    return WorkerCollector(cast(Any, SimpleNamespace(joined=True, num_sessions=1, executor=executor)))


COLLECTORS: dict[str, Callable[[], Collector]] = {"scheduler": _scheduler, "gateway": _gateway, "worker": _worker}
