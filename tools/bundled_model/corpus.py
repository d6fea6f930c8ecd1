"""The bundled model's training text: the English prose that every CPython installation carries.

Four kinds of text are read, all of them under the PSF licence and all of them as files, never by importing a module:

* ``pydoc_data/topics.py``: the language reference as ``help()`` prints it,
* the docstrings of the standard library (a module's, a class's with those of its methods, a function's),
* comment blocks of at least three lines, where the standard library and its tests explain themselves,
* ``idlelib/help.html``.

Cleaning keeps prose only: doctests, literal blocks, grammar, tables and ruled headings go; the hard line ends inside a
paragraph become spaces; typographic quotes and dashes become ASCII. A paragraph is kept once, wherever it stands.
"""

import ast
import hashlib
import html
import io
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 50
"""One document in this many, chosen by the hash of its text, is never trained on."""

MIN_COMMENT_LINES = 3
"""Shorter comments are remarks on the code beside them and mean little without it."""

MIN_DOCUMENT = 60
"""Characters; shorter documents are labels, and many of them would teach the model to end at once."""

_ASCII = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{BULLET}": "-",
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{NO-BREAK SPACE}": " ",
    }
)
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`~?!?([^`<]+?)(?:\s*<[^>]*>)?`")
_FIELD = re.compile(r"^:(?:param|type|return|returns|rtype|raises)\b")
_ITEM = re.compile(r"^(?:[-*+]|\(?\d{1,2}[.)])\s+")
_RULE = re.compile(r"^\s*([-=*~^#+_\"'.])\1{2,}\s*$")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
# Signs that a paragraph is a grammar, a session, a directive, a dump, a table or a version stamp.
_NOISE = re.compile(r"(::=|>>>|^\s*\.\. |\\x[0-9a-f]{2}|https?://\S{60}|[|]{2}|[=]{3}|__\w+__ = |\$Id|\bXXX$)")
_CODE_COMMENT = re.compile(
    r"^\s*(?:def|class|import|from \w+ import|if .*:$|for .*:$|return\b.*[()=]|print\()|\w+ = |\w+\(.*\)$"
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in training order, and those held out to measure on."""

    train: list[str]
    held_out: list[str]
    sources: dict[str, int]
    """Characters kept, by kind of source."""


def read_corpus(stdlib: Path | None = None, *, seed: int = 0) -> Corpus:
    """Read, clean, deduplicate, shuffle and split the text under ``stdlib`` (default: the running Python's)."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    sources: dict[str, int] = {}
    train: list[str] = []
    held_out: list[str] = []
    for kind, raw in _raw_documents(root):
        document = _without_repeats(clean(raw), seen)
        if len(document) < MIN_DOCUMENT:
            continue
        sources[kind] = sources.get(kind, 0) + len(document)
        (held_out if _is_held_out(document) else train).append(document)
    random.Random(seed).shuffle(train)
    return Corpus(train, held_out, sources)


def clean(text: str) -> str:
    """Keep the prose of ``text``: paragraphs and list items, one per line block, in ASCII, without markup and code."""
    lines = text.translate(_ASCII).expandtabs().splitlines()
    paragraphs = (_prose(paragraph) for paragraph in _paragraphs(lines))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _raw_documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind of source, text), the best prose first, because a repeated paragraph is kept where it comes first."""
    topics = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(topics):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield from (("language reference", section) for section in _sections(value.value))
    page = (root / "idlelib" / "help.html").read_text(encoding="utf-8")
    page = re.sub(r"(?s)<(style|script|pre|head).*?</\1>|<[^>]+>", " ", page)
    yield "idle help", html.unescape(re.sub(r"(?m)^ +", "", page))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] in ("site-packages", "pydoc_data") or "lib2to3/tests" in relative.as_posix():
            continue
        tests = "test" in relative.parts or "tests" in relative.parts
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated escapes in the sources of tests
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # files that are wrong on purpose, for tests
        yield from (("test docstrings" if tests else "docstrings", text) for text in _docstrings(tree))
        yield from (("test comments" if tests else "comments", text) for text in _comments(source))


def _sections(topic: str) -> list[str]:
    """Cut a topic at its ruled headings, so that a document is a page or two and not a chapter."""
    return [part for part in re.split(r"(?m)^[^\n]+\n[*=~-]{3,}$", topic) if part.strip()]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the module's docstring, then one text per class (with its methods') and per function."""
    if text := ast.get_docstring(tree):
        yield text
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            members = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            texts = [ast.get_docstring(n) for n in (node, *members)]
            if joined := "\n\n".join(text for text in texts if text):
                yield joined
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield text


def _comments(source: str) -> Iterator[str]:
    """Yield blocks of consecutive whole-line comments."""
    block: list[str] = []
    last_row = -1
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
                continue
            if token.start[0] != last_row + 1:
                if len(block) >= MIN_COMMENT_LINES:
                    yield "\n".join(block)
                block = []
            block.append(re.sub(r"^#[#:!]* ?", "", token.string))
            last_row = token.start[0]
    except (tokenize.TokenError, IndentationError):
        return
    if len(block) >= MIN_COMMENT_LINES:
        yield "\n".join(block)


def _paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """Cut at blank lines, rules and list items; leave out what is indented after a line that ends in ``::``."""
    paragraph: list[str] = []
    literal_indent: int | None = None
    for line in [*lines, ""]:
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if literal_indent is not None and stripped:
            if indent > literal_indent:
                continue
            literal_indent = None
        if not stripped or _RULE.match(line) or _ITEM.match(stripped) or _FIELD.match(stripped):
            if paragraph:
                yield paragraph
            paragraph = []
        if stripped and not _RULE.match(line):
            paragraph.append(stripped)
        if stripped.endswith("::"):
            literal_indent = indent


def _prose(lines: list[str]) -> str:
    """Join one paragraph's lines; return "" when it is not prose."""
    text = " ".join(lines)
    if _NOISE.search(text) or (len(lines) == 1 and _CODE_COMMENT.match(lines[0])):
        return ""
    text = _ROLE.sub(r"\1", text).replace("``", "").replace("`", "")
    text = re.sub(r"\*\*(\S[^*]*?)\*\*|(?<![\w*])\*(\S[^*]*?)\*(?![\w*])", lambda m: m[1] or m[2], text)
    text = re.sub(r"\s+", " ", text.replace("::", ":")).strip()
    text = text.encode("ascii", "ignore").decode("ascii")
    words = _WORD.findall(text)
    lower_words = [word for word in words if word.islower() and (len(word) > 1 or word == "a")]
    letters = sum(map(len, words)) + text.count("_")
    if len(words) < 4 or letters < 0.64 * len(text) or len(lower_words) < 0.55 * len(words):
        return ""
    symbols = sum(text.count(symbol) for symbol in "=<>{}[]|\\/%^~@#$+&;")
    return "" if symbols > 0.05 * len(text) else text


def _without_repeats(document: str, seen: set[str]) -> str:
    """Drop the paragraphs of ``document`` that are in ``seen``, and add the others to it."""
    fresh = []
    for paragraph in document.split("\n\n"):
        key = paragraph.lower()
        if paragraph and key not in seen:
            seen.add(key)
            fresh.append(paragraph)
    return "\n\n".join(fresh)


def _is_held_out(document: str) -> bool:
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
