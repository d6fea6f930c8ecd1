"""Structured logs: one JSON object per line on stderr, with the role and whatever is bound to the context."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Stderr:
    """Standard error as it is at the time of writing: loggers are cached, and tests and supervisors replace it."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(role: str, level: str = "info") -> None:
    """Sets up logging for this process. Call once, before the first log line.

    Args:
        role: bound to every line, with the process id.
        level: least severe level that is written: debug, info, warning or error.
    """
    # A processor, not a context variable: other threads log too, and they do not inherit the context.
    identity = {"role": role, "pid": os.getpid()}

    def add_identity(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.update(identity)
        return event

    structlog.configure(
        processors=[
            add_identity,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]  # writes and flushes only
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> Any:
    """A logger whose lines carry `module: name`. Typed as Any because structlog makes its methods at run time.

    Log lengths and ids, never prompts or generated text.
    """
    return structlog.get_logger(module=name)
