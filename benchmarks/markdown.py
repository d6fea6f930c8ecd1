"""What the generated pages are made of: tables, figures with their range, and where they are from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Content = dict[str, Any]
"""A file of results."""
FACTS = ("gpu", "machine", "cpu", "commit", "command")


def source(name: str, content: Content) -> str:
    """Where the numbers of a section are from."""
    facts = [f"{key} `{content[key]}`" for key in FACTS if content.get(key)]
    return f"Source: [{name}.json](../benchmarks/results/{name}.json): {', '.join(facts)}.\n"


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|".join(["---", *["---:"] * (len(heading) - 1)])
    return "\n".join([f"| {' | '.join(heading)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines), ""])


def with_range(values: Sequence[float], digits: int) -> str:
    """The median, with the least and the most of several."""
    middle, least, most = (f"{one:,.{digits}f}" for one in (statistics.median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least}..{most})"
