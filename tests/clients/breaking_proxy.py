"""A TCP proxy that cuts its first connections after so many bytes: a network break at a chosen place."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

CHUNK = 16384
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST at once, as a host that has lost its state does."""


class BreakingProxy:
    """Listens on a free port of loopback and passes connections on to one server."""

    def __init__(self, target: Callable[[], str], cuts: Sequence[int]) -> None:
        """
        Args:
            target: `host:port` of the server now, asked for every connection.
            cuts: bytes from the server after which the first, second, ... connection is reset; later ones live on.
        """
        self._target = target
        self._cuts = cuts
        self.reached = threading.Event()
        """The first cut is due."""
        self.may_cut = threading.Event()
        """Cleared, a cut that is due waits, and nothing passes."""
        self.may_cut.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self.may_cut.set()
        for connection in (self._listener, *self._sockets):
            with suppress(OSError):  # it may have gone already
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                host, port = self._target().rsplit(":", 1)
                server = socket.create_connection((host, int(port)))
            except OSError:
                client.close()  # nobody there: the client is told the same
                continue
            self._sockets += [client, server]
            limit = self._cuts[number] if number < len(self._cuts) else None
            number += 1
            self._start(self._pump, client, server, None)
            self._start(self._pump, server, client, limit)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        """Copies until either side ends, or cuts both sides after `limit` bytes."""
        passed = 0
        try:
            while data := source.recv(CHUNK):
                if limit is not None and passed + len(data) >= limit:
                    sink.sendall(data[: limit - passed])
                    self.reached.set()
                    self.may_cut.wait()
                    for connection in (source, sink):
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    break
                sink.sendall(data)
                passed += len(data)
        except OSError:
            pass  # the other direction has ended the connection
        for connection in (source, sink):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@contextmanager
def breaking(target: Callable[[], str], *cuts: int) -> Iterator[BreakingProxy]:
    """A proxy for the length of a `with` block."""
    proxy = BreakingProxy(target, cuts)
    try:
        yield proxy
    finally:
        proxy.close()
