"""Starts the real service (`pagewire up`: scheduler, workers, gateway as processes) and talks to it with plain grpcio.

Nothing here uses Pagewire's own client: what these tests show must hold for a stranger's client in any language.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from pagewire.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120
"""Long enough for a cold import of torch on a busy two-core machine; a failed start ends much earlier."""


@dataclass
class Service:
    """A running `pagewire up`. `ready` is its ready file's content."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path

    @property
    def ready(self) -> dict:
        """The ready file as it is now: `up` rewrites it whenever a process is replaced."""
        return json.loads(self.ready_file.read_text())

    @property
    def address(self) -> str:
        return self.ready["grpc"]

    @property
    def worker_pids(self) -> list[int]:
        return self.ready["pids"]["workers"]

    def kill_worker(self, index: int = 0) -> int:
        pid = self.worker_pids[index]
        os.kill(pid, signal.SIGKILL)
        return pid

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address)


def start(folder: Path, *arguments: str, device: str = "cpu", environment: dict[str, str] | None = None) -> Service:
    """Starts `pagewire up` with free ports and waits for its ready file. Raises with the log when it exits instead."""
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, log = folder / "ready.json", folder / "up.log"
    command = [sys.executable, "-m", "pagewire.cli", "up", "--ready-file", str(ready_file)]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--device", device, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
    deadline = time.monotonic() + START_LIMIT_S
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"pagewire up did not start (exit {process.poll()}):\n{log.read_text()[-4000:]}")
        time.sleep(0.02)
    return Service(process, ready_file, log)


def stop(service: Service) -> int:
    """Asks the service to stop; returns its exit code, which is 0 for a clean stop."""
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(timeout=60)


@asynccontextmanager
async def running(
    folder: Path, *arguments: str, device: str = "cpu", environment: dict[str, str] | None = None
) -> AsyncIterator[Service]:
    """A service for the length of a `with` block. A failing test shows the end of the service's log."""
    service = await asyncio.to_thread(start, folder, *arguments, device=device, environment=environment)
    try:
        yield service
    except BaseException:
        print(f"--- service log ---\n{service.log.read_text()[-6000:]}")
        raise
    finally:
        code = await asyncio.to_thread(stop, service)
    assert code == 0, f"pagewire up exited with {code}"


@dataclass
class Completion:
    """Everything one sequence index streamed."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: inference_pb2.Finish | None = None
    prompt: inference_pb2.PromptInfo | None = None
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)


def greedy(prompt: Iterable[int], max_tokens: int, **fields: object) -> inference_pb2.GenerateRequest:
    """A greedy request over token ids that runs to its length whatever it samples."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,
    )


async def collect(responses: AsyncIterator[inference_pb2.GenerateResponse]) -> dict[int, Completion]:
    """Reads a stream to its end and checks what every stream promises: positions without a gap or a repeat."""
    completions: dict[int, Completion] = {}
    async for response in responses:
        completion = completions.setdefault(response.index, Completion())
        assert completion.finish is None, "a response after the finish of its index"
        assert response.first_token == len(completion.token_ids), "a gap or a repeat in the stream"
        completion.token_ids.extend(response.token_ids)
        completion.text += response.text
        completion.logprobs.extend(response.logprobs)
        if response.HasField("prompt"):
            completion.prompt = response.prompt
        if response.HasField("finish"):
            completion.finish = response.finish
    assert completions
    assert all(completion.finish is not None for completion in completions.values())
    return completions


async def generate(channel: grpc.aio.Channel, request: inference_pb2.GenerateRequest) -> Completion:
    """One request, one sequence."""
    completions = await collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
    return completions[0]


async def loads(channel: grpc.aio.Channel) -> list[control_pb2.WorkerLoad]:
    response = await control_pb2_grpc.ControlServiceStub(channel).GetLoads(control_pb2.GetLoadsRequest())
    return list(response.loads)


async def wait_until_idle(channel: grpc.aio.Channel, limit_s: float = 30) -> control_pb2.WorkerLoad:
    """Waits until the one worker has joined, nothing runs on it and every block is free again; returns its load."""
    deadline = time.monotonic() + limit_s
    while True:
        now = await loads(channel)
        if now:
            (load,) = now
            idle = load.running == load.waiting == load.swapped == 0
            if idle and load.free_blocks == load.total_blocks and load.free_host_blocks == load.total_host_blocks:
                return load
        assert time.monotonic() < deadline, f"no worker, or blocks are still in use: {now}"
        await asyncio.sleep(0.02)
