"""`pagewire chat` as a process, typed into, against a gateway whose answers are known."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tests.pagewire.fake_gateway import FakeGateway, serving

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
# Whoever runs the tests in the background has SIGINT ignored, and so would the child.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from pagewire.cli import main; main(sys.argv[1:])"
)


async def start(address: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, "chat", "--address", address, "--max-tokens", "2"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


async def test_a_chat_goes_on_after_a_refusal_without_what_was_refused() -> None:
    gateway = FakeGateway()
    async with serving(gateway) as address, asyncio.timeout(LIMIT_S):
        process = await start(address)
        output, error_output = await process.communicate(b"refuse\nhello\n/help\n/exit\n")
    assert (process.returncode, error_output) == (0, b"")
    text = output.decode()
    assert "INVALID_ARGUMENT: the request is wrong; sampling.temperature: must be at most 100" in text
    assert "<0><1>" in text
    assert text.count("/new starts over") == 2, "the greeting's and /help's"
    (answered,) = gateway.requests.values()
    assert [(message.role, message.content) for message in answered.chat.messages] == [("user", "hello")]


async def test_ctrl_c_at_the_prompt_does_not_end_a_chat() -> None:
    async with serving(FakeGateway()) as address, asyncio.timeout(LIMIT_S):
        process = await start(address)
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdout.readuntil(b"> ")
        process.send_signal(signal.SIGINT)
        await process.stdout.readuntil(b"> ")
        process.stdin.write(b"hello\n")
        assert b"<0><1>" in await process.stdout.readuntil(b" ms\n> ")
        process.stdin.write(b"/exit\n")
        assert await process.wait() == 0
