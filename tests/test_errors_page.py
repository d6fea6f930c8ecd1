"""docs/errors.md lists the reasons that the code can say: all of them, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from gateway.errors import Reason

ROOT = Path(__file__).parents[1]
REASON = re.compile(r"[A-Z]{2,}(?:_[A-Z]+)*")


def documented(section: str) -> list[str]:
    part = (ROOT / "docs" / "errors.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([A-Z_]+)` \|", part, re.MULTILINE)


def nodes() -> Iterator[ast.AST]:
    """All of the scheduler's source, which says its reasons as text."""
    for path in sorted((ROOT / "scheduler").glob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def calls() -> Iterator[ast.Call]:
    """Every call in the scheduler."""
    return (node for node in nodes() if isinstance(node, ast.Call))


def texts(nodes: list[ast.expr]) -> list[str]:
    """Those of the arguments that can be a reason."""
    values = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [value for value in values if REASON.fullmatch(value)]


def is_code(node: ast.expr) -> bool:
    """Whether an argument is a status code: `UNAVAILABLE`, `codec.UNAVAILABLE`, `StatusCode.UNAVAILABLE`."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return REASON.fullmatch(name) is not None


def of_requests() -> set[str]:
    """Reasons that end a request: they stand behind a status code in what is raised or emitted, or in a table of it."""
    found = {str(reason) for reason in Reason}
    for node in nodes():
        parts = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        for before, after in pairwise(parts):
            found.update(texts([after]) if is_code(before) else [])
    return found


def of_links() -> set[str]:
    """Reasons of a Refusal, which ends a stream between roles or an operator's call."""
    found: set[str] = set()
    for call in calls():
        found.update(texts([keyword.value for keyword in call.keywords if keyword.arg == "reason"]))
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("_refuse", "_lose"):
            found.update(texts(call.args[:1]))
    return found


def test_the_code_is_read_as_meant() -> None:
    assert {"QUEUE_FULL", "WORKER_LOST", "WORKER_LOST_REPEATEDLY", "INVALID_SUBMIT", "NO_TOKENIZER"} <= of_requests()
    assert {"MODEL_MISMATCH", "PROTOCOL_VERSION", "HEARTBEAT_LOST", "CAPACITY", "PIN_LIMIT"} <= of_links()


@pytest.mark.parametrize("section", ["Reasons", "Reasons between roles"])
def test_no_reason_is_listed_twice(section: str) -> None:
    listed = documented(section)
    assert len(listed) == len(set(listed)) > 0


def test_the_page_lists_every_reason_and_none_that_the_code_does_not_know() -> None:
    listed = {*documented("Reasons"), *documented("Reasons between roles")}
    assert listed == of_requests() | of_links()
    assert of_requests() <= set(documented("Reasons"))
