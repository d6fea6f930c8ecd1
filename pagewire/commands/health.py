"""`pagewire health`: for the health checks of containers and scripts."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Annotated

import typer

from pagewire.commands import options as o


def command() -> Callable[..., None]:
    """The command."""
    return health


def health(
    address: Annotated[
        str, typer.Argument(help="HOST:PORT of a gateway or a scheduler, or http://HOST:PORT/health of any role.")
    ] = o.DEFAULT_ADDRESS,
    service: Annotated[str, typer.Option(help="Ask for one gRPC service; empty: for the whole server.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 3.0,
) -> None:
    """Ask a server whether it serves: exit 0 if so, 1 with one line if not. A gateway serves once a worker is ready."""
    status = _http_status(address, timeout) if address.startswith("http://") else _status(address, service, timeout)
    if status != "SERVING":
        print(f"pagewire health: {address} is not serving: {status}", file=sys.stderr)
        raise typer.Exit(1)


def _http_status(url: str, timeout: float) -> str:
    # Never through a proxy that the environment names: what is asked is near.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout):
            return "SERVING"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except urllib.error.URLError as error:
        return getattr(error.reason, "strerror", None) or str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


def _status(address: str, service: str, timeout: float) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
        except grpc.RpcError as error:
            return str(error.code().name)
