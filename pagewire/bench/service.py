"""Starts scheduler, workers and gateways as processes for a measurement, without a supervisor: what dies stays dead,
and the row that was running says so."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagewire.bench.results import ROOT
from pagewire.bench.session import BenchError
from pagewire.runtime import gpus, parent

STOP_LIMIT_S = 10.0
LOG_LINES = 3


@dataclass(frozen=True)
class Launch:
    """What to start. None: the role's own default."""

    model: str
    load_format: str = "auto"
    device: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    num_blocks: int | None = None
    host_blocks: int | None = None
    max_num_seqs: int = 512
    token_budget: int = 8192
    """Of the scheduler, and of the worker unless that of online rows is larger."""
    online_token_budget: int | None = None
    """Of the scheduler while online rows run. None: the same."""
    online_target_itl_ms: float | None = None
    """Of the scheduler while online rows run."""
    target_itl_ms: float | None = None
    """Of the scheduler."""
    preemption_mode: str | None = None
    """Of the scheduler."""
    headroom: float | None = None
    """Of the scheduler."""
    host_prefix_cache: bool | None = None
    """Of the scheduler."""
    max_waiting: int = 8192
    """Above the largest workload, because the whole set is submitted at once."""
    workers: int = 1
    """Each with the whole model, on a GPU of its own where there are several."""
    gateways: int = 0
    http: bool = False
    """Whether gateways serve OpenAI-compatible HTTP too."""
    text: bool = False
    """Whether gateways have the model's tokenizer."""
    scheduler_module: tuple[str, ...] = ("pagewire.cli", "scheduler")
    """Module and leading arguments of the scheduler's process; an experiment puts one with another policy here."""
    worker_module: tuple[str, ...] = ("pagewire.cli", "worker")
    """Module and leading arguments of the worker's process; a measurement of the host's work puts a stand-in here."""


class Service:
    """The processes, their addresses and their logs. Blocking; made by `start`."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        self.launch = launch
        self.folder = folder
        self._sockets = tempfile.TemporaryDirectory(prefix="pagewire-bench-", ignore_cleanup_errors=True)
        self.scheduler = f"unix:{self._sockets.name}/scheduler.sock"
        """Where sessions dial."""
        self.metrics: str | None = None
        """host:port of the Prometheus page."""
        self.gateways: list[str] = []
        """Addresses where gRPC clients dial."""
        self.http: list[str] = []
        """Addresses where HTTP clients dial."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, limit_s: float) -> None:
        """Starts everything and waits until the workers and the gateways are ready.

        Raises:
            BenchError: a process could not start, or the limit passed. Nothing is left running then.
        """
        deadline = time.monotonic() + limit_s
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._start_scheduler(deadline)
            workers = self._spawn_workers()
            gateways = self._spawn_gateways()
            for name, pipe in workers.items():
                self._wait(name, pipe, deadline)
            self._wait_gateways(gateways, deadline)
        except BaseException:
            self.stop()
            raise

    def replace_scheduler(self, launch: Launch, limit_s: float) -> None:
        """Starts scheduler and gateways anew, as `launch` says; the workers keep their model and join again. Raises as
        `start`."""
        deadline = time.monotonic() + limit_s
        self.launch = launch
        try:
            for name in [*(name for name in self._processes if name.startswith("gateway")), "scheduler"]:
                self._stop(self._processes.pop(name))
            self._start_scheduler(deadline)
            self._wait_gateways(self._spawn_gateways(), deadline)
        except BaseException:
            self.stop()
            raise

    def failure(self) -> str:
        """Which process has ended, and its last words; empty if all run."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                return f"the {name} process ended with code {code}: {self._last_words(name)}"
        return ""

    def stop(self) -> None:
        """Ends every process, gateways first."""
        while self._processes:
            self._stop(self._processes.popitem()[1])
        self._sockets.cleanup()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: process.pid for name, process in self._processes.items()}

    def gateway_cpu_s(self) -> float | None:
        """Seconds of processor time that the gateways have used so far; None where /proc does not tell."""
        ticks = 0
        for name, process in self._processes.items():
            if name.startswith("gateway"):
                try:
                    # Behind the name in brackets, which may hold spaces: utime and stime are fields 14 and 15.
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    return None
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_scheduler(self, deadline: float) -> None:
        pipe = self._spawn("scheduler", self._scheduler_command())
        self.metrics = self._wait("scheduler", pipe, deadline)["metrics"]

    def _spawn_workers(self) -> dict[str, int]:
        count = self.launch.workers
        names = gpus.for_workers(count, self.launch.device)
        shares = {"worker" if count == 1 else f"worker-{number}": gpus.share(number, names) for number in range(count)}
        return {name: self._spawn(name, self._worker_command(), share) for name, share in shares.items()}

    def _spawn_gateways(self) -> dict[str, int]:
        names = [f"gateway-{index}" for index in range(self.launch.gateways)]
        return {name: self._spawn(name, self._gateway_command()) for name in names}

    def _wait_gateways(self, pipes: dict[str, int], deadline: float) -> None:
        ready = [self._wait(name, pipe, deadline) for name, pipe in pipes.items()]
        self.gateways = [one["grpc"] for one in ready]
        self.http = [one["http"] for one in ready if one.get("http")]

    def _scheduler_command(self) -> list[str]:
        launch = self.launch
        options: dict[str, Any] = {
            "--listen": self.scheduler,
            "--metrics-port": 0,
            "--max-num-seqs": launch.max_num_seqs,
            "--token-budget": launch.token_budget,
            "--target-itl-ms": launch.target_itl_ms,
            "--preemption-mode": launch.preemption_mode,
            "--headroom": launch.headroom,
            "--host-prefix-cache": launch.host_prefix_cache,
            "--max-waiting": launch.max_waiting,
        }
        return [*launch.scheduler_module, *_flags(options)]

    def _worker_command(self) -> list[str]:
        launch = self.launch
        options = {
            "--scheduler": self.scheduler,
            "--model": launch.model,
            "--load-format": launch.load_format,
            "--device": launch.device,
            "--dtype": launch.dtype,
            "--max-model-len": launch.max_model_len,
            "--block-size": launch.block_size,
            "--num-blocks": launch.num_blocks,
            "--host-blocks": launch.host_blocks,
            "--max-num-seqs": launch.max_num_seqs,
            "--token-budget": max(launch.token_budget, launch.online_token_budget or 0),
        }
        return [*launch.worker_module, *_flags(options)]

    def _gateway_command(self) -> list[str]:
        options = {
            "--scheduler": self.scheduler,
            "--listen": "127.0.0.1:0",
            "--http-listen": "127.0.0.1:0" if self.launch.http else None,
            # Requests are token ids, and a config-only folder has no tokenizer.
            "--model": self.launch.model if self.launch.text else None,
        }
        return ["pagewire.cli", "gateway", *_flags(options)]

    def _spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Starts a process; returns the descriptor on which it tells its readiness."""
        reading, writing = os.pipe()
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        try:
            with (self.folder / f"{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-m", *command, "--ready-fd", str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writing,),
                    process_group=0,
                    env={**os.environ, "PYTHONPATH": path, parent.VARIABLE: str(os.getpid()), **(environment or {})},
                )
        finally:
            os.close(writing)
        return reading

    def _wait(self, name: str, pipe: int, deadline: float) -> dict[str, Any]:
        """The process's readiness line. Closes the descriptor."""
        received = b""
        try:
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([pipe], [], [], left)[0]:
                    raise BenchError(f"the {name} was not ready in time: {self._last_words(name)}")
                part = os.read(pipe, 4096)
                if not part:
                    code = self._processes[name].wait()
                    raise BenchError(f"the {name} ended with code {code}: {self._last_words(name)}")
                received += part
        finally:
            os.close(pipe)
        answer: dict[str, Any] = json.loads(received)
        if "error" in answer:
            raise BenchError(f"the {name} cannot start: {answer['error']}")
        return answer

    def _last_words(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").split("\n")
        return " | ".join([line.strip()[:400] for line in lines if line.strip()][-LOG_LINES:])


def _flags(options: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for flag, value in options.items():
        if isinstance(value, bool):
            parts.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            parts += [flag, str(value)]
    return parts
