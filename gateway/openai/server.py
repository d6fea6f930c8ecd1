"""Runs the HTTP application with uvicorn on the gateway's own event loop.

uvicorn is kept from what belongs to the process: signals, logging, the choice of the loop. What it leaves open is
closed here: headers that never come, connections without number, peers that vanished, readers that never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pagewire.runtime.channel import is_loopback, split_address
from pagewire.runtime.errors import StartError

HEADER_TIMEOUT_S = 10.0
"""Seconds for a request's head, from the connection's or the request's first byte on."""
HEADER_BYTES = 32 << 10
KEEP_ALIVE_S = 75
"""Idle seconds before a connection is closed; longer than clients keep theirs, so they never meet a closing one."""
MAX_CONNECTIONS = 8192
BACKLOG = 512
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 10, 5, 2
OFF = frozenset({"", "off", "none", "null"})


def is_on(address: str | None) -> bool:
    """Whether a setting asks for the HTTP door."""
    return address is not None and address.strip().lower() not in OFF


class HttpServer:
    """The listening socket and its connections."""

    def __init__(self, app: ASGIApp, *, write_timeout_s: float, stop_grace_s: float) -> None:
        """
        Args:
            app: the application.
            write_timeout_s: seconds after which the kernel gives up a peer that acknowledges or takes nothing.
            stop_grace_s: seconds that open requests get to end.
        """
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",  # it would log exceptions with their text; the application logs what has to be
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        config.timeout_graceful_shutdown = stop_grace_s  # type: ignore[assignment]
        self._server = _Server(config)
        self._write_timeout_ms = int(write_timeout_s * 1000)
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None

    def start(self, address: str, *, insecure: bool) -> str:
        """Listens on HOST:PORT (port 0: a free one) and returns the real address.

        Raises:
            StartError: the address is malformed, in use, or not loopback without `insecure`.
        """
        host, port = split_address(address)
        if not insecure and not is_loopback(host):
            raise StartError(
                f"--http-listen {address} can be reached from other machines without TLS: listen on 127.0.0.1, or add "
                "--insecure if the network is private"
            )
        self._socket = self._listen(host, port)
        self._serving = asyncio.create_task(self._server.serve([self._socket]))
        return f"{host}:{self._socket.getsockname()[1]}"

    async def run(self) -> None:
        """Returns when the server has stopped; raises what breaks it."""
        assert self._serving is not None
        await asyncio.shield(self._serving)

    async def stop(self) -> None:
        """Stops listening, gives open requests their grace, ends the rest."""
        if self._serving is None:
            return
        self._server.should_exit = True
        await asyncio.wait({self._serving})
        # uvicorn cancels what has not ended in time, but does not wait for it.
        if tasks := set(self._server.server_state.tasks):
            await asyncio.wait(tasks, timeout=1.0)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    def _listen(self, host: str, port: int) -> socket.socket:
        listening: socket.socket | None = None
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
            listening = socket.socket(family, kind, protocol)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections inherit these: a peer without power is noticed although nothing is being sent to it.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._write_timeout_ms)
            listening.bind(where)
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except OSError as error:
            if listening is not None:
                listening.close()
            if isinstance(error, socket.gaierror):
                reason = f"{host!r} is not a host name of this machine"
            elif error.errno == errno.EADDRINUSE:
                reason = "it is in use; stop the process that holds it or choose another port (0 picks a free one)"
            else:
                reason = os.strerror(error.errno or 0)
            raise StartError(f"cannot listen on {host}:{port} for HTTP: {reason}") from None
        return listening


class _Server(uvicorn.Server):
    """Without signal handlers: signals are for the process, which stops all its doors."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """A connection that must say its headers in time, and whose application may cut it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        if len(self.connections) > _max_connections():
            transport.abort()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering():
            self._stop_waiting()
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._stop_waiting()
        super().on_response_complete()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _max_connections() -> int:
    """Half of the process's descriptors; the other half is for gRPC."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 2))
