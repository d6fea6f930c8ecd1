"""Renders a chat template: the process that `gateway.chat` starts. Nothing but jinja is imported here.

One JSON object per line on stdin and stdout. The first line in is {"template": ..., "variables": {...}}; each further
line is {"messages": [...]}, answered with {"text": ...}, or {"error": ...} when the template itself refuses the
conversation, or {"failed": true} when it breaks. It runs with limited memory and is killed when it takes too long.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
MAX_TEXT_CHARS = 4 << 20
MAX_ERROR_CHARS = 200


class TemplateRefusalError(Exception):
    """The template has called raise_exception."""


class GenerationBlock(Extension):
    """`{% generation %}` marks what training counts as the assistant's; for serving it is its content only."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusalError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    separators, sort_keys = options.get("separators"), bool(options.get("sort_keys", False))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def compile_template(template: str, variables: Mapping[str, Any]) -> Callable[[list[dict[str, str]]], str]:
    """A function from messages to text, with the helpers that published templates use.

    Raises:
        jinja2.TemplateError: the template cannot be parsed.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, str]]) -> str:
        parts: list[str] = []
        size = 0
        for part in compiled.generate(messages=messages, add_generation_prompt=True, **variables):
            parts.append(part)
            size += len(part)
            if size > MAX_TEXT_CHARS:
                raise MemoryError
        return "".join(parts)

    return render


def answer(render: Callable[[list[dict[str, str]]], str], messages: list[dict[str, str]]) -> dict[str, Any]:
    """The answer to one conversation. A defect of the template or its data is an answer too."""
    try:
        return {"text": render(messages)}
    except TemplateRefusalError as refusal:
        return {"error": str(refusal)[:MAX_ERROR_CHARS]}
    except Exception:
        return {"failed": True}


def main() -> None:
    """Reads templates and conversations until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    start = json.loads(sys.stdin.readline())
    try:
        render = compile_template(start["template"], start["variables"])
        reply: dict[str, Any] = {"ready": True}
    except jinja2.TemplateError:
        reply = {"failed": True}
    print(json.dumps(reply), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(render, json.loads(line)["messages"])), flush=True)


if __name__ == "__main__":
    main()
