"""The scheduler process: one event loop that serves workers, gateways, operators, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pagewire.runtime import channel, logs, ready
from pagewire.runtime.errors import StartError
from pagewire.runtime.metrics_page import MetricsPage, own_registry
from pagewire.runtime.tracing import make_tracer
from pagewire.v1 import scheduler_pb2
from scheduler.config import SchedulerSettings
from scheduler.control import ControlServicer
from scheduler.engine import Engine
from scheduler.gateway_link import SchedulerServicer
from scheduler.metrics import SchedulerCollector
from scheduler.worker_link import WorkerServicer

STOP_GRACE_S = 0.5
ALIVE_SERVICES = ("", "pagewire.v1.WorkerService", "pagewire.v1.ControlService")
READY_SERVICE = "pagewire.v1.SchedulerService"

log = logs.get_logger("scheduler.server")


@dataclass
class Serving:
    """A scheduler that accepts calls."""

    engine: Engine
    addresses: list[str]
    """As bound, in the order of the settings."""
    metrics_address: str | None
    """Of the Prometheus page; None: there is none."""


@contextlib.asynccontextmanager
async def serving(settings: SchedulerSettings) -> AsyncIterator[Serving]:
    """Serves for the length of a `with` block. Raises StartError when an address cannot be bound."""
    tracer = make_tracer(settings)
    engine = Engine(settings, tracer=tracer)
    if settings.record is not None:
        start_recording(engine, settings.record)
    server = grpc.aio.server(options=channel.server_options(internal=True))
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # set at run time
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    handlers = (
        WorkerServicer(engine).handler(),
        SchedulerServicer(engine).handler(),
        ControlServicer(engine).handler(),
    )
    server.add_generic_rpc_handlers(handlers)
    for service in ALIVE_SERVICES:
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    follower = asyncio.create_task(_follow_readiness(engine, health_servicer))
    page: MetricsPage | None = None
    try:
        addresses = [await channel.bind(server, one, insecure=settings.insecure) for one in settings.addresses]
        metrics_address = None
        if settings.metrics_port is not None and settings.metrics_port >= 0:
            page = MetricsPage(own_registry(SchedulerCollector(engine.metrics, engine.dispatcher.loads)))
            metrics_address = await page.start(settings.metrics_host, settings.metrics_port)
        await server.start()
        yield Serving(engine, addresses, metrics_address)
    finally:
        follower.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await follower
        await health_servicer.enter_graceful_shutdown()
        engine.shut_down()
        await server.stop(STOP_GRACE_S)
        if engine.dispatcher.recorder is not None:
            await asyncio.to_thread(engine.dispatcher.recorder.stop, shut_down=True)
        if page is not None:
            await page.stop()
        if tracer is not None:
            await asyncio.to_thread(tracer.stop)


def start_recording(engine: Engine, path: Path) -> None:
    """Records into a new file of that name, or of that name with a number: a scheduler that is started again by its
    supervisor must not write over what shows why. Raises StartError when it cannot be made."""
    for number in itertools.count(1):
        try:
            engine.record(path if number == 1 else path.with_name(f"{path.name}.{number}"))
            return
        except FileExistsError:
            continue
        except OSError as error:
            raise StartError(f"cannot record into {path}: {error.strerror}") from None


async def serve(settings: SchedulerSettings) -> None:
    """Runs the scheduler until it is cancelled. Raises StartError when it cannot start, and whatever broke its core."""
    async with serving(settings) as now:
        log.info("serving", grpc=now.addresses, metrics=now.metrics_address)
        gc.freeze()  # what is imported by now lives for ever: collections need not walk it
        ready.announce(settings.ready_fd, grpc=",".join(now.addresses), metrics=now.metrics_address)
        await now.engine.failed


async def _follow_readiness(engine: Engine, servicer: Any) -> None:
    """Health of the session service: SERVING while a worker is ready and new requests are taken."""
    states: asyncio.Queue[scheduler_pb2.ModelState] = asyncio.Queue(1)

    def keep_newest(state: scheduler_pb2.ModelState) -> None:
        if states.full():
            states.get_nowait()
        states.put_nowait(state)

    engine.on_state = keep_newest
    keep_newest(engine.model_state())
    while True:
        state = await states.get()
        status = health_pb2.HealthCheckResponse
        is_ready = state.ready and not state.draining
        await servicer.set(READY_SERVICE, status.SERVING if is_ready else status.NOT_SERVING)
