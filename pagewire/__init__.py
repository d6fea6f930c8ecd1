"""Pagewire: LLM serving with paged KV memory over gRPC. What a user imports and types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagewire.aio import AsyncClient
    from pagewire.client import Client, Stream
    from pagewire.errors import PagewireError, StatusError, StreamError

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "PagewireError", "StatusError", "Stream", "StreamError", "__version__"]

_HOMES = {
    "AsyncClient": "pagewire.aio",
    "Client": "pagewire.client",
    "Stream": "pagewire.client",
    "PagewireError": "pagewire.errors",
    "StatusError": "pagewire.errors",
    "StreamError": "pagewire.errors",
}


def __getattr__(name: str) -> Any:
    """Imports the client when it is first used: the roles and `pagewire --help` do without it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pagewire' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
