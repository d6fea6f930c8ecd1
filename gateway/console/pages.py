"""The console's files: plain HTML, CSS and JavaScript, as they lie in `static/`; nothing is built, nothing fetched
from elsewhere. They hold nothing secret, so they need no API key; what they show does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "static"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE = "/console"
HEADERS = {
    # Only our own files and our own addresses: a request's name can never become a script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class File(NamedTuple):
    """A file of the console."""

    content: bytes
    media_type: str
    etag: str


def load_files() -> dict[str, File]:
    """All files by their path: the page at /console, what it loads below."""
    files: dict[str, File] = {}
    for path in sorted(FOLDER.iterdir()):
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        name = PAGE if path.name == "index.html" else f"{PAGE}/{path.name}"
        files[name] = File(content, MEDIA_TYPES[path.suffix], etag)
    return files
