"""The matrix of scenarios and languages in `clients/README.md`: read, and written by the test that fills it."""

from __future__ import annotations

from tests.clients.languages import CLIENTS

PAGE = CLIENTS / "README.md"
BEGIN, END = "<!-- matrix: filled by tests/clients -->\n", "<!-- end of matrix -->\n"
Matrix = dict[str, dict[str, str]]
"""Verdict by language and scenario."""


def read() -> Matrix:
    """The matrix as committed."""
    lines = _page()[1].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *body = rows
    return {language: {row[0]: row[place] for row in body} for place, language in enumerate(header) if place}


def write(columns: Matrix) -> None:
    """Replaces the columns of the languages that have run; the others stay as they are."""
    before, table, after = _page()
    merged = {**(read() if table.strip() else {}), **columns}
    names = list(next(iter(columns.values())))
    lines = ["| scenario | " + " | ".join(merged) + " |", "|---" * (len(merged) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(column.get(name, "") for column in merged.values()) + " |" for name in names]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after, encoding="utf-8")


def _page() -> tuple[str, str, str]:
    """The page before, in and after the matrix."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    table, after = rest.split(END)
    return before, table, after
