"""The list of decision records."""

from __future__ import annotations

from tools.site.repository import ROOT

FOLDER = ROOT / "docs" / "decisions"


def table() -> str:
    """A Markdown list with a link per record, by the titles that they have."""
    lines = []
    for path in sorted(FOLDER.glob("[0-9]*.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ").partition(". ")[2]
        lines.append(f"- {path.name[:4]} [{title}]({path.name})")
    return "\n".join(lines)
