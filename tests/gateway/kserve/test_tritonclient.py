"""Triton's own Python client, as published, against the door: whole answers, decoupled streams, errors, cancelling."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pagewire.v1 import inference_pb2
from tests.gateway.conftest import World
from tests.gateway.fake_scheduler import LIMIT_S
from tests.gateway.test_generate import letters

LENGTH = inference_pb2.FINISH_REASON_LENGTH
SCRIPT = Path(__file__).with_name("triton_client.py")
PACKAGES = ("tritonclient==2.73.0", "python-rapidjson==1.25", "ml_dtypes==0.6.0", "protobuf==6.33.6")
"""What the client needs beside grpcio, numpy and packaging, which are ours. Its protobuf is older than ours."""


@pytest.fixture(scope="session")
def triton_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client. Skips where pip cannot fetch it."""
    folder = tmp_path_factory.mktemp("tritonclient")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--retries", "1", "--timeout", "15", "--target", str(folder), *PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("pip did not fetch tritonclient in two minutes")
    if done.returncode:
        pytest.skip(f"pip cannot fetch tritonclient: {done.stderr.strip().splitlines()[-1:]}")
    return folder


class Client:
    """The client's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def do(self, kind: str, **job: Any) -> None:
        """Gives it something to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": kind, **job}).encode() + b"\n")

    async def sees(self) -> dict[str, Any]:
        """The next thing that it has seen."""
        assert self._process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            line = await self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            pytest.fail((await self._process.stderr.read()).decode()[-2000:])
        seen = json.loads(line)
        assert isinstance(seen, dict)
        return seen


@pytest.fixture
async def client(world: World, triton_packages: Path) -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        world.gateway.address,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(triton_packages)},
    )
    running = Client(process)
    assert await running.sees() == {"kind": "model", "name": "tiny", "ready": True}
    yield running
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(LIMIT_S):
        _, complaints = await process.communicate()
    assert not complaints, complaints.decode()[-2000:]
    assert process.returncode == 0


def response(request_id: str, text: str | None, *, final: bool = False, finish: str = "") -> dict[str, Any]:
    """A response as the client shows it; without text it has no outputs."""
    ids, reason = (None, None) if text is None else (letters(text), finish)
    return {"kind": "response", "id": request_id, "final": final, "text": text, "ids": ids, "finish": reason}


async def test_tritonclient_reads_tokens_one_by_one_as_decoupled_responses(world: World, client: Client) -> None:
    client.do("start")
    client.do("ask", id="one", text="x", max_tokens=3, empty_final=True)
    s = (await world.scheduler.expect("submit")).stream
    # Each is read before the next one is made, so nothing is held back until the end.
    world.scheduler.step([(s, letters("a")[0])], admitted={s: 1})
    assert await client.sees() == response("one", "a")
    client.do("ask", id="two", text="y", temperature=0.5)
    second = await world.scheduler.expect("submit")
    t = second.stream
    assert second.sampling.temperature == 0.5
    world.scheduler.step([(t, letters("z")[0])], admitted={t: 1})
    assert await client.sees() == response("two", "z")
    world.scheduler.step([(s, letters("b")[0])], finished=[(s, 2, LENGTH)])
    assert await client.sees() == response("one", "b", finish="length")
    assert await client.sees() == response("one", None, final=True)
    # Who has not asked for an empty response is told with the last one that has tokens.
    world.scheduler.step([(t, letters("y")[0])], finished=[(t, 2, LENGTH)])
    assert await client.sees() == response("two", "y", final=True, finish="length")
    client.do("stop")
    assert await client.sees() == {"kind": "stopped"}


async def test_tritonclient_cancels_what_runs_on_its_stream(world: World, client: Client) -> None:
    client.do("start")
    streams = set()
    for name in ("one", "two"):
        client.do("ask", id=name, text="x", max_tokens=1000)
        streams.add((await world.scheduler.expect("submit")).stream)
    first = min(streams)
    world.scheduler.step([(first, letters("a")[0])], admitted={first: 1})
    assert (await client.sees())["text"] == "a"
    client.do("cancel")
    assert {(await world.scheduler.expect("detach")).stream for _ in streams} == streams
    assert (await client.sees())["kind"] == "error"
    assert await client.sees() == {"kind": "stopped"}
    # The client is as good as new.
    client.do("start")
    client.do("ask", id="three", text="x", max_tokens=1)
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, letters("b")[0])], admitted={s: 1}, finished=[(s, 1, LENGTH)])
    assert await client.sees() == response("three", "b", final=True, finish="length")
    client.do("stop")
    assert await client.sees() == {"kind": "stopped"}


async def test_tritonclient_is_told_errors_in_band_or_as_a_status(world: World, client: Client) -> None:
    client.do("start")
    client.do("ask", id="bad", text="x", temperature=-1.0)
    error = await client.sees()
    assert (error["kind"], error["status"]) == ("error", None)
    assert error["message"].startswith("INVALID_FIELD: temperature: ")
    client.do("ask", id="good", text="x", max_tokens=1)
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, letters("a")[0])], admitted={s: 1}, finished=[(s, 1, LENGTH)])
    assert await client.sees() == response("good", "a", final=True, finish="length")
    client.do("stop")
    assert await client.sees() == {"kind": "stopped"}
    client.do("start", triton_grpc_error="true")
    client.do("ask", id="bad", text="x", temperature=-1.0)
    error = await client.sees()
    assert (error["kind"], error["status"]) == ("error", "StatusCode.INVALID_ARGUMENT")
    assert error["message"].startswith("temperature: ")
    client.do("cancel")
    assert await client.sees() == {"kind": "stopped"}


async def test_tritonclient_gets_a_whole_answer(world: World, client: Client) -> None:
    client.do("infer", id="whole", text="x", max_tokens=2)
    s = (await world.scheduler.expect("submit")).stream
    for token in letters("ab"):
        world.scheduler.step([(s, token)], admitted={s: 1})
    world.scheduler.step(finished=[(s, 2, LENGTH)])
    assert await client.sees() == response("whole", "ab", finish="length")
