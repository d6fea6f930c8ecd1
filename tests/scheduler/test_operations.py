"""What operators see: control calls, health, metrics, and the process itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.utils import floatToGoString

from pagewire.runtime import rich_status
from pagewire.v1 import control_pb2, control_pb2_grpc
from tests.scheduler.peers import expected, pool

ROOT = Path(__file__).resolve().parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_server_info_has_the_version_the_model_and_the_settings() -> None:
    async with pool(token_budget=77) as made:
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        before = await stub.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert not before.HasField("model")
        await made.worker()
        info = await stub.GetServerInfo(control_pb2.GetServerInfoRequest())
        assert info.model.fingerprint == "abc"
        assert info.protocol_version == 1
        assert info.version
        assert info.settings["token_budget"] == "77"
        assert info.uptime_ns > before.uptime_ns


async def test_loads_and_workers_follow_what_runs() -> None:
    async with pool(max_num_seqs=2) as made:
        worker, gateway = await made.worker(), await made.gateway()
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        for stream in range(3):
            await gateway.submit(stream, [11 + stream] * 5, max_tokens=6)
        for _ in range(3):
            await worker.step()
        await gateway.until(lambda: gateway.on(0).tokens)
        (load,) = (await stub.GetLoads(control_pb2.GetLoadsRequest())).loads
        assert (load.worker_id, load.epoch) == ("w1", worker.welcome.epoch)
        assert (load.running, load.waiting, load.swapped) == (2, 1, 0)
        assert (load.total_blocks, load.total_host_blocks, load.free_host_blocks) == (256, 16, 16)
        assert load.free_blocks < 256
        (info,) = (await stub.ListWorkers(control_pb2.ListWorkersRequest())).workers
        assert (info.hello.worker_id, info.epoch) == ("w1", worker.welcome.epoch)
        worker.run()
        await gateway.finish(0, 1, 2)
        response = await stub.GetLoads(control_pb2.GetLoadsRequest())
        assert (response.loads[0].running, response.loads[0].free_blocks) == (0, 256)
        assert response.unassigned_requests == 0


async def test_live_requests_are_listed_in_their_states_when_asked_for() -> None:
    async with pool(max_num_seqs=2) as made:
        worker, gateway = await made.worker(), await made.gateway()
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        await gateway.submit(0, [11, 12, 13, 14, 15], max_tokens=100, n=2, tenant="t")
        await worker.step()
        await worker.step()
        await gateway.submit(2, [16, 17], max_tokens=9, priority=-1)
        await gateway.until(lambda: len(gateway.on(1).tokens) == 2)
        none = await stub.GetLoads(control_pb2.GetLoadsRequest())
        assert (len(none.requests), none.live_requests) == (0, 2)
        one = await stub.GetLoads(control_pb2.GetLoadsRequest(max_requests=1))
        assert ([request.request_id for request in one.requests], one.live_requests) == (["r0"], 2)
        answer = await stub.GetLoads(control_pb2.GetLoadsRequest(max_requests=10**9))
        running, waiting = answer.requests
        assert (running.request_id, running.worker_id, running.tenant, running.sequences) == ("r0", "w1", "t", 2)
        assert running.state == control_pb2.REQUEST_STATE_RUNNING
        assert (running.prompt_tokens, running.max_tokens, running.output_tokens) == (5, 100, 4)
        # Five prompt tokens and two of each sample in blocks of four: one full block is shared.
        assert running.blocks == 3
        assert 0 < running.queue_ns <= running.first_token_ns <= running.age_ns
        assert (waiting.request_id, waiting.priority, waiting.blocks) == ("r2", -1, 0)
        assert waiting.state == control_pb2.REQUEST_STATE_WAITING
        assert not waiting.HasField("queue_ns")
        assert not waiting.HasField("first_token_ns")
        (load,) = answer.loads
        assert (load.steps, load.busy_ns, load.prompt_tokens, load.generation_tokens) == (2, 2000, 5, 4)
        assert answer.now_ns >= none.now_ns > 0
        worker.run()
        await gateway.finish(0, 1, 2)


async def test_a_request_without_a_worker_is_listed_as_one_that_waits() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(0, [11, 12], max_tokens=5)
        await worker.step()
        await gateway.until(lambda: gateway.on(0).tokens)
        await worker.stop()
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        while not (answer := await stub.GetLoads(control_pb2.GetLoadsRequest(max_requests=5))).unassigned_requests:
            await asyncio.sleep(0)
        (request,) = answer.requests
        assert (request.worker_id, request.state) == ("", control_pb2.REQUEST_STATE_PREEMPTED)
        (await made.worker()).run()
        await gateway.finish(0)


async def test_drain_over_the_wire_refuses_new_requests_and_can_be_taken_back() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        assert (await stub.Drain(control_pb2.DrainRequest())).live_requests == 0
        await gateway.submit(1, [11])
        await gateway.finish(1)
        failed = gateway.on(1).failed
        assert failed is not None
        assert failed.reason == "DRAINING"
        await stub.Drain(control_pb2.DrainRequest(resume=True))
        await gateway.submit(2, [11], max_tokens=2)
        assert await gateway.finish(2) == [expected([11], 2)]


async def test_a_prefix_can_be_pinned_and_given_free_over_the_wire() -> None:
    async with pool() as made:
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        prefix = control_pb2.PinPrefixRequest(token_ids=[11] * 70, tenant="t")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PinPrefix(prefix)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await made.worker()
        pinned = await stub.PinPrefix(prefix)
        assert (pinned.pinned_tokens, pinned.found) == (68, True)
        prefix.unpin = True
        assert (await stub.PinPrefix(prefix)).found
        assert not (await stub.PinPrefix(prefix)).found


@pytest.mark.parametrize(
    ("fields", "wrong", "words"),
    [
        ({"token_ids": []}, "token_ids", "a full block"),
        ({"token_ids": [10**9] * 64}, "token_ids", "vocabulary"),
        ({"token_ids": [11] * 100_000}, "token_ids", "the context is"),
        ({"token_ids": [11] * 64, "tenant": "t" * 129}, "tenant", "at most 128 characters"),
    ],
)
async def test_a_pin_that_makes_no_sense_is_refused_by_its_field(
    fields: dict[str, Any], wrong: str, words: str
) -> None:
    async with pool() as made:
        await made.worker()
        stub = control_pb2_grpc.ControlServiceStub(made.channel)
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await stub.PinPrefix(control_pb2.PinPrefixRequest(**fields))
        refused = rich_status.decode(caught.value)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        ((path, description),) = refused.violations
        assert path == wrong
        assert refused.message == f"{path}: {description}"


async def test_a_truncated_control_call_is_an_invalid_argument() -> None:
    async with pool() as made:
        for method in ("GetServerInfo", "GetLoads", "ListWorkers", "Drain", "PinPrefix"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await made.channel.unary_unary(f"/pagewire.v1.ControlService/{method}")(b"\xff")
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_health_of_the_session_service_follows_the_workers_and_draining() -> None:
    async with pool() as made:
        stub = health_pb2_grpc.HealthStub(made.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="pagewire.v1.SchedulerService"))
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        seen = await watch.read()
        while seen.status != NOT_SERVING:  # it may be asked before the first status is known
            seen = await watch.read()
        worker = await made.worker()
        assert (await watch.read()).status == SERVING
        made.serving.engine.drain(resume=False)
        assert (await watch.read()).status == NOT_SERVING
        made.serving.engine.drain(resume=True)
        assert (await watch.read()).status == SERVING
        await worker.stop()
        assert (await watch.read()).status == NOT_SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        watch.cancel()


async def test_metrics_have_the_documented_names_and_count_what_happened() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11, 12, 13], max_tokens=6)
        await gateway.submit(2, [14, 12, 13], max_tokens=6)
        await gateway.finish(1, 2)
        page = await made.read()
        assert page.startswith("HTTP/1.1 200 OK")
        for line in (
            "pagewire_requests_running 0.0",
            "pagewire_requests_waiting 0.0",
            "pagewire_requests_swapped 0.0",
            'pagewire_kv_cache_usage_ratio{worker="w1"} 0.0',
            'pagewire_kv_blocks{state="used",worker="w1"} 0.0',
            'pagewire_preemptions_total{mode="swap"} 0.0',
            'pagewire_preemption_cost_seconds_count{kind="predicted",mode="recompute"} 0.0',
            "pagewire_prefix_cache_queries_total",
            'pagewire_prefix_cache_hits_total{tier="gpu"}',
            'pagewire_prefix_cache_hits_total{tier="host"} 0.0',
            "pagewire_prompt_tokens_total 6.0",
            "pagewire_generation_tokens_total 12.0",
            "pagewire_time_to_first_token_seconds_count 2.0",
            "pagewire_inter_token_latency_seconds_count 10.0",
            "pagewire_e2e_request_latency_seconds_count 2.0",
            "pagewire_request_queue_seconds_count 2.0",
            'pagewire_request_success_total{finish_reason="length"} 2.0',
            'pagewire_swap_bytes_total{direction="out"} 0.0',
            'pagewire_swap_seconds_total{direction="in"} 0.0',
            f'pagewire_step_seconds_count{{part="forward"}} {len(worker.plans)}.0',
            'pagewire_step_seconds_bucket{le="+Inf",part="plan"}',
            'pagewire_step_seconds_bucket{le="+Inf",part="wire"}',
            'pagewire_step_seconds_bucket{le="+Inf",part="sample"}',
            'pagewire_worker_gpu_idle_seconds_total{worker="w1"} 0.0',
            f'pagewire_worker_epoch{{worker="w1"}} {floatToGoString(worker.welcome.epoch)}',
            "pagewire_stale_results_total 0.0",
            'pagewire_kv_waste_ratio{worker="w1"} 0.0',
            'pagewire_plan_lead_seconds{behind="decodes",worker="w1"} ',
            'pagewire_plan_lead_seconds{behind="chunks",worker="w1"} ',
            'pagewire_gathering_wait_seconds{worker="w1"} ',
        ):
            assert line in page, line


async def test_totals_of_a_lost_worker_are_kept() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11] * 9, max_tokens=2)
        await gateway.finish(1)
        await gateway.submit(2, [11] * 9, max_tokens=2)
        await gateway.finish(2)
        before = hits(await made.read())
        assert before > 0
        await worker.stop()
        while made.serving.engine.workers:
            await asyncio.sleep(0)
        assert hits(await made.read()) == before


async def test_a_scheduler_that_stops_ends_its_streams_with_unavailable() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        made.serving.engine.shut_down()
        assert await worker.status() == (grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down")
        assert await gateway.status() == (grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down")


async def test_a_worker_is_lost_with_a_warning_but_not_when_the_scheduler_itself_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs = structlog.testing.CapturingLogger()
    monkeypatch.setattr("scheduler.engine.log", logs)
    async with pool() as made:
        worker, other = await made.worker("w1"), await made.worker("w2")
        engine = made.serving.engine
        await worker.stop()
        while len(engine.workers) > 1:
            await asyncio.sleep(0)
        engine.shut_down()
        await other.status()
        while engine.workers:
            await asyncio.sleep(0)
    levels = [(call.kwargs["worker"], call.method_name) for call in logs.calls if call.args == ("worker lost",)]
    assert levels == [("w1", "warning"), ("w2", "info")]


def hits(page: str) -> float:
    (line,) = [line for line in page.splitlines() if line.startswith('pagewire_prefix_cache_hits_total{tier="gpu"}')]
    return float(line.split()[-1])


async def test_other_pages_and_methods_are_refused_in_http() -> None:
    async with pool() as made:
        assert (await made.read("/secret")).startswith("HTTP/1.1 404")
        host, port = str(made.serving.metrics_address).split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /metrics HTTP/1.1\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 405")
        writer.close()
        await writer.wait_closed()


def run_scheduler(**settings: object) -> subprocess.Popen[str]:
    """A scheduler in a process of its own, as a supervisor starts it."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    values = {"listen": "127.0.0.1:0", "ready_fd": write_end, **settings}
    program = (
        "from pagewire.runtime.errors import run_role; from scheduler.config import SchedulerSettings; "
        "from scheduler.server import serve; "
        f"run_role('scheduler', lambda: serve(SchedulerSettings(**{values!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, pass_fds=[write_end], stderr=subprocess.PIPE, text=True
    )
    os.close(write_end)
    process.ready_line = read_end  # type: ignore[attr-defined]
    return process


def ready_line(process: subprocess.Popen[str]) -> str:
    with os.fdopen(process.ready_line) as pipe:  # type: ignore[attr-defined]
        return pipe.readline()


async def test_the_process_says_where_it_listens_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    process = run_scheduler(listen=f"127.0.0.1:0,unix:{tmp_path}/s.sock", metrics_port=0)
    try:
        ready = json.loads(await asyncio.to_thread(ready_line, process))
        tcp, unix = ready["grpc"].split(",")
        assert unix == f"unix:{tmp_path}/s.sock"
        assert ready["metrics"].startswith("127.0.0.1:")
        for address in (tcp, unix):
            async with grpc.aio.insecure_channel(address) as channel:
                response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert response.status == SERVING
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("setting", ["listen", "metrics_port"])
def test_a_port_in_use_is_one_clear_line_and_exit_code_2(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        value = f"127.0.0.1:{port}" if setting == "listen" else port
        process = run_scheduler(**{setting: value})
        assert ready_line(process) == ""
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("pagewire scheduler:")]
    assert f"127.0.0.1:{port}" in line
    assert "it is in use" in line
    assert "Traceback" not in errors


def test_an_address_that_others_can_reach_needs_insecure() -> None:
    process = run_scheduler(listen="0.0.0.0:0")
    assert ready_line(process) == ""
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "--insecure" in errors
