"""Applies the model's own chat template, in a process of its own that can be limited and killed.

A template is a program that comes with the model and runs on data that comes from clients: a sandbox keeps it from
reaching objects, and only another process keeps `"x" * 10**9` or an endless loop from taking the gateway with it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.errors import Reason, Violation, invalid
from pagewire.runtime.errors import StartError
from pagewire.runtime.logs import get_logger

START_TIMEOUT_S = 30.0
# One line of the renderer's answer: its text limit, every character escaped as JSON.
MAX_LINE_BYTES = 32 << 20

log = get_logger(__name__)


class ChatTemplate:
    """The model's chat template. One conversation is rendered at a time; rendering takes well under a millisecond."""

    def __init__(self, template: str, variables: Mapping[str, str], timeout_s: float) -> None:
        """
        Args:
            template: jinja source, from the model's tokenizer; never from a client.
            variables: bos_token, eos_token and the like.
            timeout_s: seconds for one conversation.
        """
        self._start = {"template": template, "variables": dict(variables)}
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Starts the renderer, so that the first client does not wait for it. Raises StartError for a bad template."""
        async with self._turn:
            await self._ensure_running()

    async def render(self, messages: Sequence[tuple[str, str]], field: str = "prompt.chat") -> str:
        """The conversation as the text that the model was trained on, with a generation prompt.

        Args:
            messages: (role, content), oldest first.
            field: path for the violation.

        Raises:
            RequestError: the template refuses the conversation, breaks on it, or takes too long.
        """
        payload = {"messages": [{"role": role, "content": content} for role, content in messages]}
        async with self._turn:
            try:
                await self._ensure_running()
                async with asyncio.timeout(self._timeout_s):
                    reply = await self._ask(payload)
            except (TimeoutError, OSError, EOFError, ValueError, StartError):
                await self._kill()
                log.warning("chat template killed", messages=len(messages))
                reply = {"failed": True}
            except asyncio.CancelledError:
                await asyncio.shield(self._kill())  # its answer would be taken for the next one's
                raise
        if "text" in reply:
            return str(reply["text"])
        if "error" in reply:
            said = "".join(char for char in str(reply["error"]) if char.isprintable())
            description = f"the model's chat template refuses this conversation: {said}"
        else:
            description = "the model's chat template cannot render this conversation"
        raise invalid([Violation(field, description)], Reason.CHAT_TEMPLATE_FAILED)

    async def close(self) -> None:
        """Ends the renderer."""
        await self._kill()

    async def _ensure_running(self) -> None:
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway.chat_renderer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            cwd=Path(__file__).resolve().parent.parent,
            start_new_session=True,  # Ctrl-C in a terminal is for the gateway, which ends the renderer itself
        )
        async with asyncio.timeout(START_TIMEOUT_S):
            reply = await self._ask(self._start)
        if not reply.get("ready"):
            await self._kill()
            raise StartError("the model's chat template is not valid jinja: mend chat_template in its tokenizer files")

    async def _ask(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(payload).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.kill()
        await process.wait()
