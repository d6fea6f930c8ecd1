"""gRPC channel and server options, and binding a port, said once for every role.

A misspelt channel argument is ignored in silence by gRPC, so nobody writes one anywhere else, and the tests of this
module observe effects (a ping that is answered, a message that is refused), not names.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import resource
import socket
from pathlib import Path

import grpc.aio

from pagewire.runtime.errors import StartError

ChannelOptions = list[tuple[str, int | str]]

MIB = 1 << 20
CLIENT_MESSAGE_BYTES = 8 * MIB
INTERNAL_MESSAGE_BYTES = 64 * MIB
METADATA_BYTES = 8 << 10
MAX_CONCURRENT_STREAMS = 100
HANDSHAKE_TIMEOUT_MS = 10_000
UNIX_PATH_BYTES = 107
CONNECTION_IDLE_MS = 15 * 60 * 1000
# Descriptors that a role needs beside its connections: libraries, weights, pipes, logs.
RESERVED_DESCRIPTORS = 128


def _keepalive(internal: bool) -> ChannelOptions:
    """Pings that find a frozen peer.

    `grpc.http2.ping_timeout_ms` is what acts: without it core waits 60 s for the answer whatever keepalive_timeout says
    (measured with grpcio 1.85: 61.5 s without, 2.8 s with it at 2 s / 1 s / 1 s).
    """
    time_ms, timeout_ms = (2_000, 1_000) if internal else (10_000, 5_000)
    return [
        ("grpc.keepalive_time_ms", time_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _messages(internal: bool) -> ChannelOptions:
    size = INTERNAL_MESSAGE_BYTES if internal else CLIENT_MESSAGE_BYTES
    return [
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * METADATA_BYTES),
    ]


def client_options(*, internal: bool) -> ChannelOptions:
    """Options for a channel. `internal` is a link between roles: faster pings, larger messages, quicker reconnects."""
    options = _keepalive(internal) + _messages(internal)
    options.append(("grpc.keepalive_permit_without_calls", int(internal)))
    if internal:
        options += [
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 1_000),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ]
    return options


def server_options(*, internal: bool) -> ChannelOptions:
    """Options for a server. `internal` as in `client_options`; it accepts pings a bit faster than clients send."""
    options = _keepalive(internal) + _messages(internal)
    options += [
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_500 if internal else 9_000),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_allowed_incoming_connections", _max_connections()),
        # By default a second server silently shares the port; with 0 it fails to bind.
        ("grpc.so_reuseport", 0),
    ]
    if not internal:
        options += [
            ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
            ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
        ]
    return options


def _max_connections() -> int:
    """What the descriptor limit leaves for connections, at most 65,535."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 65_535
    return max(16, min(65_535, soft - RESERVED_DESCRIPTORS))


async def bind(server: grpc.aio.Server, address: str, *, insecure: bool = False) -> str:
    """Adds a plaintext port to a server that has not been started and returns its real address.

    Args:
        server: the aio server, made with `server_options`.
        address: `host:port` (port 0: a free one) or `unix:PATH`.
        insecure: allow a TCP address other than loopback.

    Raises:
        StartError: the address is malformed, in use or not this machine's, or not loopback without `insecure`.
    """
    if address.startswith("unix:"):
        await asyncio.to_thread(_claim_unix_path, Path(address.removeprefix("unix:")))
        _add_port(server, address)
        return address
    host, _port = split_address(address)
    if not insecure and not is_loopback(host):
        raise StartError(
            f"{address} can be reached from other machines without TLS: listen on 127.0.0.1, or add --insecure if the "
            "network is private"
        )
    bound = _add_port(server, address)
    return f"{host}:{bound}"


def split_address(address: str) -> tuple[str, int]:
    """`host:port` as its parts. Raises StartError with the expected form if it is anything else."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65_535:
        raise StartError(f"{address!r} is not an address: write HOST:PORT (port 0 picks a free one) or unix:PATH")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host names this machine's loopback interface only. Other names are not looked up: they count as not."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _add_port(server: grpc.aio.Server, address: str) -> int:
    reason = _why_not(address)
    if reason is None:
        try:
            bound: int = server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if bound:
            return bound
        reason = "it was free a moment ago; try again"
    raise StartError(f"cannot listen on {address}: {reason}")


def _why_not(address: str) -> str | None:
    """Why an address cannot be bound; None if it can. Asked before gRPC tries, which would only log that it cannot."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        if len(os.fsencode(path)) > UNIX_PATH_BYTES:
            return f"the path is longer than {UNIX_PATH_BYTES} bytes"
        if not os.access(path.parent, os.W_OK):
            return f"the folder {path.parent} does not exist or is not writable"
        return None
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, kind, protocol, _canonical, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            # With SO_REUSEADDR a port that another process has bound but does not listen on is only refused here.
            probe.listen(1)
    except socket.gaierror:
        return f"{host!r} is not a host name of this machine"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "it is in use; stop the process that holds it or choose another port (0 picks a free one)"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{host} is no address of this machine"
        return os.strerror(error.errno or 0)
    return None


def _claim_unix_path(path: Path) -> None:
    """Removes a socket that a dead process left behind. gRPC would take one over from a live process too, so ask."""
    if not path.is_socket():
        if path.exists():
            raise StartError(f"{path} exists and is not a socket: choose another path")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise StartError(f"cannot listen on unix:{path}: it is in use; stop the process that holds it")
