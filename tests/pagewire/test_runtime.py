"""The process toolkit, by its effects: options that act, addresses that are refused, exits, readiness, statuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest

from pagewire.runtime import channel, ready, rich_status
from pagewire.runtime.errors import StartError
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests.pagewire.fake_gateway import FakeGateway, serving

ROOT = Path(__file__).resolve().parents[2]


# Channels


async def test_port_0_gives_the_port_that_was_picked() -> None:
    server = grpc.aio.server(options=channel.server_options(internal=True))
    host, port = channel.split_address(await channel.bind(server, "127.0.0.1:0"))
    assert host == "127.0.0.1"
    assert port > 0
    await server.stop(None)


async def test_a_second_server_on_a_port_is_refused_instead_of_sharing_it() -> None:
    first = grpc.aio.server(options=channel.server_options(internal=False))
    address = await channel.bind(first, "127.0.0.1:0")
    await first.start()
    second = grpc.aio.server(options=channel.server_options(internal=False))
    with pytest.raises(StartError, match="it is in use"):
        await channel.bind(second, address)
    await first.stop(None)


async def test_a_unix_socket_of_a_live_server_is_not_taken_over_and_a_dead_ones_is(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scheduler.sock"
    first = grpc.aio.server(options=channel.server_options(internal=True))
    assert await channel.bind(first, address) == address
    await first.start()
    second = grpc.aio.server(options=channel.server_options(internal=True))
    with pytest.raises(StartError, match="it is in use"):
        await channel.bind(second, address)
    await first.stop(None)

    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    third = grpc.aio.server(options=channel.server_options(internal=True))
    assert await channel.bind(third, f"unix:{left}") == f"unix:{left}"
    await third.stop(None)


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("50051", "is not an address"),
        ("127.0.0.1:", "is not an address"),
        ("127.0.0.1:70000", "is not an address"),
        ("0.0.0.0:0", "can be reached from other machines without TLS"),
        ("somewhere.example:0", "can be reached from other machines without TLS"),
        ("unix:/nowhere/at/all.sock", "does not exist or is not writable"),
        ("unix:/tmp/" + "x" * 120, "longer than 107 bytes"),
    ],
)
async def test_an_address_that_cannot_be_is_refused_with_the_reason(address: str, line: str) -> None:
    server = grpc.aio.server(options=channel.server_options(internal=False))
    with pytest.raises(StartError, match=line):
        await channel.bind(server, address)


async def test_insecure_allows_an_address_that_others_can_reach() -> None:
    server = grpc.aio.server(options=channel.server_options(internal=False))
    address = await channel.bind(server, "0.0.0.0:0", insecure=True)
    assert address.startswith("0.0.0.0:")
    await server.stop(None)


async def test_clients_may_send_8_mib_and_no_more() -> None:
    async with serving(FakeGateway()) as address:
        # The client's own limit is lifted, so that it is the server that refuses.
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as client:
            stub = inference_pb2_grpc.InferenceServiceStub(client)
            await stub.Tokenize(inference_pb2.TokenizeRequest(model="x" * (8 * channel.MIB - 100), text="a"))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Tokenize(inference_pb2.TokenizeRequest(model="x" * (8 * channel.MIB), text="a"))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_links_between_roles_carry_more_than_8_mib() -> None:
    server = grpc.aio.server(options=channel.server_options(internal=True))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeGateway(), server)
    address = await channel.bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address, options=channel.client_options(internal=True)) as client:
        stub = inference_pb2_grpc.InferenceServiceStub(client)
        answer = await stub.Tokenize(inference_pb2.TokenizeRequest(model="x" * (16 * channel.MIB), text="a"))
    assert list(answer.token_ids) == [97]
    await server.stop(None)


async def test_20_kb_of_metadata_are_refused() -> None:
    async with serving(FakeGateway()) as address, grpc.aio.insecure_channel(address) as client:
        stub = inference_pb2_grpc.InferenceServiceStub(client)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=(("padding", "x" * 20_000),))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.slow
async def test_a_frozen_peer_is_noticed_by_the_link_within_seconds() -> None:
    """Without the ping timeout among the options this takes a minute."""
    code = (
        "import asyncio\n"
        "from tests.pagewire.fake_gateway import FakeGateway, serving\n"
        "async def main():\n"
        "    gateway = FakeGateway()\n"
        "    gateway.hold.clear()\n"
        "    async with serving(gateway) as address:\n"
        "        print(address, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with grpc.aio.insecure_channel(address, options=channel.client_options(internal=True)) as client:
            stop = inference_pb2.StopParams(max_tokens=3)
            request = inference_pb2.GenerateRequest(request_id="a", text="hello", stop=stop)
            call = inference_pb2_grpc.InferenceServiceStub(client).Generate(request)
            await call.read()
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async with asyncio.timeout(30):
                    await call.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        process.kill()
        process.communicate()


# Starting and stopping

ROLE = """
import asyncio, os, signal, sys, threading, time
from pathlib import Path
from pagewire.runtime.errors import StartError, run_role

async def waits():
    try:
        print("running", flush=True)
        await asyncio.Event().wait()
    finally:
        print("cleaned up", flush=True)

def blocks():
    try:
        print("running", flush=True)
        while True:
            time.sleep(60)
    finally:
        print("cleaned up", flush=True)

def waits_for_a_lock():
    # The signal is noted in another thread, so that nothing interrupts the wait.
    def note():
        while Path(f"/proc/self/task/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    threading.Thread(target=note, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    try:
        lock.acquire()
    finally:
        print("cleaned up", flush=True)

def imports():
    try:
        print("running", flush=True)
        while True:
            time.sleep(60)
    except SystemExit:
        raise ImportError("cannot load module more than once") from None

def refuses():
    raise StartError("no such\\n  model")

async def refuses_later():
    raise StartError("no such\\n  model")

run_role("worker", {target})
"""


def role(target: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ROLE.replace("{target}", target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("target", ["waits", "waits()", "blocks"])
def test_a_signal_ends_a_role_with_code_0_after_it_has_cleaned_up(target: str, number: signal.Signals) -> None:
    process = role(target)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "cleaned up\n", "")


def test_a_signal_that_does_not_interrupt_a_wait_is_heard_all_the_same() -> None:
    process = role("waits_for_a_lock")
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (0, "cleaned up\n", "")


def test_a_signal_that_falls_into_an_import_ends_a_role_with_code_0_and_no_traceback() -> None:
    process = role("imports")
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    _output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("target", ["refuses", "refuses_later", "refuses_later()"])
def test_a_role_that_cannot_start_says_so_in_one_line_and_exits_with_2(target: str) -> None:
    process = role(target)
    _output, errors = process.communicate()
    assert (process.returncode, errors) == (2, "pagewire worker: no such model\n")


# Readiness


def test_readiness_is_one_json_line_and_closes_the_descriptor() -> None:
    reading, writing = os.pipe()
    ready.announce(writing, grpc="127.0.0.1:1", http=None)
    with os.fdopen(reading) as pipe:
        assert json.loads(pipe.read()) == {"grpc": "127.0.0.1:1", "http": None}


def test_without_a_supervisor_nothing_is_announced_and_a_refusal_is_left_to_the_caller() -> None:
    ready.announce(None, grpc="127.0.0.1:1")
    assert ready.refuse(None, "no such model") is False


# Statuses


def test_a_status_is_read_back_as_it_was_written() -> None:
    status = rich_status.status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        reason="QUEUE_FULL",
        violations=[("sampling.n", "must be at most 64"), ("priority", "is too low")],
        retry_after_ns=1_500_000_000,
        metadata={"limit": "1024"},
    )

    class Failed:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.RESOURCE_EXHAUSTED

        def details(self) -> str:
            return "the queue is full"

        def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
            return (("grpc-status-details-bin", status.SerializeToString()),)

    assert rich_status.decode(Failed()) == rich_status.StatusDetails(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        message="the queue is full",
        reason="QUEUE_FULL",
        domain="pagewire",
        violations=(("sampling.n", "must be at most 64"), ("priority", "is too low")),
        retry_after_ns=1_500_000_000,
        metadata={"limit": "1024"},
    )


@pytest.mark.parametrize("trailing", [(), (("grpc-status-details-bin", b"\xff\xff"),), None])
def test_details_that_are_missing_or_malformed_are_left_out(trailing: object) -> None:
    class Failed:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "Socket closed"

        def trailing_metadata(self) -> object:
            return trailing

    expected = rich_status.StatusDetails(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    assert rich_status.decode(Failed()) == expected
