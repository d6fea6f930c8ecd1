"""A chat as a value: who said what, with which settings, and what it has cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagewire.requests import Options
from pagewire.types import Usage

NS_PER_S = 1e9

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "stop": str,
    "priority": int,
    "tenant": str,
}
"""What can be set in a chat, and how its text is read. Ranges are the server's to check."""


class ConversationError(ValueError):
    """What was asked of a conversation cannot be done. The message is one line."""


@dataclass
class Totals:
    """What all answers so far have cost, those that were taken back included."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    first_token_ns: int = 0
    decode_ns: int = 0
    """From first tokens to last ones."""
    decoded_tokens: int = 0
    """Tokens after first ones."""

    def add(self, usage: Usage) -> None:
        """One answer more."""
        self.answers += 1
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.preemptions += usage.preemptions
        self.first_token_ns += usage.first_token_ns
        if usage.completion_tokens > 1:
            self.decode_ns += usage.total_ns - usage.first_token_ns
            self.decoded_tokens += usage.completion_tokens - 1

    def line(self) -> str:
        """In words."""
        if not self.answers:
            return "no answer yet"
        facts = [
            f"{self.answers} answers" if self.answers > 1 else "1 answer",
            f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached)",
            f"{self.completion_tokens} generated",
            f"first token after {self.first_token_ns / self.answers / 1e6:.0f} ms on average",
        ]
        if self.decode_ns:
            facts.append(f"{self.decoded_tokens / self.decode_ns * NS_PER_S:.1f} tokens/s")
        return ", ".join([*facts, f"{self.preemptions} preemptions"])


@dataclass
class Conversation:
    """What is sent to the model with the next question."""

    options: Options
    system: str = ""
    """Opens the chat; empty: nothing does."""
    turns: list[dict[str, str]] = field(default_factory=list)
    """Questions and answers in turn, oldest first."""
    totals: Totals = field(default_factory=Totals)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole chat."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *self.turns]

    def ask(self, text: str) -> None:
        """The next question."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """What was said to it. An empty answer takes the question back: templates want them in turn."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def undo(self) -> str:
        """Takes the last question and its answer back; returns the question."""
        for position in range(len(self.turns) - 1, -1, -1):
            if self.turns[position]["role"] == "user":
                question = self.turns[position]["content"]
                del self.turns[position:]
                return question
        raise ConversationError("nothing has been asked yet")

    def set(self, name: str, value: str) -> None:
        """Gives a setting a value; "off" makes it the server's default again."""
        read = SETTINGS.get(name)
        if read is None:
            raise ConversationError(f"{name} is no setting: there are {', '.join(SETTINGS)}")
        changed: dict[str, Any] = dict(self.options)
        if value == "off":
            changed.pop(name, None)
        else:
            try:
                changed[name] = read(value)
            except ValueError:
                kind = "a whole number" if read is int else "a number"
                raise ConversationError(f"{name} takes {kind} or off, not {value!r}") from None
        self.options = changed  # type: ignore[assignment]

    def save(self, path: Path) -> None:
        """Writes the chat and its settings as JSON. Raises ConversationError."""
        settings = {name: value for name, value in self.options.items() if name in SETTINGS}
        content = {"messages": self.messages, "settings": settings}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ConversationError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Takes the chat from a file of `save`, or from any JSON list of messages. Raises ConversationError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConversationError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ConversationError(f"{path} is no JSON file") from None
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ConversationError(f'{path} has no list of {{"role": ..., "content": ...}}')
        settings = content.get("settings", {}) if isinstance(content, dict) else {}
        if not isinstance(settings, dict):
            settings = {}
        # Types and ranges are checked when they are sent.
        known = {name: value for name, value in settings.items() if name in SETTINGS}
        opening = messages[:1] if messages and messages[0]["role"] == "system" else []
        self.options = {**self.options, **known}
        self.system = opening[0]["content"] if opening else ""
        self.turns = [dict(message) for message in messages[len(opening) :]]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and all(isinstance(part, str) for part in value.values())
    )
