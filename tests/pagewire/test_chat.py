"""`pagewire chat` as a process, piped into and in a terminal, against a gateway whose answers are known."""

from __future__ import annotations

import asyncio
import ctypes
import json
import platform
import signal
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pagewire.commands.output import show
from pagewire.terminal.conversation import Conversation, ConversationError
from pagewire.terminal.line_editor import LineEditor
from pagewire.types import Usage
from tests.pagewire.fake_gateway import FakeGateway, serving
from tests.pagewire.terminals import terminal

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
    assert "/clear   starts over" in text
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


async def test_ctrl_c_that_another_thread_is_given_does_not_wait_for_the_next_line() -> None:
    async with serving(FakeGateway()) as address, asyncio.timeout(LIMIT_S):
        process = await start(address)
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdout.readuntil(b"> ")
        others = {int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()} - {process.pid}
        assert others, "gRPC has threads of its own"
        tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
        assert ctypes.CDLL(None).syscall(tgkill, process.pid, min(others), signal.SIGINT) == 0
        await process.stdout.readuntil(b"> ")
        process.stdin.write(b"hello\n/exit\n")
        assert b"<0><1>" in await process.stdout.read()
        assert await process.wait() == 0


def said(gateway: FakeGateway, number: int = -1) -> list[tuple[str, str]]:
    """The messages of a request, by default of the last one."""
    return [(message.role, message.content) for message in list(gateway.requests.values())[number].chat.messages]


async def test_a_terminal_has_line_editing_a_history_that_stays_and_completion(tmp_path: Path) -> None:
    gateway, state = FakeGateway(), {"XDG_STATE_HOME": str(tmp_path)}
    async with serving(gateway) as address:
        arguments = ("chat", "--address", address, "--max-tokens", "2")
        async with terminal(*arguments, environment=state) as screen:
            await screen.until("> ")
            screen.type("hullo\x1b[D\x1b[D\x1b[D\x7fe\r")  # left three times, backspace, e
            dim = await screen.until("first token after")
            assert "0 prompt tokens (0 cached), 2 generated (length)" in dim
            await screen.until("> ")
            screen.type("first \\\r")
            await screen.until(". ")
            screen.type("second\r")
            await screen.until("first token after")
            await screen.until("> ")
            screen.type("/sta\t\r")
            await screen.until("2 answers, 0 prompt tokens")
            await screen.until("> ")
            screen.type("\x04")
            assert await screen.exit_code() == 0
        assert said(gateway, 0) == [("user", "hello")]
        assert said(gateway) == [("user", "hello"), ("assistant", "<0><1>"), ("user", "first \nsecond")]
        kept = tmp_path / "pagewire" / "chat_history"
        assert kept.read_text().splitlines() == ["hello", "first \\", "second", "/stats "]
        assert kept.stat().st_mode & 0o077 == 0, "nobody else reads what was said"
        async with terminal(*arguments, environment=state) as screen:
            await screen.until("> ")
            screen.type("\x1b[A\x1b[A\x1b[A\x1b[A\r")
            await screen.until("first token after")
            screen.type("/exit\r")
            assert await screen.exit_code() == 0
        assert said(gateway) == [("user", "hello")]


async def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.hold.clear()
    async with serving(gateway) as address, terminal("chat", "--address", address, "--no-history") as screen:
        await screen.until("> ")
        screen.type("hello\r")
        await screen.until("<0>")
        screen.type("\x03")
        await screen.until("(stopped)")
        await asyncio.wait_for(gateway.cancel_seen.wait(), LIMIT_S)
        gateway.hold.set()
        screen.type("and?\r")
        await screen.until("first token after")
        await screen.until("> ")
        screen.type("\x04")
        assert await screen.exit_code() == 0
    assert said(gateway) == [("user", "hello"), ("assistant", "<0>"), ("user", "and?")]


def test_ctrl_c_never_falls_into_the_code_of_the_connection() -> None:
    class Stream:
        """Is interrupted while it waits for what comes next."""

        def __init__(self) -> None:
            self.closed = threading.Event()

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_error: object) -> None:
            self.close()

        def __iter__(self) -> Stream:
            return self

        def __next__(self) -> object:
            signal.raise_signal(signal.SIGINT)
            assert self.closed.wait(LIMIT_S)
            raise StopIteration

        def close(self) -> None:
            self.closed.set()

    stream, before = Stream(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            show(lambda: stream, Console(file=StringIO()))  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    assert stream.closed.is_set()


async def test_an_answer_goes_on_after_a_lost_connection() -> None:
    gateway = FakeGateway(break_after=(1,))
    async with serving(gateway) as address, asyncio.timeout(LIMIT_S):
        process = await start(address)
        output, told = await process.communicate(b"hello\n")
    assert process.returncode == 0
    assert gateway.calls == ["Generate", "Attach"]
    assert b"<0><1>" in output
    assert b"trying to go on where the answer stopped" in told


async def test_every_command_does_what_its_help_says(tmp_path: Path) -> None:
    gateway, file = FakeGateway(), tmp_path / "chat.json"
    lines = [
        "/system Be brief.",
        "/set temperature 0.5",
        "/set seed 7",
        "/set seed off",
        "one",
        "two",
        "/undo",
        "/retry",
        f"/save {file}",
        "/clear",
        "/stats",
        "three",
        f"/load {file}",
        "four",
        "/model fake",
        "/model other",
        "/set colour red",
        "/set top_k many",
        "/load /nowhere",
        "/sing",
    ]
    async with serving(gateway) as address, asyncio.timeout(LIMIT_S):
        process = await start(address)
        output, errors = await process.communicate("\n".join(lines).encode())
    assert (process.returncode, errors) == (0, b"")
    system = ("system", "Be brief.")
    one, answer = ("user", "one"), ("assistant", "<0><1>")
    assert [said(gateway, number) for number in range(5)] == [
        [system, one],
        [system, one, answer, ("user", "two")],
        [system, one],
        [system, ("user", "three")],
        [system, one, answer, ("user", "four")],
    ]
    assert all(request.sampling.temperature == 0.5 for request in gateway.requests.values())
    assert not any(request.sampling.HasField("seed") for request in gateway.requests.values())
    assert json.loads(file.read_text())["settings"] == {"max_tokens": 2, "temperature": 0.5}
    text = output.decode()
    for words in (
        "taken back: two",
        "2 messages saved",
        "3 answers, 0 prompt tokens (0 cached), 6 generated",
        "the chat fills 16 of 128 tokens of the context",
        "2 messages loaded; the last: <0><1>",
        "other is not served here: there is fake",
        "colour is no setting: there are temperature",
        "top_k takes a whole number or off, not 'many'",
        "/nowhere cannot be read: No such file or directory",
        "/sing is no command: /help lists them",
    ):
        assert words in text


def test_a_file_that_holds_no_chat_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    conversation = Conversation({"max_tokens": 1})
    conversation.ask("hello")
    file = tmp_path / "file"
    for content in ("", "{}", "3", '{"messages": [{"role": "user"}]}', '[{"role": "user", "content": 3}]'):
        file.write_text(content)
        with pytest.raises(ConversationError, match=r"no JSON file|has no list"):
            conversation.load(file)
    assert conversation.turns == [{"role": "user", "content": "hello"}]
    file.write_text('[{"role": "user", "content": "from elsewhere"}]')
    conversation.load(file)
    assert conversation.turns == [{"role": "user", "content": "from elsewhere"}]


def test_what_cannot_be_written_is_told_in_one_line_and_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="Is a directory"):
        Conversation({}).save(tmp_path)
    assert list(tmp_path.parent.glob(f".{tmp_path.name}.*")) == []


def test_totals_leave_the_first_tokens_out_of_the_rate() -> None:
    conversation = Conversation({})
    usage = Usage(
        prompt_tokens=10,
        completion_tokens=11,
        cached_tokens=4,
        preemptions=1,
        swapped_bytes=0,
        recomputed_tokens=0,
        queue_ns=0,
        first_token_ns=100_000_000,
        total_ns=1_100_000_000,
    )
    conversation.totals.add(usage)
    assert conversation.totals.line() == (
        "1 answer, 10 prompt tokens (4 cached), 11 generated, first token after 100 ms on average, "
        "10.0 tokens/s, 1 preemptions"
    )


def test_commands_settings_and_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "saved.json").touch()
    (tmp_path / "sub").mkdir()
    editor = LineEditor(None, ["/save", "/set"], {"/set": ["top_k", "top_p"], "/save": None})
    assert editor.completions([], "/s") == ["/save ", "/set "]
    assert editor.completions([], "s") == [], "an ordinary word is no command"
    assert editor.completions(["/set"], "top_k") == ["top_k "]
    assert editor.completions(["/save"], f"{tmp_path}/s") == [f"{tmp_path}/saved.json", f"{tmp_path}/sub/"]
    assert editor.completions(["hello"], "s") == []
