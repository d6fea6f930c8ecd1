"""What a gateway tells Prometheus: what the scheduler, which counts requests and tokens, cannot know."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.session import SchedulerLink


class GatewayCollector(Collector):
    """Reads the link to the scheduler when the page is asked for."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are fixed."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families."""
        link = self._link
        yield GaugeMetricFamily(
            "pagewire_gateway_ready", "1 while the scheduler answers and a worker makes progress.", value=link.ready
        )
        yield GaugeMetricFamily(
            "pagewire_gateway_live_requests", "Requests this gateway holds.", value=link.live_requests
        )
