"""How a request fails: one exception that every front door translates into its own protocol.

The reasons are the documented list of docs/errors.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import grpc
from google.rpc import status_pb2

from pagewire.runtime import rich_status

NS_PER_S = 1_000_000_000
RETRY_SOON_NS = 1 * NS_PER_S


class Reason(StrEnum):
    """What `ErrorInfo.reason` may be when the gateway refuses. The scheduler's reasons pass through unchanged."""

    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    INVALID_FIELD = "INVALID_FIELD"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    NO_TOKENIZER = "NO_TOKENIZER"
    NO_CHAT_TEMPLATE = "NO_CHAT_TEMPLATE"
    CHAT_TEMPLATE_FAILED = "CHAT_TEMPLATE_FAILED"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    REQUEST_EXISTS = "REQUEST_EXISTS"
    GATEWAY_FULL = "GATEWAY_FULL"
    SLOW_CONSUMER = "SLOW_CONSUMER"
    NO_SCHEDULER = "NO_SCHEDULER"
    NO_WORKER = "NO_WORKER"
    DRAINING = "DRAINING"
    REQUEST_LOST = "REQUEST_LOST"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    GENERATION_FAILED = "GENERATION_FAILED"
    INTERNAL = "INTERNAL"
    CANCELLED = "CANCELLED"
    INVALID_API_KEY = "INVALID_API_KEY"
    NO_SUCH_PATH = "NO_SUCH_PATH"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    BODY_TIMEOUT = "BODY_TIMEOUT"


@dataclass(frozen=True)
class Violation:
    """One wrong field."""

    field: str
    """Path, such as `sampling.temperature` or `prompt.token_ids.ids[3]`."""
    description: str
    """What is expected; it never repeats text of the request."""


@dataclass
class RequestError(Exception):
    """A request that ends with an error. Its text is made for the client."""

    code: grpc.StatusCode
    reason: str
    message: str
    violations: Sequence[Violation] = ()
    retry_after_ns: int = 0
    """0: a retry does not help."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message}"

    def to_status(self) -> status_pb2.Status:
        """The error as a status with rich details."""
        return rich_status.status(
            self.code,
            self.message,
            reason=self.reason,
            violations=[(violation.field, violation.description) for violation in self.violations],
            retry_after_ns=self.retry_after_ns,
            metadata=self.metadata,
        )


def invalid(violations: Sequence[Violation], reason: Reason = Reason.INVALID_FIELD) -> RequestError:
    """INVALID_ARGUMENT for one or more wrong fields; the message names the first."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    message = f"{first.field}: {first.description}{more}"
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, reason, message, violations)


def unavailable(reason: Reason, message: str, metadata: Mapping[str, str] | None = None) -> RequestError:
    """UNAVAILABLE with the advice to retry soon."""
    return RequestError(
        grpc.StatusCode.UNAVAILABLE, reason, message, retry_after_ns=RETRY_SOON_NS, metadata=metadata or {}
    )
