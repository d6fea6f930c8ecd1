"""The Prometheus page of a role over plain HTTP, on the role's own event loop, and `/health` beside it.

prometheus_client's server answers from another thread, which would read a scheduler's tables in mid-change. Here a page
is rendered between two steps, in well under a millisecond per worker.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pagewire.runtime.errors import StartError

REQUEST_BYTES = 8 << 10
REQUEST_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 32


class MetricsPage:
    """Answers `GET /metrics` with what a registry collects, one request per connection."""

    def __init__(self, registry: CollectorRegistry, healthy: Callable[[], bool] = lambda: True) -> None:
        """`healthy` decides what `GET /health` answers: 200 or 503."""
        self._registry = registry
        self._healthy = healthy
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, host: str, port: int) -> str:
        """Listens on `host:port` (0: a free port) and returns the real address. Raises StartError when it cannot."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_BYTES)
        except OSError as error:
            what = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            line = f"cannot listen on {host}:{port} for metrics: {what}; choose another --metrics-port"
            raise StartError(f"{line} (0 picks a free one)") from None
        bound: int = self._server.sockets[0].getsockname()[1]
        return f"{host}:{bound}"

    async def stop(self) -> None:
        """Closes the port."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head.decode("latin-1")))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a peer that is slow, gone or no HTTP client is simply hung up on
        finally:
            self._open -= 1
            writer.close()

    def _answer(self, head: str) -> bytes:
        request_line, *header_lines = head.split("\r\n")
        method, _, rest = request_line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method != "GET":
            return _response("405 Method Not Allowed", "text/plain", b"only GET is answered\n")
        if path == "/health":
            return _response("200 OK" if self._healthy() else "503 Service Unavailable", "text/plain", b"")
        if path not in ("/metrics", "/"):
            return _response("404 Not Found", "text/plain", b"the page is /metrics\n")
        accept = next((line[7:].strip() for line in header_lines if line.lower().startswith("accept:")), "")
        encode, content_type = _encoder(accept)
        return _response("200 OK", content_type, encode(self._registry))


def own_registry(*collectors: Collector) -> CollectorRegistry:
    """A registry of these collectors and of what every process tells: memory, processor time, open files."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    encode, content_type = choose_encoder(accept)
    return encode, content_type


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body
