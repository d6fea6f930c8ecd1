"""`pagewire up`: scheduler, workers and gateways of one machine as child processes, kept alive.

The children are started, never forked, because gRPC does not survive a fork. They talk over a Unix socket in a private
folder, tell their readiness on an inherited pipe, and write to this process's stderr, so progress bars stay visible.

    starting ──all ready──▶ serving ──signal──▶ stopping ──▶ exit 0
        │  a child says that it cannot start, or dies 3 times before it is ready
        └──▶ stopping ──▶ exit 2 with the child's line
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pagewire.bundled import BUNDLED_MODEL, BUNDLED_NAME
from pagewire.runtime import gpus, parent
from pagewire.runtime.errors import StartError
from pagewire.runtime.ready import MAX_LINE_BYTES
from pagewire.runtime.settings import RoleSettings, flag_name

START_ATTEMPTS = 3
"""Deaths before the first readiness after which a start is given up."""
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 30.0
LONGEST_FOLDER = 70
"""Characters of a temporary folder in which a socket still has room: its path may have 107."""
RECENT_S = 10.0
"""Deaths within this time double the pause before the next start."""
GRACE_S = 5.0
"""Time between SIGTERM and SIGKILL for each stage of a stop."""


class UpSettings(RoleSettings):
    """Starts a scheduler, workers and gateways on this machine, restarts what dies, and stops them all on Ctrl-C.

    Settings that are left unset are those of the role concerned: see `pagewire scheduler --help` and so on.
    """

    role: ClassVar[str] = "up"

    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe level that is logged, here and in the children. Warning, so that the terminal shows what matters."""

    model: str = ""
    """Directory or hub id of the model. Unset: the small model that ships with Pagewire."""
    served_model_name: str = ""
    """Name that clients use. Unset: the last part of the model's path or id."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where workers compute. Unset: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of weights and KV. Unset: the checkpoint's own."""
    load_format: Literal["auto", "dummy"] | None = None
    """auto reads the weights; dummy makes random ones, for tests and measurements."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Context in tokens, prompt and output together. Unset: the model's own."""
    block_size: int | None = Field(default=None, ge=1)
    """Tokens per KV block, a power of two."""
    num_blocks: int | None = Field(default=None, ge=0)
    """Blocks of each worker's KV pool. Unset or 0: as many as fit into free memory."""
    host_blocks: int | None = Field(default=None, ge=0)
    """Blocks of each worker's swap arena in host memory."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Sequences that run at once on one worker."""
    token_budget: int | None = Field(default=None, ge=1)
    """Tokens that one step computes at most."""
    target_itl_ms: float | None = Field(default=None, ge=0.0)
    """Milliseconds between two tokens of a stream that prefill should not exceed. Unset or 0: no limit."""
    preemption_mode: Literal["auto", "swap", "recompute"] | None = None
    """How sequences leave a full KV pool."""
    prefix_cache: bool | None = None
    """Reuse the KV blocks of prompts that begin alike. Unset: on."""
    host_prefix_cache: bool | None = None
    """Keep such blocks in host memory when the KV pool gives them up. Unset: on."""
    record: Path | None = None
    """File to record the run in, prompts included, for `pagewire replay`. Unset: nothing is recorded."""
    record_dir: Path | None = None
    """Folder for recordings that operators start with ControlService.RecordPlans. Unset: they cannot."""

    grpc_port: int = Field(default=50051, ge=0, le=65535)
    """Port of the gRPC API. 0 picks a free one. Further gateways take the following ports."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """Port of the OpenAI-compatible HTTP API. 0 picks a free one. Further gateways take the following ports."""
    http: bool = True
    """Serve the HTTP API."""
    api_keys_file: Path | None = None
    """File with the API keys that HTTP clients must send: one KEY or KEY TENANT per line. Unset: none are asked for."""
    metrics_port: int = Field(default=9090, ge=0, le=65535)
    """Port of the Prometheus page. 0 picks a free one."""
    host: str = "127.0.0.1"
    """Address that both APIs listen on. Loopback, because it needs no password."""
    insecure: bool = False
    """Allow a host that other machines can reach, without TLS. For private networks only."""

    workers: int = Field(default=1, ge=1, le=64)
    """Workers on this machine, each with the whole model."""
    replicas: int | None = Field(default=None, ge=1, le=64)
    """Another name for workers."""
    gateways: int = Field(default=1, ge=1, le=64)
    """Gateways on this machine."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Devices that share one model. Only 1 works in this version."""
    ready_file: Path | None = None
    """File that is written, as JSON, once everything is ready, and again whenever a process is replaced."""

    @model_validator(mode="after")
    def _check(self) -> UpSettings:
        if self.tensor_parallel > 1:
            raise ValueError("--tensor-parallel above 1 is not built yet: leave it out, and use --workers for replicas")
        if self.replicas is not None and "workers" in self.model_fields_set and self.replicas != self.workers:
            raise ValueError("--replicas and --workers are the same setting: give only one of them")
        if self.ready_file is not None and not self.ready_file.parent.is_dir():
            raise ValueError(f"--ready-file: the folder {self.ready_file.parent} does not exist")
        if self.ready_file is not None and self.ready_file.is_dir():
            raise ValueError(f"--ready-file: {self.ready_file} is a folder; give a file in it")
        return self

    @property
    def num_workers(self) -> int:
        """Workers to run."""
        return self.replicas or self.workers


_WORKER_FLAGS = (
    "device",
    "dtype",
    "load_format",
    "max_model_len",
    "block_size",
    "num_blocks",
    "host_blocks",
    "max_num_seqs",
    "token_budget",
)
_SCHEDULER_FLAGS = (
    "max_num_seqs",
    "token_budget",
    "target_itl_ms",
    "preemption_mode",
    "prefix_cache",
    "host_prefix_cache",
    "record",
    "record_dir",
)


@dataclass
class Child:
    """One place in the team, and the process that fills it at the moment."""

    role: Literal["scheduler", "worker", "gateway"]
    index: int
    arguments: Callable[[], list[str]]
    """Made anew for each start: a free port that was picked once is kept."""
    process: subprocess.Popen[bytes] | None = None
    ended: asyncio.Future[int] | None = None
    """The process's exit code."""
    ready: dict[str, Any] = field(default_factory=dict)
    """What the last ready process told; empty before the first."""
    failed_starts: int = 0
    """Processes in a row that ended before they were ready."""
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    """Times of recent deaths, monotonic seconds."""

    @property
    def name(self) -> str:
        """For people."""
        return self.role if self.role == "scheduler" else f"{self.role} {self.index}"

    def delay_s(self, now: float) -> float:
        """The pause before the next start: doubled for each recent death and each start that failed in a row."""
        recent = sum(1 for death in self.deaths if now - death < RECENT_S)
        doublings = max(recent - 1, self.failed_starts - 1, 0)
        return float(min(FIRST_DELAY_S * 2 ** min(doublings, 16), LONGEST_DELAY_S))


async def supervise(settings: UpSettings) -> None:
    """Runs until it is cancelled, then stops every child. Raises StartError when a child cannot start."""
    parent_folder = tempfile.gettempdir()
    if len(parent_folder) > LONGEST_FOLDER:
        parent_folder = "/tmp"
    with tempfile.TemporaryDirectory(prefix="pagewire-", dir=parent_folder, ignore_cleanup_errors=True) as folder:
        await Supervisor(settings, Path(folder)).run()


class Supervisor:
    """Starts, watches, replaces and stops the children.

    Args:
        settings: what to run.
        folder: private folder for the socket between the roles.
        command: how a role is started; tests put stand-ins here.
    """

    def __init__(
        self,
        settings: UpSettings,
        folder: Path,
        command: tuple[str, ...] = (sys.executable, "-m", "pagewire.cli"),
    ) -> None:
        self.settings = settings
        self.command = command
        self._gpus = gpus.for_workers(settings.num_workers, settings.device)
        self.scheduler_address = f"unix:{folder / 'scheduler.sock'}"
        self.children = [Child("scheduler", 0, self._scheduler_arguments)]
        self.children += [Child("worker", index, self._worker_arguments) for index in range(settings.num_workers)]
        for index in range(settings.gateways):
            self.children.append(Child("gateway", index, partial(self._gateway_arguments, index)))
        self._all_ready = asyncio.Event()
        self._is_announced = False
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serves until cancelled. Raises StartError if a child cannot start."""
        self._remove_old_ready_file()
        model = self.settings.model or BUNDLED_NAME
        _say(f"starting {model}: scheduler, workers: {self.settings.num_workers}, gateways: {self.settings.gateways}")
        keepers = [asyncio.ensure_future(self._keep(child)) for child in self.children]
        try:
            either: list[asyncio.Future[Any]] = [self._failure, *keepers]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                if keeper.done():
                    keeper.result()  # a defect of this module: let it be seen
            raise StartError(self._failure.result())
        finally:
            for keeper in keepers:
                keeper.cancel()
            await self._stop()

    # Arguments of the roles.

    def _scheduler_arguments(self) -> list[str]:
        metrics_port = _port_of(self._child("scheduler", 0).ready.get("metrics")) or self.settings.metrics_port
        arguments = ["--listen", self.scheduler_address, "--metrics-port", str(metrics_port)]
        return arguments + self._flags(_SCHEDULER_FLAGS)

    def _worker_arguments(self) -> list[str]:
        return ["--scheduler", self.scheduler_address, *self._model_arguments(), *self._flags(_WORKER_FLAGS)]

    def _gateway_arguments(self, index: int) -> list[str]:
        listen = self._gateway_listens(index, "grpc", self.settings.grpc_port)
        http = self._gateway_listens(index, "http", self.settings.http_port) if self.settings.http else "off"
        arguments = ["--scheduler", self.scheduler_address, "--listen", listen, "--http-listen", http]
        arguments += ["--insecure"] if self.settings.insecure else []
        arguments += ["--api-keys-file", str(self.settings.api_keys_file)] if self.settings.api_keys_file else []
        return arguments + self._model_arguments()

    def _gateway_listens(self, index: int, door: str, port: int) -> str:
        # A replaced gateway listens where the one before it did, so that clients find it again.
        kept = _port_of(self._child("gateway", index).ready.get(door))
        return f"{self.settings.host}:{kept or (port + index if port else 0)}"

    def _model_arguments(self) -> list[str]:
        model = self.settings.model or str(BUNDLED_MODEL)
        name = self.settings.served_model_name or ("" if self.settings.model else BUNDLED_NAME)
        return ["--model", model, *(["--served-model-name", name] if name else [])]

    def _flags(self, names: tuple[str, ...]) -> list[str]:
        """Flags for the settings that were given."""
        flags: list[str] = []
        for name in names:
            value = getattr(self.settings, name)
            if isinstance(value, bool):
                flags.append(flag_name(name) if value else flag_name(f"no_{name}"))
            elif value is not None:
                flags += [flag_name(name), str(value)]
        return flags

    def _tracing_flags(self) -> list[str]:
        return self._flags(("otlp_endpoint", "trace_sample_ratio")) if self.settings.otlp_endpoint else []

    def _child(self, role: str, index: int) -> Child:
        return next(child for child in self.children if (child.role, child.index) == (role, index))

    # The life of a child.

    async def _keep(self, child: Child) -> None:
        """Starts a child and replaces it whenever it ends, until the supervisor stops."""
        while True:
            started = time.monotonic()
            pipe = self._start(child)
            if self._all_ready.is_set():
                self._write_ready_file()
            answer = await _read_answer(pipe)
            assert child.ended is not None
            refusal = answer.get("error") if answer else None
            if answer and not refusal:
                child.ready, child.failed_starts = answer, 0
                self._say_ready(child, time.monotonic() - started)
                self._note_ready()
            code = await asyncio.shield(child.ended)
            child.deaths.append(time.monotonic())
            if refusal and not self._all_ready.is_set():
                self._fail(refusal)
                return
            if not answer or refusal:
                child.failed_starts += 1
                if child.failed_starts >= START_ATTEMPTS and not self._all_ready.is_set():
                    how = _how_it_ended(code)
                    self._fail(f"{child.name} ended {child.failed_starts} times before it was ready, last {how}")
                    return
            delay_s = child.delay_s(time.monotonic())
            _say(f"{child.name} {refusal or _how_it_ended(code)}; starting it again in {delay_s:.1f} s", sys.stderr)
            await asyncio.sleep(delay_s)

    def _start(self, child: Child) -> int:
        """Starts the process. Returns the descriptor on which it tells its readiness; the caller closes it."""
        reading, writing = os.pipe()
        try:
            child.process = subprocess.Popen(
                [
                    *self.command,
                    child.role,
                    *child.arguments(),
                    "--ready-fd",
                    str(writing),
                    "--log-level",
                    self.settings.log_level,
                    *self._tracing_flags(),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(writing,),
                # A group of its own: Ctrl-C reaches this process alone, which then stops the children in order.
                process_group=0,
                # The variable names the scheduler's page, whose flag has it; others would want the same port.
                env={
                    **_environment_without("PAGEWIRE_METRICS_PORT"),
                    parent.VARIABLE: str(os.getpid()),
                    **(gpus.share(child.index, self._gpus) if child.role == "worker" else {}),
                },
            )
        finally:
            os.close(writing)
        child.ended = _watch(child.process)
        return reading

    def _fail(self, line: str) -> None:
        if not self._failure.done():
            self._failure.set_result(line)

    def _note_ready(self) -> None:
        if all(child.ready for child in self.children):
            if not self._all_ready.is_set():
                self._all_ready.set()
                http = self._address("gateway", "http")
                doors = f"gRPC on {self._address('gateway', 'grpc')}"
                if http:
                    doors += f", HTTP on http://{http}/v1, console on http://{http}/console"
                _say(f"ready: {doors}; Ctrl-C stops everything")
            self._write_ready_file()

    async def _stop(self) -> None:
        """Ends gateways first, so that clients are told while there is still someone to tell them; then the rest.

        The scheduler goes before the workers, to which it looks like a scheduler that will be back; the other way round
        it would look for workers to take the requests over.
        """
        for stage in ("gateway", "scheduler", "worker"):
            alive = [child for child in self.children if child.role == stage and _is_alive(child)]
            for child in alive:
                _signal(child, signal.SIGTERM)
            await self._wait_for(alive)
        alive = [child for child in self.children if _is_alive(child)]
        for child in alive:
            if child.ready:  # before it is ready it imports what takes long on a busy machine, and holds nothing
                _say(f"{child.name} did not stop within {GRACE_S:g} s and is killed", sys.stderr)
            _signal(child, signal.SIGKILL)
        await self._wait_for(alive)

    async def _wait_for(self, children: list[Child]) -> None:
        waiting = [child.ended for child in children if child.ended is not None]
        if waiting:
            await asyncio.wait(waiting, timeout=GRACE_S)

    # What others see.

    def _address(self, role: str, key: str) -> str | None:
        value = self._child(role, 0).ready.get(key)
        return str(value) if value else None

    def _pids(self, role: str) -> list[int]:
        return [child.process.pid for child in self.children if child.role == role and child.process]

    def _remove_old_ready_file(self) -> None:
        """Whoever waits for the file must not find the one of an earlier run."""
        if self.settings.ready_file is not None:
            try:
                self.settings.ready_file.unlink(missing_ok=True)
            except OSError as error:
                raise StartError(f"--ready-file {self.settings.ready_file}: {error.strerror}") from None

    def _write_ready_file(self) -> None:
        """Writes the ready file atomically: readers see the old one or the new one."""
        path = self.settings.ready_file
        if path is None:
            return
        content = {
            "grpc": self._address("gateway", "grpc"),
            "http": self._address("gateway", "http"),
            "metrics": self._address("scheduler", "metrics"),
            "pids": {
                "scheduler": self._pids("scheduler")[0],
                "workers": self._pids("worker"),
                "gateways": self._pids("gateway"),
            },
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(path)
        except OSError as error:
            # Those that are served need no file: only a start depends on it.
            line = f"--ready-file {path}: {error.strerror}"
            if self._is_announced:
                _say(line, sys.stderr)
            else:
                self._fail(line)
            return
        self._is_announced = True

    def _say_ready(self, child: Child, seconds: float) -> None:
        assert child.process is not None
        facts = [f"pid {child.process.pid}"]
        if child.role == "scheduler" and child.ready.get("metrics"):
            facts.append(f"metrics http://{child.ready['metrics']}/metrics")
        if child.role == "worker" and child.ready.get("worker_id"):
            facts.append(str(child.ready["worker_id"]))
        if child.role == "gateway":
            facts.append(f"gRPC {child.ready.get('grpc')}")
            facts.append(f"HTTP {child.ready['http']}" if child.ready.get("http") else "HTTP off")
        _say(f"{child.name:<10} ready after {seconds:5.1f} s  {', '.join(facts)}")


async def _read_answer(pipe: int) -> dict[str, Any] | None:
    """The child's line; None if it ended without one. Closes the descriptor."""
    reader = asyncio.StreamReader(limit=2 * MAX_LINE_BYTES)
    transport, _protocol = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
    )
    try:
        line = await reader.readline()
    finally:
        transport.close()
    answer = json.loads(line) if line.endswith(b"\n") else None
    return answer if isinstance(answer, dict) else None


def _watch(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """A future of the exit code. A thread waits, because it works on every platform and with every event loop."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def settle(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody asks any more
            loop.call_soon_threadsafe(settle, code)

    threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()
    return ended


def _is_alive(child: Child) -> bool:
    return child.ended is not None and not child.ended.done()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process is not None:
        child.process.send_signal(number)  # does nothing to a process that has ended


def _environment_without(name: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != name}


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _port_of(address: Any) -> int | None:
    """The port of `host:port`; None for anything else."""
    port = str(address or "").rpartition(":")[2]
    return int(port) if port.isdecimal() else None


def _say(line: str, stream: Any = None) -> None:
    print(f"pagewire up: {line}", file=stream or sys.stdout, flush=True)
