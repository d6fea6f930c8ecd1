"""Every example of the documentation runs as it is printed, against the service that the documentation starts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service import service

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```(?P<language>[a-z]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
PORTS = {"127.0.0.1:50051": "grpc", "127.0.0.1:8000": "http"}
"""The addresses in the text, by their name in the ready file."""


def blocks(page: str, language: str) -> Iterator[str]:
    for match in BLOCK.finditer((ROOT / page).read_text()):
        if match["language"] == language:
            yield match["code"]


PYTHON = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
    if any(address in code for address in PORTS)
]
CURL = sorted({
    line
    for page in PAGES
    for code in blocks(page, "")
    for line in code.splitlines()
    if line.startswith("curl http://127.0.0.1:8000/v1/completions")
})  # fmt: skip


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[service.Service]:
    started = service.start(tmp_path_factory.mktemp("up"))
    yield started
    assert service.stop(started) == 0


def at(text: str, up: service.Service) -> str:
    """The text with its addresses replaced by those of the service."""
    for address, name in PORTS.items():
        text = text.replace(address, up.ready[name])
    return text


@pytest.mark.parametrize("code", PYTHON)
def test_an_example_in_python_runs(code: str, up: service.Service) -> None:
    done = subprocess.run([sys.executable, "-c", at(code, up)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for comment in re.findall(r"print\(.*\)  # (.+)$", code, re.MULTILINE):
        assert comment in done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURL)
def test_an_example_with_curl_answers(line: str, up: service.Service) -> None:
    done = subprocess.run(
        [*shlex.split(at(line, up)), "--silent", "--fail-with-body"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    # What the model says is drawn anew each time, and may be nothing.
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
