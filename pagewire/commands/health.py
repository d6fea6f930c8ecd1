"""`pagewire health`: for the health checks of containers and scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pagewire.commands import options as o


def command() -> Callable[..., None]:
    """The command."""
    return health


def health(
    address: Annotated[str, typer.Argument(help="HOST:PORT of a gateway or a scheduler.")] = o.DEFAULT_ADDRESS,
    service: Annotated[str, typer.Option(help="Ask for one gRPC service; empty: for the whole server.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 3.0,
) -> None:
    """Ask a server whether it serves: exit 0 if so, 1 with one line if not. A gateway serves once a worker is ready."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except grpc.RpcError as error:
            status = error.code().name
    if status != "SERVING":
        print(f"pagewire health: {address} is not serving: {status}", file=sys.stderr)
        raise typer.Exit(1)
