"""What a worker tells Prometheus: what the scheduler, which times steps and counts blocks, cannot know.

Values are plain integers that other threads write; a page shows each as it is at that moment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pagewire.runtime.metrics_page import MetricsPage, own_registry
from worker.link import SchedulerLink


class WorkerCollector(Collector):
    """Reads the link to the scheduler when the page is asked for."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are fixed."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families."""
        link = self._link
        yield GaugeMetricFamily("pagewire_worker_joined", "1 while a scheduler has this worker.", value=link.joined)
        yield CounterMetricFamily("pagewire_worker_sessions", "Times this worker joined.", value=link.num_sessions)
        yield CounterMetricFamily(
            "pagewire_worker_progress", "Pieces of work done: layers and steps.", value=link.executor.progress.count
        )


def start_page(link: SchedulerLink, host: str, port: int) -> str:
    """Serves the page from a thread of its own, for good; `/health` is 200 while the worker is joined.

    Returns the real address. Raises StartError when the port cannot be had.
    """
    started: Future[str] = Future()

    async def serve() -> None:
        page = MetricsPage(own_registry(WorkerCollector(link)), healthy=lambda: link.joined)
        try:
            started.set_result(await page.start(host, port))
        except BaseException as error:
            started.set_exception(error)
            return
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(serve()), name="metrics-page", daemon=True).start()
    return started.result()
