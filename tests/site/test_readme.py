"""README and the plain files of docs/: what they point to exists, also without the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from pagewire import cli

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:|#)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors that a host of the repository gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_of_a_page_at_the_root_leads_somewhere(name: str) -> None:
    links = list(LINK.finditer((ROOT / name).read_text()))
    missing = [link["path"] for link in links if not (ROOT / link["path"]).exists()]
    assert missing == []
    lost = [
        link[0]
        for link in links
        if link["anchor"] and link["path"].endswith(".md") and link["anchor"] not in anchors(ROOT / link["path"])
    ]
    assert lost == []


COMMAND = re.compile(r"(?:\.venv/bin/)?pagewire (?P<name>\w+)(?P<rest>.*?)(?:\s#.*)?$")


def shown_commands() -> Iterator[tuple[str, str, set[str]]]:
    """Page, command and flags of every `pagewire` line in a block of README.md and docs/."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if match := COMMAND.match(line.strip()):
                    yield page.name, match["name"], set(re.findall(r"(?<!\S)--[a-z-]+", match["rest"]))


def test_every_command_and_flag_that_the_documentation_shows_exists() -> None:
    shown = list(shown_commands())
    assert len(shown) > 10
    for page, name, flags in shown:
        assert name in cli.COMMANDS, f"{page}: pagewire {name}"
        command = get_command(cli._application(name)).commands[name]  # type: ignore[attr-defined]
        parts = getattr(command, "commands", {"": command}).values()
        known = {flag for part in parts for parameter in part.params for flag in parameter.opts}
        known |= {flag for part in parts for parameter in part.params for flag in parameter.secondary_opts}
        assert flags <= known, f"{page}: pagewire {name} {flags - known}"
