"""Pages that nobody has placed in the navigation yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def unplaced(nav: list[Any], docs: Path) -> list[str]:
    """Names of the pages directly in `docs` that `nav`, as mkdocs.yml has it, does not mention; sorted."""
    return sorted({page.name for page in docs.glob("*.md")} - set(_mentioned(nav)))


def _mentioned(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _mentioned(entry)
