"""The compose file's services on an engine, as an operator drives them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from tests.compose.engine import PUBLIC_BASE, Engine, run

BUILD_LIMIT_S = 900
READY_LIMIT_S = 120


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@dataclass
class Stack:
    """A compose project of its own name, tag and ports, beside whatever else runs on the engine."""

    engine: Engine
    project: str
    grpc_port: int
    http_port: int
    prometheus_port: int
    prometheus_image: str = ""
    """What runs as Prometheus; empty: the public image."""

    @classmethod
    def of(cls, engine: Engine) -> Stack:
        return cls(engine, f"pagewire-test-{os.getpid()}", free_port(), free_port(), free_port())

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.engine.environment,
            "PAGEWIRE_TAG": "test",
            "PAGEWIRE_GRPC_PORT": str(self.grpc_port),
            "PAGEWIRE_HTTP_PORT": str(self.http_port),
            "PAGEWIRE_PROMETHEUS_PORT": str(self.prometheus_port),
            **({"PAGEWIRE_PROMETHEUS_IMAGE": self.prometheus_image} if self.prometheus_image else {}),
            "COMPOSE_PROFILES": "cpu",
            **({} if self.engine.has_buildkit else {"DOCKER_BUILDKIT": "0"}),
        }

    def compose(self, *arguments: str, timeout: float = 120) -> str:
        return run([*self.engine.compose, "--project-name", self.project, *arguments], self.environment, timeout)

    def containers(self, service: str) -> list[str]:
        """Ids of the running containers of a service."""
        found = self.compose("ps", "--quiet", service).split()
        return [container for container in found if self.inspect(container)["State"]["Running"]]

    def inspect(self, container: str) -> dict:
        (found,) = json.loads(self.engine.docker("inspect", container))
        return found

    def wait_healthy(self) -> None:
        """Waits until the gateway's own health check passes: a worker has joined and requests are served."""
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            (gateway,) = self.containers("gateway")
            status = self.inspect(gateway)["State"]["Health"]["Status"]
            if status == "healthy":
                return
            assert time.monotonic() < deadline, f"the gateway is {status}:\n{self.compose('logs', '--tail', '30')}"
            time.sleep(0.5)

    def pack_prometheus(self, folder: Path, binary: Path) -> None:
        """Makes an image of this machine's Prometheus, in an empty folder."""
        base = self.engine.environment.get("PAGEWIRE_BASE", PUBLIC_BASE)
        shutil.copy(binary, folder / "prometheus")
        (folder / "Dockerfile").write_text(
            f'FROM {base}\nCOPY prometheus /usr/bin/\nENTRYPOINT ["/usr/bin/prometheus"]\n'
        )
        run(["docker", "build", "--tag", "pagewire-prometheus:test", str(folder)], self.environment, BUILD_LIMIT_S)
        self.prometheus_image = "pagewire-prometheus:test"

    def ask_prometheus(self, path: str, **query: str) -> Any:
        """The data of an answer of its HTTP API."""
        url = f"http://127.0.0.1:{self.prometheus_port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}")
