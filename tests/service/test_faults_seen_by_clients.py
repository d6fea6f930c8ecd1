"""What a client sees when the service is full or has no worker, and what `up` says when it cannot start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc

from tests import tiny_models
from tests.service import service
from tests.service.test_plain_client import details_of, prompt


def up_output(*arguments: str) -> tuple[int, str]:
    """Exit code and everything printed by a `pagewire up` that is expected to refuse to start."""
    command = [
        sys.executable,
        "-m",
        "pagewire.cli",
        "up",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--metrics-port",
        "0",
    ]
    done = subprocess.run(
        [*command, "--device", "cpu", *arguments],
        cwd=service.ROOT,
        capture_output=True,
        text=True,
        timeout=service.START_LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_model_directory_that_does_not_exist_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    code, output = up_output("--model", str(tmp_path / "nothing-here"))
    assert code == 2
    assert "nothing-here" in output
    assert "Traceback" not in output


def test_an_unsupported_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "architectures": ["BloomForCausalLM"]}')
    code, output = up_output("--model", str(tmp_path), "--load-format", "dummy")
    assert code == 2
    assert "bloom" in output.lower()
    assert "Traceback" not in output


async def test_a_full_queue_is_resource_exhausted_with_a_retry_delay(tmp_path: Path) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model")
    environment = {"PAGEWIRE_MAX_WAITING": "2"}
    arguments = ["--model", str(model), "--max-num-seqs", "1", "--block-size", "4", "--num-blocks", "64"]
    async with service.running(tmp_path / "up", *arguments, environment=environment) as up, up.channel() as channel:
        calls = [service.generate(channel, service.greedy(prompt(10, seed), 60)) for seed in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert refused
        for error in refused:
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details_of(error)[2], "RetryInfo"
        served = [result for result in results if isinstance(result, service.Completion)]
        assert all(len(completion.token_ids) == 60 for completion in served)
        assert len(served) + len(refused) == 12
        await service.wait_until_idle(channel)


def test_a_port_in_use_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    model = tiny_models.make_tiny_model("llama", tmp_path / "model")
    running = service.start(tmp_path / "up", "--model", str(model))
    try:
        port = running.address.rsplit(":", 1)[1]
        code, output = up_output("--model", str(model), "--grpc-port", port)
    finally:
        service.stop(running)
    assert code == 2
    assert port in output
    assert "Traceback" not in output
