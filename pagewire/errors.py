"""What the client raises.

PagewireError
├── StatusError             the server (or the connection to it) answered with a gRPC status
│   ├── InvalidRequestError     INVALID_ARGUMENT; `violations` names the fields
│   ├── NotFoundError           NOT_FOUND: no such model, or the request has been forgotten
│   ├── AlreadyExistsError      ALREADY_EXISTS: a live request has that id
│   ├── OverloadedError         RESOURCE_EXHAUSTED; `retry_after_ns` says when to try again
│   ├── UnavailableError        UNAVAILABLE: no server there, or no worker is ready
│   ├── DeadlineError           DEADLINE_EXCEEDED
│   └── CancelledError          CANCELLED by someone else
└── StreamError             a stream broke its promise: a gap, or tokens that can no longer be had
"""

from __future__ import annotations

import grpc

from pagewire.runtime.rich_status import StatusDetails


class PagewireError(Exception):
    """Base of everything that the client raises on purpose."""


class StatusError(PagewireError):
    """A call ended with a status other than OK. `details` has everything the server said."""

    def __init__(self, details: StatusDetails) -> None:
        # The message of our servers names the first wrong field already.
        violations = [f"{path}: {what}" for path, what in details.violations]
        text = "; ".join([details.message, *(line for line in violations if line not in details.message)])
        super().__init__(f"{details.code.name}: {text}")
        self.details = details

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self.details.code

    @property
    def reason(self) -> str:
        """UPPER_SNAKE_CASE name of the reason; empty if the server sent none."""
        return self.details.reason

    @property
    def violations(self) -> tuple[tuple[str, str], ...]:
        """(path of the field, what is wrong with it)."""
        return self.details.violations

    @property
    def retry_after_ns(self) -> int:
        """Nanoseconds after which a retry may help; 0: unknown."""
        return self.details.retry_after_ns


class InvalidRequestError(StatusError):
    """The request is malformed or out of range."""


class NotFoundError(StatusError):
    """No such model, or no such request any more."""


class AlreadyExistsError(StatusError):
    """A live request has the same id."""


class OverloadedError(StatusError):
    """The queue is full, or the client reads too slowly."""


class UnavailableError(StatusError):
    """No server answers, or it has no worker that is ready."""


class DeadlineError(StatusError):
    """The timeout passed."""


class CancelledError(StatusError):
    """Someone else cancelled the call."""


class StreamError(PagewireError):
    """A stream could not be continued without a gap."""


_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


def from_details(details: StatusDetails) -> StatusError:
    """The exception for a status."""
    return _CLASSES.get(details.code, StatusError)(details)
