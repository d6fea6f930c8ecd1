"""The commands of `pagewire`, from the command line's own table."""

from __future__ import annotations

from pagewire.cli import COMMANDS


def table() -> str:
    """A Markdown table with a row per command."""
    rows = ["| command | what it does |", "|---|---|"]
    rows += [f"| `pagewire {name}` | {summary} |" for name, summary in COMMANDS.items()]
    return "\n".join(rows)
