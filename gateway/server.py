"""The gateway process: a gRPC and an HTTP server for clients, one session to the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from gateway import control, native
from gateway.chat import ChatTemplate
from gateway.config import GatewaySettings
from gateway.console.events import BlockEvents
from gateway.health import Health
from gateway.kserve import service as kserve
from gateway.metrics import GatewayCollector
from gateway.openai.api_keys import load_api_keys
from gateway.openai.app import Door, make_app
from gateway.openai.server import HttpServer, is_on
from gateway.openai.token_texts import TokenTexts
from gateway.requests import RequestPath
from gateway.session import SchedulerLink
from gateway.tokenizer import Tokenizer, keep_torch_out, load_tokenizer
from pagewire.runtime import ready
from pagewire.runtime.channel import bind, server_options
from pagewire.runtime.logs import get_logger
from pagewire.runtime.metrics_page import MetricsPage, own_registry
from pagewire.runtime.tracing import Tracer, make_tracer

FAREWELL_S = 0.5
"""Time for the last statuses to reach clients."""

log = get_logger(__name__)


class Gateway:
    """Everything a gateway runs. `start` returns once the port is bound; `wait_ready` once requests can be served."""

    def __init__(self, settings: GatewaySettings, tokenizer: Tokenizer | None, tracer: Tracer | None = None) -> None:
        """
        Args:
            settings: the role's.
            tokenizer: the model's; None: token ids only.
            tracer: makes spans; None: there are no traces.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._tracer = tracer
        template = tokenizer.chat_template if tokenizer is not None else None
        self._chat = (
            ChatTemplate(template, tokenizer.special_tokens, settings.chat_render_timeout_s)
            if tokenizer is not None and template is not None
            else None
        )
        gateway_id = f"{socket.gethostname()}-{os.getpid()}"
        self.link = SchedulerLink(settings.scheduler, gateway_id, settings.reattach_timeout_s)
        self.path = RequestPath(settings, self.link, tokenizer, self._chat, tracer)
        self._server = grpc.aio.server(options=server_options(internal=False))
        self._health = Health(self.link)
        self._http = self._make_http() if is_on(settings.http_listen) else None
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.address = ""
        """Where clients connect, once started."""
        self.http_address: str | None = None
        """Where OpenAI clients connect; None while there is no HTTP."""
        self._page: MetricsPage | None = None
        self.metrics_address: str | None = None
        """Of the Prometheus page; None: there is none."""

    async def start(self) -> None:
        """Binds the port and opens the session. Raises StartError for an address or a chat template that cannot be."""
        if self._chat is not None:
            await self._chat.start()
        servicer = native.InferenceServicer(self.path, self._settings.write_timeout_s)
        open_inference = kserve.OpenInferenceServicer(
            self.path, lambda: self.link.ready and not self._stopping, self._settings.write_timeout_s
        )
        self._server.add_generic_rpc_handlers(
            (servicer.handlers(), open_inference.handlers(), control.handlers(self.link))
        )
        await self._health.add_to(self._server)
        if self._settings.reflection:
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            names = (native.SERVICE, kserve.SERVICE, control.SERVICE, health_name, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.address = await bind(self._server, self._settings.listen, insecure=self._settings.insecure)
        await self._server.start()
        self.link.on_state(self._changed.set)
        self._tasks = [asyncio.create_task(self.link.run()), asyncio.create_task(self._follow_state())]
        if self._settings.metrics_port is not None and self._settings.metrics_port >= 0:
            self._page = MetricsPage(own_registry(GatewayCollector(self.link)), healthy=lambda: self.link.ready)
            self.metrics_address = await self._page.start(self._settings.metrics_host, self._settings.metrics_port)
        if self._http is not None:
            self.http_address = self._http.start(self._settings.http_listen, insecure=self._settings.insecure)
            self._tasks.append(asyncio.create_task(self._http.run()))

    async def wait_ready(self) -> None:
        """Returns when the scheduler has welcomed this gateway and a worker is ready."""
        await self._ready.wait()

    async def run(self) -> None:
        """Runs until cancelled, or until a part of it breaks, which it raises."""
        await asyncio.gather(*self._tasks)

    async def stop(self) -> None:
        """Says NOT_SERVING, gives calls their grace, and ends everything."""
        self._stopping = True
        await self._health.stop()
        # What has not ended by then is told why, which gRPC by itself would not do.
        farewell = asyncio.get_running_loop().call_later(self._settings.stop_grace_s, self.link.say_farewell)
        stopping = [self._server.stop(self._settings.stop_grace_s + FAREWELL_S)]
        if self._http is not None:
            stopping.append(self._http.stop())
        await asyncio.gather(*stopping)
        farewell.cancel()
        if self._page is not None:
            await self._page.stop()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._chat is not None:
            await self._chat.close()
        if self._tokenizer is not None:
            self._tokenizer.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.stop)

    def _make_http(self) -> HttpServer:
        settings = self._settings
        door = Door(
            path=self.path,
            texts=TokenTexts(self._tokenizer),
            keys=load_api_keys(settings.api_keys_file),
            ready=lambda: self.link.ready and not self._stopping,
            started=int(time.time()),
            max_body_bytes=settings.http_max_body_bytes,
            write_timeout_s=settings.write_timeout_s,
            console=self._console_events if settings.console else None,
        )
        return HttpServer(make_app(door), write_timeout_s=settings.write_timeout_s, stop_grace_s=settings.stop_grace_s)

    def _console_events(self) -> BlockEvents:
        return BlockEvents(self.link, lambda: self._stopping, self._settings.write_timeout_s)

    async def _follow_state(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._health.update()
            if self.link.ready:
                self._ready.set()


async def _in_thread(load: Callable[[], Tokenizer | None]) -> Tokenizer | None:
    """Runs `load` in a thread that a stop need not wait for: a download may hang for minutes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Tokenizer | None] = loop.create_future()

    def settle(result: Tokenizer | None, error: Exception | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = load()
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load-tokenizer", daemon=True).start()
    return await done


async def serve(settings: GatewaySettings) -> None:
    """Runs the gateway until cancelled. Announces its address once it can serve requests.

    Raises:
        StartError: wrong tokenizer directory, port in use, bad chat template.
    """
    keep_torch_out()
    tracer = make_tracer(settings)
    tokenizer = await _in_thread(lambda: load_tokenizer(settings.model))
    if tokenizer is None:
        log.warning("no tokenizer: token ids only; --model gives one", model=settings.model)
    gateway = Gateway(settings, tokenizer, tracer)
    try:
        await gateway.start()
        log.info("listening", grpc=gateway.address, http=gateway.http_address, metrics=gateway.metrics_address)
        running = asyncio.create_task(gateway.run())
        waiting = asyncio.create_task(gateway.wait_ready())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            log.info("ready", grpc=gateway.address, http=gateway.http_address)
            ready.announce(settings.ready_fd, grpc=gateway.address, http=gateway.http_address)
        waiting.cancel()
        await running
    finally:
        await gateway.stop()
