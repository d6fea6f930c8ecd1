"""grpc.health.v1, following the model: SERVING only while the scheduler says that a worker makes progress."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio  # type: ignore[attr-defined]

from gateway import native
from gateway.kserve import service as kserve
from gateway.session import SchedulerLink

NAMES = ("", native.SERVICE, kserve.SERVICE)


class Health:
    """Keeps the health service's answers equal to the link's readiness."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link
        self._servicer = aio.HealthServicer()
        self._stopping = False

    async def add_to(self, server: Any) -> None:
        """Registers the service, and says what is true now."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self.update()

    async def update(self) -> None:
        """Says what is true now."""
        serving = self._link.ready and not self._stopping
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in NAMES:
            await self._servicer.set(name, status)

    async def stop(self) -> None:
        """NOT_SERVING from now on, so that balancers look elsewhere."""
        self._stopping = True
        await self.update()
