"""Around the answers: request ids, API keys, sizes, sockets that close or do not read, health, start and stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway.config import GatewaySettings
from gateway.openai import app, server
from gateway.openai.api_keys import load_api_keys
from gateway.server import Gateway
from pagewire.runtime.errors import StartError
from pagewire.v1 import inference_pb2
from tests.gateway.conftest import MakeDoor, World, address
from tests.gateway.fake_scheduler import LIMIT_S, FakeScheduler, model_state
from tests.gateway.openai import raw
from tests.gateway.test_generate import ask, letters, rest

LENGTH, CANCELLED = inference_pb2.FINISH_REASON_LENGTH, inference_pb2.FINISH_REASON_CANCELLED
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"prompt": "x", "max_tokens": 4}


def finish(world: World, stream: int) -> None:
    world.scheduler.step([(stream, 9)], admitted={stream: 1}, finished=[(stream, 1, LENGTH)])


# Request ids.


async def test_a_clients_request_id_comes_back_and_may_be_used_twice_at_once(door: World) -> None:
    connections = [await raw.send(address(door), COMPLETIONS, ASK, x_request_id="mine") for _ in range(2)]
    submits = [await door.scheduler.expect("submit") for _ in connections]
    names = [submit.request_id for submit in submits]
    assert all(name.startswith("mine-") for name in names)
    assert names[0] != names[1]
    for submit in submits:
        finish(door, submit.stream)
    replies = [await connection.reply() for connection in connections]
    assert [reply.headers["x-request-id"] for reply in replies] == ["mine", "mine"]
    assert {reply.json["id"] for reply in replies} == {f"cmpl-{name}" for name in names}
    for connection in connections:
        await connection.close()


@pytest.mark.parametrize("given", ["", "x" * 101, "ü"])
async def test_a_request_id_that_is_no_name_is_replaced(door: World, given: str) -> None:
    reply = await raw.ask(address(door), "/v1/models", method="GET", x_request_id=given)
    assert reply.status == 200
    assert len(reply.headers["x-request-id"]) == 32


async def test_the_trace_context_goes_on_to_the_scheduler(door: World) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    connection = await raw.send(address(door), COMPLETIONS, ASK, traceparent=traceparent)
    submit = await door.scheduler.expect("submit")
    assert submit.traceparent == traceparent
    finish(door, submit.stream)
    assert (await connection.reply()).status == 200
    await connection.close()


async def test_a_gateway_that_is_full_refuses_the_batch_and_drops_what_it_had_started(make_door: MakeDoor) -> None:
    door = await make_door(max_live_requests=1)
    reply = await raw.ask(address(door), COMPLETIONS, {**ASK, "prompt": ["x", "y"]})
    assert (reply.status, reply.error["code"], reply.error["reason"]) == (429, "rate_limit_exceeded", "GATEWAY_FULL")
    assert reply.headers["retry-after"] == "1"
    first = await door.scheduler.expect("submit")
    assert (await door.scheduler.expect("detach")).stream == first.stream
    assert door.gateway.link.live_requests == 0


async def test_errors_carry_the_request_id_too(door: World) -> None:
    for path in (COMPLETIONS, "/nowhere"):
        reply = await raw.ask(address(door), path, {}, x_request_id="mine")
        assert (reply.status >= 400, reply.headers["x-request-id"]) == (True, "mine")


async def test_a_live_request_id_in_the_body_is_a_409(door: World) -> None:
    connection = await raw.send(address(door), COMPLETIONS, {**ASK, "request_id": "mine"})
    s = (await door.scheduler.expect("submit")).stream
    second = await raw.send(address(door), COMPLETIONS, {**ASK, "request_id": "mine"})
    door.scheduler.fail(
        (await door.scheduler.expect("submit")).stream, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS"
    )
    assert (await second.reply()).status == 409
    finish(door, s)
    assert (await connection.reply()).json["id"] == "cmpl-mine"
    await asyncio.gather(connection.close(), second.close())


async def test_a_request_started_over_http_is_found_by_name_over_grpc(door: World) -> None:
    connection = await raw.send(address(door), COMPLETIONS, {**ASK, "stream": True, "request_id": "mine"})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.live_ids.add("mine")
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    assert (await connection.status())[0] == 200
    assert (await door.stub.Cancel(inference_pb2.CancelRequest(request_id="mine"))).found
    door.scheduler.step(finished=[(s, 1, CANCELLED)])
    body = b""
    while data := await connection.chunk():
        body += data
    events = raw.Reply(200, {}, body).events
    assert events[-1]["error"]["reason"] == "CANCELLED", "an answer that was cut short does not end with [DONE]"
    await connection.close()


async def test_an_error_in_mid_stream_is_the_last_event(door: World) -> None:
    connection = await raw.send(address(door), COMPLETIONS, {**ASK, "stream": True})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    assert (await connection.status())[0] == 200
    door.scheduler.fail(s, grpc.StatusCode.INTERNAL, "NONFINITE_LOGITS")
    body = b""
    while data := await connection.chunk():
        body += data
    first, last = raw.Reply(200, {}, body).events
    assert (first["choices"][0]["text"], last["error"]["reason"]) == ("a", "NONFINITE_LOGITS")
    await connection.close()


# API keys.


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may call\nsk-first-key team-a\n\nsk-second-key\n")
    return path


async def test_with_api_keys_only_health_is_open_and_the_key_says_the_tenant(
    make_door: MakeDoor, keys_file: Path
) -> None:
    door = await make_door(api_keys_file=keys_file)
    for given in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "sk-first-key"},
        {"authorization": "Basic sk-first-key"},
    ):
        for path in ("/v1/models", "/nowhere", COMPLETIONS):
            reply = await raw.ask(address(door), path, ASK, method="GET" if path == "/v1/models" else "POST", **given)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    assert (await raw.ask(address(door), "/health", method="GET")).status == 200
    tenants = {"sk-first-key": "team-a", "sk-second-key": "key-411459502c9d"}
    for key, tenant in tenants.items():
        body = {**ASK, "tenant": "somebody-else", "cache_salt": "s"}
        connection = await raw.send(address(door), COMPLETIONS, body, authorization=f"Bearer {key}")
        submit = await door.scheduler.expect("submit")
        assert submit.tenant == f"{tenant}/s"
        finish(door, submit.stream)
        assert (await connection.reply()).status == 200
        await connection.close()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "# nobody\n",
        "short\n",
        "sk-first-key two tenants\n",
        "sk-first-key " + "x" * 65,
        "sk-first-key\x00\n",
        "schlüssel-lang\n",
    ],
)
def test_a_file_of_keys_that_is_none_is_a_start_error_without_the_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(StartError, match="--api-keys-file") as caught:
        load_api_keys(tmp_path / "keys")
    assert "sk-first" not in str(caught.value)


def test_a_missing_file_of_keys_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        load_api_keys(tmp_path / "missing")


# Models, health, paths.


async def test_models_are_listed_and_found_by_name(door: World) -> None:
    (listed,) = (await raw.ask(address(door), "/v1/models", method="GET")).json["data"]
    assert (listed["id"], listed["object"], listed["max_model_len"]) == ("tiny", "model", 4096)
    assert (await raw.ask(address(door), "/v1/models/tiny", method="GET")).json == listed
    reply = await raw.ask(address(door), "/v1/models/some/other", method="GET")
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


async def test_health_follows_the_model(door: World) -> None:
    assert (await raw.ask(address(door), "/health", method="GET")).status == 200
    changed = door.gateway._changed
    door.scheduler.set_state(model_state(ready=False))
    await changed.wait()
    assert (await raw.ask(address(door), "/health", method="GET")).status == 503


async def test_unknown_paths_and_methods_are_openai_shaped(door: World) -> None:
    reply = await raw.ask(address(door), "/v1/embeddings", {})
    assert (reply.status, reply.error["code"]) == (404, "no_such_path")
    reply = await raw.ask(address(door), COMPLETIONS, method="GET")
    assert (reply.status, reply.error["code"], reply.headers["allow"]) == (405, "method_not_allowed", "POST")


# Bodies.


async def test_a_body_beyond_the_limit_is_a_413_announced_or_not(
    make_door: MakeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "LINGER_S", 0.05)
    door = await make_door(http_max_body_bytes=2048)
    reply = await raw.ask(address(door), COMPLETIONS, {"prompt": "x" * 2048})
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    connection = await raw.connect(address(door))
    connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n")
    connection.writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
    reply = await connection.reply()
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert await connection.reader.read() == b"", "the connection is closed, not read to the end"
    await connection.close()


async def test_a_client_that_is_still_sending_reads_why_its_body_is_too_large(make_door: MakeDoor) -> None:
    door = await make_door(http_max_body_bytes=2048)
    reply = await raw.ask(address(door), COMPLETIONS, b"x" * (16 << 20))
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


async def test_a_body_or_a_head_that_does_not_come_is_not_waited_for(
    make_door: MakeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(server, "HEADER_TIMEOUT_S", 0.05)
    door = await make_door()
    connection = await raw.connect(address(door))
    connection.writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{")
    reply = await connection.reply()
    assert (reply.status, reply.error["code"]) == (408, "body_timeout")
    await connection.close()
    for head in (b"", b"GET /v1/models HTTP/1.1\r\nhost: te"):
        silent = await raw.connect(address(door))
        silent.writer.write(head)
        async with asyncio.timeout(LIMIT_S):
            assert await silent.reader.read() == b""
        await silent.close()


async def test_more_connections_than_there_is_room_for_are_hung_up_on(
    make_door: MakeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_max_connections", lambda: 1)
    door = await make_door()
    first = await raw.send(address(door), COMPLETIONS, ASK)
    submit = await door.scheduler.expect("submit")
    second = await raw.connect(address(door))
    async with asyncio.timeout(LIMIT_S):
        assert await second.reader.read() == b""
    finish(door, submit.stream)
    assert (await first.reply()).status == 200
    await asyncio.gather(first.close(), second.close())


# Sockets that close, or do not read.


@pytest.mark.parametrize(
    "body", [ASK, {**ASK, "stream": True}, {**ASK, "prompt": ["x", "y"]}], ids=["whole", "stream", "batch"]
)
async def test_closing_the_socket_before_the_first_token_cancels(door: World, body: dict[str, Any]) -> None:
    connection = await raw.send(address(door), COMPLETIONS, body)
    count = len(body["prompt"])
    submits = [await door.scheduler.expect("submit") for _ in range(count)]
    await connection.close()
    detached = [(await door.scheduler.expect("detach")).stream for _ in range(count)]
    assert detached == [submit.stream for submit in submits]


async def test_closing_the_socket_in_mid_stream_cancels(door: World) -> None:
    connection = await raw.send(address(door), CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    assert (await connection.status())[0] == 200
    await connection.chunk()
    await connection.close()
    assert (await door.scheduler.expect("detach")).stream == s
    assert door.gateway.link.live_requests == 0


async def test_a_reader_that_does_not_read_is_cut_and_others_stream_on(make_door: MakeDoor) -> None:
    door = await make_door(stream_buffer_bytes=1 << 16)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = address(door).rpartition(":")
        stalled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(stalled, (host, int(port)))
        body = b'{"prompt": "x", "stream": true, "max_tokens": 4000000, "logprobs": 20}'
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        await asyncio.get_running_loop().sock_sendall(stalled, head + body)
        s = (await door.scheduler.expect("submit")).stream
        door.scheduler.step(admitted={s: 1})
        other = door.stub.Generate(ask("y"))
        t = (await door.scheduler.expect("submit")).stream
        door.scheduler.step(admitted={t: 1})
        (a,) = letters("a")
        # Some 500 bytes of JSON per token: the kernel takes megabytes before anybody waits.
        rows = [inference_pb2.TokenLogprobs(top_ids=range(100, 120), top_logprobs=[-0.25] * 20)] * 100
        stepped = 0
        while door.scheduler.said_nothing_more():  # until what the kernel takes and what the gateway keeps is full
            door.scheduler.step([(s, a)] * 100, logprobs=rows)
            door.scheduler.step([(t, a)])
            stepped += 1
            async with asyncio.timeout(LIMIT_S):
                await other.read()
        assert (await door.scheduler.expect("detach")).stream == s
    door.scheduler.step(finished=[(t, stepped, LENGTH)])
    assert (await rest(other))[-1].finish.reason == LENGTH


# Start and stop.


async def test_open_streams_are_told_that_the_gateway_stops(make_door: MakeDoor) -> None:
    door = await make_door()
    streaming = await raw.send(address(door), COMPLETIONS, {**ASK, "stream": True})
    s = (await door.scheduler.expect("submit")).stream
    door.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    assert (await streaming.status())[0] == 200
    await streaming.chunk()
    waiting = await raw.send(address(door), COMPLETIONS, ASK)
    await door.scheduler.expect("submit")
    idle = await raw.connect(address(door))
    await door.gateway.stop()
    body = b""
    while data := await streaming.chunk():
        body += data
    (last,) = raw.Reply(200, {}, body).events
    assert last["error"]["reason"] == "DRAINING"
    reply = await waiting.reply()
    assert (reply.status, reply.error["reason"]) == (503, "DRAINING")
    assert await idle.reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await raw.connect(address(door))
    await asyncio.gather(streaming.close(), waiting.close(), idle.close())


@pytest.mark.parametrize("value", ["", "off", "None", "null"])
async def test_http_can_be_off(make_door: MakeDoor, value: str) -> None:
    assert (await make_door(http_listen=value)).gateway.http_address is None


@pytest.mark.parametrize(
    ("listen", "line"),
    [("0.0.0.0:0", "without TLS"), ("nonsense", "HOST:PORT"), ("[::1]:99999", "HOST:PORT"), ("localhost:0", "")],
)
async def test_addresses_are_checked_as_those_of_grpc(make_door: MakeDoor, listen: str, line: str) -> None:
    if not line:
        assert (await make_door(http_listen=listen)).gateway.http_address is not None
        return
    with pytest.raises(StartError, match=line):
        await make_door(http_listen=listen)


async def test_a_port_in_use_is_a_start_error(door: World) -> None:
    scheduler = FakeScheduler()
    await scheduler.start()
    gateway = Gateway(
        GatewaySettings(scheduler=scheduler.address, listen="127.0.0.1:0", http_listen=address(door)), None
    )
    with pytest.raises(StartError, match="for HTTP: it is in use"):
        await gateway.start()
    await gateway.stop()
    await scheduler.stop()


async def test_an_address_that_others_can_reach_needs_insecure(make_door: MakeDoor) -> None:
    door = await make_door(http_listen="0.0.0.0:0", insecure=True)
    port = address(door).rpartition(":")[2]
    assert (await raw.ask(f"127.0.0.1:{port}", "/health", method="GET")).status == 200


async def test_a_defect_is_a_500_without_its_text(
    door: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: Any, **_named: Any) -> Callable[..., Any]:
        raise ValueError("".join(["can", "ary"]))  # the source line itself may be logged

    monkeypatch.setattr(door.gateway.path, "generate", broken)
    for stream in (False, True):
        reply = await raw.ask(address(door), COMPLETIONS, {**ASK, "stream": stream})
        assert (reply.status, reply.error["reason"]) == (500, "INTERNAL")
        assert b"canary" not in reply.body
    output = capsys.readouterr()
    assert "request failed unforeseen" in output.out + output.err
    assert "canary" not in output.out + output.err
