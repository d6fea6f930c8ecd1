"""A recording of the real service, replayed by the command on a worker process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pagewire.commands.replay import _worker
from pagewire.recording import RecordingError, WorkerRefusedError
from pagewire.v1 import inference_pb2, inference_pb2_grpc, recording_pb2, worker_pb2
from tests import tiny_models
from tests.service import service
from tests.service.test_sampling_determinism import seeded_requests


def replay(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagewire.cli", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=service.ROOT)


def _cells(line: str) -> list[str]:
    """The cells of a table's row; empty for another line."""
    return line.split("│") if "│" in line else []


async def test_mixed_traffic_with_preemptions_and_a_killed_worker_replays_equal(tmp_path: Path) -> None:
    model, path = tiny_models.make_tiny_model("llama", tmp_path / "model"), tmp_path / "run.rec"
    requests = seeded_requests()[:12]
    for number, request in enumerate(requests):
        if number % 3 == 0:
            request.sampling.Clear()
            request.sampling.temperature = 0
        elif number % 3 == 1:
            request.sampling.n = 2
        request.output.logprobs = number % 2
    beams = inference_pb2.SamplingParams(beam_width=3, n=2)
    searched = inference_pb2.GenerateRequest(token_ids=requests[0].token_ids, sampling=beams, stop=requests[0].stop)
    requests.insert(3, searched)
    arguments = ["--model", str(model), "--dtype", "float32", "--block-size", "4", "--num-blocks", "60"]
    arguments += ["--host-blocks", "60", "--max-num-seqs", "16", "--record", str(path)]
    async with service.running(tmp_path, *arguments) as up, up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await asyncio.gather(*(service.collect(stub.Generate(request)) for request in requests))
        (load,) = await service.loads(channel)
        assert load.preemptions_swap + load.preemptions_recompute > 0
        again = asyncio.gather(*(service.collect(stub.Generate(request)) for request in requests[:4]))
        while not sum(load.running for load in await service.loads(channel)):
            await asyncio.sleep(0)
        up.kill_worker()
        await again

    done = await asyncio.to_thread(replay, path, "--model", model, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: every result is as recorded" in done.stdout

    simulated = await asyncio.to_thread(replay, path, "--simulate", "--calibrate")
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    assert "equal: every plan and every verdict is as recorded" in simulated.stdout
    cells = [_cells(line) for line in simulated.stdout.splitlines()]
    costs = {cell[1].strip(): cell[2].strip().replace(",", "") for cell in cells if cell}
    assert float(costs["per step"]) > 0
    assert float(costs["per decode sequence"]) >= 0
    assert "relative error of a step: p50 " in simulated.stdout

    other = tiny_models.make_tiny_model("llama_tied", tmp_path / "other")
    refused = await asyncio.to_thread(replay, path, "--model", other, "--device", "cpu")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"pagewire replay: {path}: recorded with the model 'model' (fingerprint ")
    assert line.endswith("give its --model")


@pytest.mark.parametrize(("error", "shown"), [(WorkerRefusedError, ""), (RecordingError, "no such model\n")])
def test_a_worker_that_has_been_refused_is_not_heard_a_second_time(
    error: type[Exception],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker = tmp_path / "worker"
    worker.write_text("#!/bin/sh\necho no such model\nexit 2\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    recording = SimpleNamespace(header=recording_pb2.RecordingHeader(block_size=4))
    epochs = [SimpleNamespace(hello=worker_pb2.WorkerHello())]

    def run() -> None:
        with _worker(recording, epochs, "127.0.0.1:1", "m", "cpu", "auto") as is_alive:  # type: ignore[arg-type]
            while is_alive():
                pass
            raise error("refused")

    with pytest.raises(error):
        run()
    assert capfd.readouterr().err == shown
