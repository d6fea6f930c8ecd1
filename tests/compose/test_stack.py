"""The images and docker-compose.yml on a real engine. `make test-compose` runs these; `make test` only says so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests.compose.engine import NoEngineError, engine
from tests.compose.stack import BUILD_LIMIT_S, Stack
from tests.deploy.test_observability import dashboard_expressions
from tests.service.service import generate, greedy, loads

pytestmark = [
    pytest.mark.skipif(not os.environ.get("PAGEWIRE_TEST_COMPOSE"), reason="make test-compose runs these"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
PROMPT = [11, 12, 13, 14, 15, 16, 17]
NUM_TOKENS = 600
PROMETHEUS_LIMIT_S = 120
BREAK_AT = 40
"""Tokens of a stream that have arrived when something is killed: it is under way and far from its end."""

COMPILE_A_KERNEL = """
from kernels import compile
text = compile.source("sampling.cu", {"DTYPE": "bfloat16", "VECTOR": 8})
print(len(compile.compile_to_cubin(text, "sm_90a").image))
"""
Responses = AsyncIterator[inference_pb2.GenerateResponse]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    try:
        with engine() as made:
            running = Stack.of(made)
            try:
                running.compose("build", timeout=BUILD_LIMIT_S)
                running.compose("up", "--detach")
                running.wait_healthy()
                yield running
            finally:
                running.compose("down", "--volumes", "--timeout", "5")
    except NoEngineError as why:
        pytest.skip(f"no Docker engine: {why}")


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return greedy(PROMPT, NUM_TOKENS, **fields)


async def follow(responses: Responses, tokens: list[int], at_break: Callable[[], object] | None = None) -> None:
    """Appends a stream's tokens, which must come without a gap or a repeat; calls `at_break` once, in mid-stream."""
    async for response in responses:
        assert response.first_token == len(tokens), "a gap or a repeat in the stream"
        tokens.extend(response.token_ids)
        if at_break is not None and len(tokens) >= BREAK_AT:
            await asyncio.to_thread(at_break)
            at_break = None
    assert at_break is None, "the stream ended before its break"


async def undisturbed(stack: Stack) -> list[int]:
    async with stack.channel() as channel:
        tokens = (await generate(channel, request())).token_ids
    assert len(tokens) == NUM_TOKENS
    return tokens


async def test_tokens_stream_through_both_published_ports(stack: Stack) -> None:
    def over_http() -> list[str]:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{stack.http_port}/v1/completions", body, 60) as answer:
            return [line.decode().strip() for line in answer if line.strip()]

    lines = await asyncio.to_thread(over_http)
    assert len(lines) > 2
    assert lines[-1] == "data: [DONE]"
    streamed = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    async with stack.channel() as channel:
        assert (await generate(channel, greedy(PROMPT, 8))).text == streamed


def test_ports_are_published_on_loopback_only(stack: Stack) -> None:
    published = [
        binding["HostIp"]
        for service in ("scheduler", "worker", "gateway")
        for container in stack.containers(service)
        for bindings in stack.inspect(container)["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    ]
    assert published == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.parametrize("service", ["scheduler", "worker", "gateway"])
def test_no_role_runs_as_root(stack: Stack, service: str) -> None:
    (container,) = stack.containers(service)
    assert stack.engine.docker("exec", container, "id", "-u").strip() == "10001"


def test_only_workers_have_torch(stack: Stack) -> None:
    look = "from importlib.util import find_spec as f; print(*filter(f, ['torch', 'transformers', 'numpy']))"
    found = {}
    for service in ("scheduler", "gateway", "worker"):
        (container,) = stack.containers(service)
        found[service] = stack.engine.docker("exec", container, "python", "-c", look).split()
    assert found["scheduler"] == []
    assert "torch" not in found["gateway"]
    assert "torch" in found["worker"]


def test_every_role_has_a_health_check_that_passes(stack: Stack) -> None:
    for service in ("scheduler", "worker", "gateway"):
        (container,) = stack.containers(service)
        # The check of the image, run now rather than at the engine's next round.
        check = stack.inspect(container)["Config"]["Healthcheck"]["Test"]
        assert check[:3] == ["CMD", "pagewire", "health"]
        assert stack.engine.docker("exec", container, *check[1:]) == ""


def test_the_image_for_gpus_compiles_kernels_and_says_in_one_line_what_this_machine_lacks(stack: Stack) -> None:
    stack.compose("--profile", "gpu", "build", "worker-gpu", timeout=BUILD_LIMIT_S)
    image = "pagewire-worker-cuda:test"
    size = stack.engine.docker(
        *("run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", COMPILE_A_KERNEL), timeout=120
    )
    assert int(size) > 1000
    with pytest.raises(RuntimeError, match=r"pagewire worker: --device cuda, but .*; or use --device cpu"):
        stack.engine.docker("run", "--rm", "--network", "none", image, "--scheduler", "unix:/tmp/none", timeout=120)


async def test_prometheus_reads_every_role_and_answers_what_dashboard_and_alerts_ask(
    stack: Stack, tmp_path: Path
) -> None:
    if binary := shutil.which("prometheus"):
        stack.pack_prometheus(tmp_path, Path(binary))
    elif "PAGEWIRE_BASE" in stack.engine.environment:
        pytest.skip("nothing is pulled here, and prometheus is not installed (Debian: prometheus)")
    await undisturbed(stack)
    try:
        await asyncio.to_thread(stack.compose, "up", "--detach", "--no-deps", "prometheus")
        async with asyncio.timeout(PROMETHEUS_LIMIT_S):
            await until(lambda: reads(stack) == {"scheduler": ["up"], "worker": ["up"], "gateway": ["up"]})
            await until(lambda: {rule["health"] for rule in rules(stack)} == {"ok"})
            # A rate needs two readings, which are five seconds apart.
            await until(lambda: all(asked(stack, one) for one in dashboard_expressions()))
        assert [rule["name"] for rule in rules(stack) if rule["state"] == "firing"] == []
    finally:
        await asyncio.to_thread(stack.compose, "rm", "--stop", "--force", "prometheus")


async def until(holds: Callable[[], bool]) -> None:
    """Asks again and again; a Prometheus that does not answer yet is no error."""
    while True:
        with contextlib.suppress(OSError):
            if await asyncio.to_thread(holds):
                return
        await asyncio.sleep(0.5)


def reads(stack: Stack) -> dict[str, list[str]]:
    """The health of what Prometheus reads, by job."""
    found: dict[str, list[str]] = {}
    for target in stack.ask_prometheus("targets", state="active")["activeTargets"]:
        found.setdefault(target["labels"]["job"], []).append(target["health"])
    return found


def asked(stack: Stack, expression: str) -> list[Any]:
    """The series that an expression of the dashboard gives now."""
    expression = expression.replace("$__rate_interval", "1m")
    series: list[Any] = stack.ask_prometheus("query", query=expression)["result"]
    return series


def rules(stack: Stack) -> list[dict[str, str]]:
    return [rule for group in stack.ask_prometheus("rules")["groups"] for rule in group["rules"]]


async def test_a_stream_goes_on_when_the_only_worker_is_killed_and_restarted_by_the_engine(stack: Stack) -> None:
    expected = await undisturbed(stack)
    (worker,) = stack.containers("worker")

    def crash() -> None:
        # From inside, as a crash: a container that `docker kill` ends is not restarted. The shell may go with the rest.
        with contextlib.suppress(RuntimeError):
            stack.engine.docker("exec", worker, "sh", "-c", "kill -KILL -1")

    tokens: list[int] = []
    async with stack.channel() as channel:
        await follow(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request()), tokens, crash)
    assert tokens == expected
    assert stack.inspect(worker)["RestartCount"] == 1


async def test_of_two_workers_one_container_is_killed_and_every_stream_goes_on(stack: Stack) -> None:
    expected = await undisturbed(stack)
    stack.compose("up", "--detach", "--no-recreate", "--scale", "worker=2")
    async with stack.channel() as channel:
        async with asyncio.timeout(120):
            while len(await loads(channel)) < 2:
                await asyncio.sleep(0.2)
        streams: list[list[int]] = [[] for _ in range(4)]
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def kill_a_busy_one() -> None:
            while not (busy := [load.worker_id for load in await loads(channel) if load.running]):
                await asyncio.sleep(0.01)
            # A worker's id begins with its host's name, which is its container's id.
            await asyncio.to_thread(stack.engine.docker, "kill", busy[0].partition("-")[0])

        async with asyncio.TaskGroup() as group:
            for tokens in streams:
                group.create_task(follow(stub.Generate(request()), tokens))
            group.create_task(kill_a_busy_one())
        assert streams == [expected] * 4
        assert len(stack.containers("worker")) == 1


async def test_a_stream_is_resumed_by_attach_when_the_gateway_is_restarted(stack: Stack) -> None:
    expected = await undisturbed(stack)
    tokens: list[int] = []

    def restart() -> None:
        stack.compose("restart", "--timeout", "5", "gateway")

    async with stack.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request(request_id="resumed"), metadata=[("pagewire-detach", "true")])
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await follow(call, tokens, restart)
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    assert BREAK_AT <= len(tokens) < NUM_TOKENS
    await asyncio.to_thread(stack.wait_healthy)
    position = inference_pb2.SequencePosition(index=0, first_token=len(tokens))
    async with stack.channel() as channel:
        attach = inference_pb2.AttachRequest(request_id="resumed", positions=[position])
        await follow(inference_pb2_grpc.InferenceServiceStub(channel).Attach(attach), tokens)
    assert tokens == expected
