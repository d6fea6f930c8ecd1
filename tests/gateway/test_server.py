"""What the gateway's port serves beside inference, and how the process starts and stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway.server import Gateway, serve
from gateway.session import SchedulerLink
from gateway.tokenizer import load_tokenizer
from pagewire.runtime.errors import StartError
from pagewire.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, open_inference_pb2_grpc
from tests.gateway import tiny_tokenizers
from tests.gateway.bad_requests import kserve
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.fake_scheduler import LIMIT_S, FakeScheduler, model_state
from tests.gateway.test_generate import ask, refusal

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ROOT = Path(__file__).parents[2]
START = (
    "from gateway.config import GatewaySettings; from gateway.server import serve; "
    "from pagewire.runtime.settings import role_command; import typer; typer.run(role_command(GatewaySettings, serve))"
)


async def test_the_metrics_page_follows_the_model_and_the_requests(make_world: MakeWorld) -> None:
    world = await make_world(metrics_port=0)

    async def read(path: str) -> str:
        host, port = str(world.gateway.metrics_address).split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        page = await reader.read()
        writer.close()
        return page.decode()

    page = await read("/metrics")
    assert "\npagewire_gateway_ready 1.0\n" in page
    assert "\npagewire_gateway_live_requests 0.0\n" in page
    assert "\nprocess_resident_memory_bytes " in page
    assert (await read("/health")).startswith("HTTP/1.1 200")
    await world.scheduler.stop()
    while world.gateway.link.ready:
        await asyncio.sleep(0)
    assert "\npagewire_gateway_ready 0.0\n" in await read("/metrics")
    assert (await read("/health")).startswith("HTTP/1.1 503")


@pytest.mark.parametrize("name", ["", "pagewire.v1.InferenceService", "inference.GRPCInferenceService"])
async def test_health_follows_the_model_and_the_scheduler(world: World, name: str) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))

    async def next_status() -> int:
        async with asyncio.timeout(LIMIT_S):
            answer = await watch.read()
        return int(answer.status)

    assert await next_status() == SERVING
    world.scheduler.set_state(model_state(ready=False))
    assert await next_status() == NOT_SERVING
    world.scheduler.set_state(model_state())
    assert await next_status() == SERVING
    await world.scheduler.stop()
    assert await next_status() == NOT_SERVING
    await world.scheduler.start()
    assert await next_status() == SERVING
    watch.cancel()


async def test_a_gateway_without_a_scheduler_is_up_but_not_serving(make_world: MakeWorld) -> None:
    world = await make_world(wait=False)
    await world.scheduler.opened()
    await world.scheduler.stop()
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(LIMIT_S):
        while (await watch.read()).status != NOT_SERVING:
            pass
    watch.cancel()
    details = await refusal(world.stub.Generate(ask()))
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "NO_SCHEDULER")
    assert details.retry_after_ns > 0


async def test_a_gateway_that_stops_tells_its_streams_why(make_world: MakeWorld) -> None:
    world = await make_world()
    call = world.stub.Generate(ask())
    await world.scheduler.expect("submit")
    stopping = asyncio.create_task(world.gateway.stop())
    details = await refusal(call)
    await stopping
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "DRAINING")
    assert details.message == "this gateway is stopping; resume with Attach"


async def test_a_gateway_that_stops_tells_open_inference_clients_why(make_world: MakeWorld) -> None:
    world = await make_world()
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(world.channel)
    whole = stub.ModelInfer(kserve())
    await world.scheduler.expect("submit")
    stream = stub.ModelStreamInfer()
    await stream.write(kserve())
    await world.scheduler.expect("submit")
    strict = stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    await strict.write(kserve())
    await world.scheduler.expect("submit")
    stopping = asyncio.create_task(world.gateway.stop())
    for call in (whole, strict):
        details = await refusal(call)
        assert (details.code.name, details.reason) == ("UNAVAILABLE", "DRAINING")
    async with asyncio.timeout(LIMIT_S):
        answer = await stream.read()
        assert answer.error_message.startswith("DRAINING: ")
        assert answer.infer_response.parameters["code"].string_param == "UNAVAILABLE"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping


async def test_an_operator_is_told_once_that_the_scheduler_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = structlog.testing.CapturingLogger()
    monkeypatch.setattr("gateway.session.log", logs)
    monkeypatch.setattr("gateway.session.FIRST_BACKOFF_S", 0.0)
    link = SchedulerLink("127.0.0.1:1", "g", 1.0)
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(LIMIT_S):
        while len(logs.calls) < 12:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    (warning,) = [call for call in logs.calls if call.method_name == "warning"]
    assert warning.kwargs["scheduler"] == "127.0.0.1:1"


async def test_reflection_names_the_services_and_can_be_turned_off(make_world: MakeWorld) -> None:
    world = await make_world()
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(world.channel).ServerReflectionInfo(iter([request]))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {"pagewire.v1.InferenceService", "pagewire.v1.ControlService", "grpc.health.v1.Health"} <= names
    closed = await make_world(reflection=False)
    call = reflection_pb2_grpc.ServerReflectionStub(closed.channel).ServerReflectionInfo(iter([request]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_control_calls_are_passed_on_to_the_scheduler(world: World) -> None:
    stub: Any = control_pb2_grpc.ControlServiceStub(world.channel)
    info = await stub.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (info.version, info.protocol_version) == ("fake", 1)
    details = await refusal(stub.ListWorkers(control_pb2.ListWorkersRequest()))
    assert details.code == grpc.StatusCode.UNIMPLEMENTED
    await world.scheduler.stop()
    details = await refusal(stub.GetServerInfo(control_pb2.GetServerInfoRequest()))
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "NO_SCHEDULER")


def test_a_directory_without_a_tokenizer_is_served_and_a_missing_one_refused(tmp_path: Path) -> None:
    assert load_tokenizer("") is None
    with pytest.raises(StartError, match="holds neither a model nor a tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None
    with pytest.raises(StartError, match="no such directory"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(StartError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


async def test_a_chat_template_that_is_no_jinja_is_a_start_error(make_world: MakeWorld) -> None:
    broken = tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level(), template="{% for %}")
    with pytest.raises(StartError, match="chat template"):
        await make_world(broken)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "nonsense"])
async def test_addresses_that_cannot_be_are_refused(address: str) -> None:
    from gateway.config import GatewaySettings

    gateway = Gateway(GatewaySettings(listen=address), None)
    with pytest.raises(StartError):
        await gateway.start()
    await gateway.stop()


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


async def test_the_process_announces_itself_when_the_model_is_ready_and_stops_on_sigterm(
    model_directory: Path, tmp_path: Path
) -> None:
    scheduler = FakeScheduler()
    scheduler.state = model_state(ready=False)
    await scheduler.start()
    ours, theirs = os.pipe()
    arguments = ["--scheduler", scheduler.address, "--listen", "127.0.0.1:0", "--model", str(model_directory)]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-c", START, *arguments, "--ready-fd", str(theirs)],
            cwd=ROOT,
            pass_fds=[theirs],
            stderr=stderr,
        )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        await scheduler.opened()
        with pytest.raises(BlockingIOError):
            os.read(ours, 4096)
        os.set_blocking(ours, True)
        scheduler.set_state(model_state())
        async with asyncio.timeout(LIMIT_S):
            line = json.loads(await asyncio.to_thread(os.read, ours, 4096))
        assert line["http"] is None
        async with grpc.aio.insecure_channel(line["grpc"]) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            answer = await stub.Tokenize(inference_pb2.TokenizeRequest(text="the cat"))
        assert list(answer.token_ids) == tiny_tokenizers.byte_level().encode("the cat").ids
    finally:
        os.close(ours)
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait)
        await scheduler.stop()
    assert process.returncode == 0
    text = (tmp_path / "stderr").read_text()
    assert "Traceback" not in text
    imported = {line.rsplit("|", 1)[-1].strip() for line in text.splitlines() if line.startswith("import time:")}
    assert any(name.startswith("transformers.") for name in imported)
    assert not any(name.split(".")[0] == "torch" for name in imported)


async def test_a_stop_does_not_wait_for_a_tokenizer_that_hangs_in_its_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gateway.config import GatewaySettings

    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang(_model: str) -> None:
        loop.call_soon_threadsafe(begun.set)
        release.wait()

    monkeypatch.setattr("gateway.server.load_tokenizer", hang)
    serving = asyncio.create_task(serve(GatewaySettings(listen="127.0.0.1:0")))
    await begun.wait()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "load-tokenizer"]
    assert thread.daemon
    serving.cancel()
    await asyncio.wait([serving])
    release.set()
    thread.join()


def test_the_process_that_cannot_start_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START, "--model", str(tmp_path / "missing"), "--listen", "127.0.0.1:0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pagewire gateway: ")
    assert "missing" in last
