"""Links from `docs/` to the rest of the repository, and the pages that show what they point to.

docs/scheduling.md  --../scheduler/scheduler.py-->  source/scheduler/scheduler.py.md  (a page: the file, highlighted)
docs/paper.md       --../benchmarks/results----->  source/benchmarks/results.md      (a page: the folder's names)
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?P<target>\.\.?/[^)#\s]*)(?=[)#])")
"""The target of a Markdown link that is relative and begins with a dot."""
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site that lie at the root of the repository."""
LANGUAGES = {
    ".cc": "cpp",
    ".cpp": "cpp",
    ".cu": "cuda",
    ".cuh": "cuda",
    ".go": "go",
    ".h": "cpp",
    ".java": "java",
    ".js": "javascript",
    ".json": "json",
    ".md": "markdown",
    ".mjs": "javascript",
    ".proto": "protobuf",
    ".py": "python",
    ".rs": "rust",
    ".sh": "bash",
    ".toml": "toml",
    ".ts": "typescript",
    ".yml": "yaml",
}
COPIED = {".gif", ".jpg", ".pdf", ".png", ".svg", ".webp"}
"""Files that are shown as they are: no page is made for them."""
LONGEST_BYTES = 200_000
"""Longest file that is shown highlighted; a longer one is shown as plain text."""


def target_outside(page: str, link: str) -> str | None:
    """The path in the repository that `link` on `docs/<page>` points to; None if that is inside `docs/`."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path == "docs" or path.startswith("docs/") else path


def root_pages(config: MkDocsConfig) -> Iterator[File]:
    """The pages at the root of the repository, their links turned to what they would be in `docs/`."""
    for name, page in ROOT_PAGES.items():
        text = re.sub(
            r"(?<=\]\()(?![a-z]+:|#)[^)\s]+(?=\))",
            lambda match: posixpath.relpath(match[0], "docs"),
            (ROOT / name).read_text(),
        )
        yield File.generated(config, page, content=text)


def linked_files(texts: Mapping[str, str], config: MkDocsConfig) -> Iterator[File]:
    """What the site has for every file and folder outside `docs/` that one of the pages (Markdown by path) links to."""
    targets = {
        target
        for page, text in texts.items()
        for match in LINK.finditer(text)
        if (target := target_outside(page, match["target"])) is not None
    }
    for target in sorted(targets):
        if target in ROOT_PAGES or not _exists(target):
            continue
        if Path(target).suffix in COPIED:
            yield File.generated(config, _site_path(target), abs_src_path=str(ROOT / target))
        else:
            yield File.generated(config, _site_path(target), content=source_page(target))


def turn_links(markdown: str, page: str) -> tuple[str, list[str]]:
    """The text with its links to the repository turned to their pages, and the targets that do not exist."""
    missing: list[str] = []

    def turn(match: re.Match[str]) -> str:
        target = target_outside(page, match["target"])
        if target is None:
            return match["target"]
        if not _exists(target):
            missing.append(target)
            return match["target"]
        return posixpath.relpath(_site_path(target), posixpath.dirname(page) or ".")

    return LINK.sub(turn, markdown), missing


def _exists(target: str) -> bool:
    return not target.startswith("../") and (ROOT / target).exists()


def _site_path(target: str) -> str:
    """Where the site has a file or a folder of the repository."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    return f"source/{target}" if Path(target).suffix in COPIED else f"source/{target}.md"


def source_page(target: str) -> str:
    """Markdown that shows a file or a folder of the repository."""
    path = ROOT / target
    show: Callable[[Path], str] = _folder if path.is_dir() else _file
    return f"---\ntitle: {target}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# `{target}`\n\n{show(path)}\n"


def _folder(path: Path) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir())
    return "\n".join(f"- `{name}`" for name in names if not name.startswith((".", "__pycache__")))


def _file(path: Path) -> str:
    text = path.read_text(errors="replace")
    language = LANGUAGES.get(path.suffix, "text") if len(text) <= LONGEST_BYTES else "text"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
