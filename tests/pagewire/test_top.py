"""`pagewire top`: its figures and its picture by themselves, and the program in a terminal before a real scheduler."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from pagewire.terminal import figures
from pagewire.terminal.figures import Answers, Frame, frame
from pagewire.terminal.screen import Screen, View
from pagewire.v1 import control_pb2, worker_pb2
from tests.pagewire.terminals import ROOT, terminal
from tests.scheduler.peers import pool

SECOND = 1_000_000_000
PATIENT = {"heartbeat_timeout_s": 600.0, "step_timeout_s": 600.0, "stall_s": 600.0}
"""Nobody beats for the worker, however slow the machine is."""


def answers(at_s: float = 10.0, *, epoch: int = 7, steps: int = 100, output: int = 40, requests: int = 1) -> Answers:
    """One worker that makes 20 steps of 30 ms a second, and requests of which the first gets 20 tokens a second."""
    loads = control_pb2.GetLoadsResponse(now_ns=int(at_s * SECOND), live_requests=requests)
    loads.loads.add(
        worker_id="w1",
        running=1,
        total_blocks=100,
        free_blocks=60,
        cached_blocks=10,
        epoch=epoch,
        steps=steps,
        busy_ns=steps * 30_000_000,
        idle_ns=steps * 10_000_000,
        generation_tokens=output,
    )
    for number in range(requests):
        loads.requests.add(
            request_id=f"r{number}",
            worker_id="w1",
            state=control_pb2.REQUEST_STATE_RUNNING if number == 0 else control_pb2.REQUEST_STATE_WAITING,
            output_tokens=output if number == 0 else 0,
            max_tokens=64,
            age_ns=(requests - number) * SECOND,
        )
    workers = control_pb2.ListWorkersResponse()
    workers.workers.add(hello=worker_pb2.WorkerHello(worker_id="w1", device="cuda:H100"), epoch=epoch)
    server = control_pb2.GetServerInfoResponse(version="1", uptime_ns=int(at_s * SECOND))
    server.model.name = "model"
    return Answers(server, loads, workers)


def drawn(
    seen: Frame, view: View | None = None, *, height: int | None = 30, width: int = 120, encoding: str = "utf-8"
) -> str:
    """The picture as text."""

    class File(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    console = Console(file=File(), width=width, height=height, color_system=None, legacy_windows=False)
    console.print(Screen(seen, view or View("here:1"), height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rates_are_differences_over_the_schedulers_clock() -> None:
    seen = frame(answers(12.0, steps=140, output=80), answers(10.0))
    (worker,), (request,) = seen.workers, seen.requests
    assert (worker.steps_per_s, worker.step_ms, worker.generation_tokens_per_s) == (20.0, 30.0, 20.0)
    assert worker.idle_ratio == 0.2
    assert request.tokens_per_s == 20.0
    assert worker.kv_blocks == figures.Blocks(total=100, used=40, cached=10, free=50)


def test_a_first_look_has_no_rates() -> None:
    seen = frame(answers(), None)
    assert (seen.workers[0].step_ms, seen.workers[0].idle_ratio, seen.requests[0].tokens_per_s) == (None, None, None)


def test_a_worker_that_came_back_is_not_compared_with_its_past() -> None:
    seen = frame(answers(12.0, epoch=8, steps=3), answers(10.0, epoch=7, steps=100))
    assert seen.workers[0].steps_per_s is None


def test_a_scheduler_that_came_back_is_not_compared_with_its_past() -> None:
    seen = frame(answers(1.0), answers(10.0))
    assert (seen.workers[0].steps_per_s, seen.requests[0].tokens_per_s) == (None, None)


def test_a_picture_fits_its_height_and_counts_what_it_leaves_out() -> None:
    seen = frame(answers(requests=400), None)
    many = replace(seen, workers=seen.workers * 1000)
    for height in (16, 24, 60):
        text = drawn(many, height=height)
        assert text.count("\n") == height
        assert text.splitlines()[-1].startswith("q quit")
        assert f"and {1000 - text.count('cuda:H100')} more workers" in text
        assert f"and {400 - text.count('/64 ')} more requests" in text


def test_a_narrow_terminal_loses_columns_and_not_letters() -> None:
    text = drawn(frame(answers(12.0, steps=140, output=80), answers(10.0)), width=80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("request", "state", "tok/s", "GPU idle", "20.0%", "30.0 ms", "80/64"):
        assert word in text


def test_requests_are_sorted_by_what_was_chosen() -> None:
    seen = frame(answers(requests=3), None)
    first, second, third = seen.requests
    mixed = replace(seen, requests=(third, first, replace(second, blocks=9)))

    def order(sort: str) -> list[str]:
        lines = drawn(mixed, View("here:1", sort=sort)).splitlines()
        return [line.split()[0] for line in lines if line[:2] in ("r0", "r1", "r2")]

    assert order("state") == ["r0", "r1", "r2"]
    assert order("age") == ["r0", "r1", "r2"]
    assert order("blocks") == ["r1", "r0", "r2"]


def test_a_terminal_without_unicode_gets_ascii() -> None:
    drawn(frame(answers(requests=2), None), encoding="ascii").encode("ascii")


def test_a_clients_name_cannot_rewrite_the_terminal_or_be_taken_for_markup() -> None:
    seen = frame(answers(), None)
    (request,) = seen.requests
    text = drawn(replace(seen, requests=(replace(request, request_id="[red]\x1b[2J", tenant="\x07"),)))
    assert "[red]?[2J" in text
    assert "\x1b" not in text
    assert "\x07" not in text


async def test_one_json_object_for_scripts_and_one_picture_for_reports() -> None:
    async with pool(**PATIENT) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(0, [11, 12, 13], max_tokens=100, tenant="team")
        await worker.step()
        address = made.serving.addresses[0]
        outputs = {}
        for flag in ("--json", "--once"):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pagewire.cli", "top", "--address", address, "--interval", "0.1", flag),
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
            outputs[flag] = (await process.communicate())[0].decode()
            assert process.returncode == 0
        seen = json.loads(outputs["--json"])
        assert (seen["address"], seen["live_requests"], seen["server"]["model"]) == (address, 1, "fake")
        (request,), (load,) = seen["requests"], seen["workers"]
        assert (request["request_id"], request["state"], request["tenant"]) == ("r0", "running", "team")
        assert (load["worker_id"], load["kv_blocks"]["total"], load["kv_blocks"]["used"]) == ("w1", 256, 2)
        assert "r0" in outputs["--once"]
        assert "2 used  0 cached  254 free of 256" in outputs["--once"]
        worker.run()
        await gateway.finish(0)


async def test_the_live_view_sorts_pauses_follows_the_size_and_leaves_the_terminal_as_it_was() -> None:
    async with pool(**PATIENT) as made:
        worker, gateway = await made.worker(), await made.gateway()
        address = made.serving.addresses[0]
        async with terminal("top", "--address", address, "--interval", "0.1") as screen:
            await screen.until("no live requests")
            assert not screen.in_line_mode()
            await gateway.submit(0, [11, 12, 13], max_tokens=100, request_id="a-request")
            await worker.step()
            await screen.until("a-request")
            screen.type("s")
            await screen.until("by tokens/s")
            screen.type("p")
            await screen.until("paused")
            worker.run()
            await gateway.finish(0)
            screen.resize(60, 20)
            screen.type("s")
            await screen.until("by age")
            await screen.until("a-request")  # the picture is kept while it is paused
            screen.type("p")
            await screen.until("no live requests")
            screen.type("q")
            assert await screen.exit_code() == 0
            assert screen.in_line_mode()
            assert screen.raw.endswith(b"\x1b[?25h\x1b[?1049l"), "the screen before it and the cursor are back"


async def test_the_live_view_says_that_the_service_has_gone_and_finds_it_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scheduler.sock"
    async with terminal("top", "--address", address, "--interval", "0.1") as screen:
        await screen.until("no server at")
        async with pool(listen=address):
            await screen.until("no worker has joined")
        await screen.until("(these figures are")
        async with pool(listen=address, **PATIENT) as made:
            await made.worker()
            await screen.until("no live requests")
            screen.type("\x03")
            assert await screen.exit_code() == 0


async def test_without_a_terminal_or_a_service_it_ends_with_one_line(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nothing.sock"

    async def run(*arguments: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pagewire.cli", "top", "--address", address, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        errors = (await process.communicate())[1].decode()
        assert errors.count("\n") == 1
        return process.returncode, errors

    piped, gone, odd = await asyncio.gather(run(), run("--json"), run("--sort", "luck"))
    assert piped[0] == odd[0] == 2
    assert "add --once" in piped[1]
    assert gone[0] == 1
    assert f"no server at {address}; start one with `pagewire up`" in gone[1]
    assert "--sort luck is unknown: use one of state, tokens/s" in odd[1]
