"""What a client knows of a stream, and what it does when the connection breaks. Both clients share it; it does no I/O.

gRPC never replays a call after its first message, so resuming is ours: the request is opened detached under an id of
its own, and after a break `Attach` continues it from the first token that has not arrived.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from dataclasses import replace

import grpc

from pagewire import errors
from pagewire.runtime.rich_status import StatusDetails
from pagewire.runtime.trace_context import current_traceparent
from pagewire.types import Piece, piece_from
from pagewire.v1 import inference_pb2

DETACH_METADATA = (("pagewire-detach", "true"),)
NS_PER_S = 1_000_000_000
FIRST_DELAY_NS = 50_000_000
LONGEST_DELAY_NS = 2 * NS_PER_S


class Call(enum.Enum):
    """The call that (re)opens the stream."""

    GENERATE = "Generate"
    ATTACH = "Attach"
    CONTINUE = "Continue"


class StreamState:
    """One request's stream: what has arrived, and how to go on.

    Args:
        request: is given a request id if it has none.
        resume_ns: how long to try without any progress before the break is raised; 0: never resume.
        on_break: called once per break, when the stream begins to try to go on.
        resumed: the request is continued by this; its first response then says from which position on.
    """

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        resume_ns: int,
        on_break: Callable[[], None] | None = None,
        resumed: inference_pb2.ContinueRequest | None = None,
    ) -> None:
        self.resumed = resumed
        if not request.request_id:
            request.request_id = uuid.uuid4().hex
        self.request = request
        self.next_call = Call.GENERATE
        self._resume_ns = resume_ns
        self._on_break = on_break
        self._positions: dict[int, int] = {}
        self._finished: set[int] = set()
        self._expected = max(1, request.sampling.n)
        self._failed = False
        self._broken_since: int | None = None
        self._attempts = 0
        # Now, because a later call may be made in another context.
        traceparent = current_traceparent()
        self._trace_metadata = (("traceparent", traceparent),) if traceparent else ()

    @property
    def request_id(self) -> str:
        """The request's name, for Attach and Cancel from elsewhere."""
        return self.request.request_id

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return len(self._finished) >= self._expected

    @property
    def complete(self) -> bool:
        """Whether every sequence has ended as it should: a status that follows says nothing new."""
        return self.done and not self._failed

    @property
    def detached(self) -> bool:
        """Whether the request outlives its connection, so that dropping the stream needs an explicit Cancel."""
        return self._resume_ns > 0

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata for the call."""
        return (*(DETACH_METADATA if self.detached else ()), *self._trace_metadata)

    def attach_request(self) -> inference_pb2.AttachRequest:
        """Asks for everything that has not arrived."""
        positions = [
            inference_pb2.SequencePosition(index=index, first_token=position)
            for index, position in sorted(self._positions.items())
        ]
        return inference_pb2.AttachRequest(request_id=self.request_id, positions=positions)

    def accept(self, response: inference_pb2.GenerateResponse) -> Piece | None:
        """Takes one response. None: it repeats the end of a sequence that has ended already.

        Raises StreamError if tokens are missing before it or it repeats some.
        """
        self._broken_since, self._attempts = None, 0
        if response.index in self._finished:
            return None
        begins = response.first_token if self.resumed is not None else 0
        expected = self._positions.get(response.index, begins)
        if response.first_token != expected:
            raise errors.StreamError(
                f"{self.request_id}: sequence {response.index} went on at token {response.first_token}, not {expected}"
            )
        self._positions[response.index] = expected + len(response.token_ids)
        if response.HasField("finish"):
            self._finished.add(response.index)
            self._failed |= response.finish.reason == inference_pb2.FINISH_REASON_ERROR
        return piece_from(response)

    def broke(self, details: StatusDetails, now: int) -> int:
        """Decides what follows a failed call: sets `next_call` and returns how long to wait, in nanoseconds.

        Args:
            details: the call's status. A stream that ended without a status but too early counts as UNAVAILABLE.
            now: monotonic time in nanoseconds.

        Raises:
            StatusError: nothing can be done about it, or the time to resume has run out.
            StreamError: the server has forgotten a request of which tokens had arrived.
        """
        arrived = bool(self._positions)
        if self.resumed is not None and not arrived:
            raise errors.from_details(details)  # nobody knows from which position on to attach
        resuming = self._broken_since is not None
        if self.detached and resuming and details.code is grpc.StatusCode.ALREADY_EXISTS:
            # The first attempt got through after all.
            return self._try_again(Call.ATTACH, details, now)
        if self.detached and details.code is grpc.StatusCode.NOT_FOUND and self.next_call is Call.ATTACH:
            if arrived:
                raise errors.StreamError(f"{self.request_id} can no longer be continued: {details.message}")
            return self._try_again(Call.GENERATE, details, now)
        if self.detached and details.code is grpc.StatusCode.UNAVAILABLE:
            refused = bool(details.reason) and not arrived and not resuming
            if not refused:
                return self._try_again(Call.ATTACH, details, now)
        raise errors.from_details(details)

    def _try_again(self, call: Call, details: StatusDetails, now: int) -> int:
        if self._broken_since is None:
            self._broken_since = now
            if self._on_break is not None:
                self._on_break()
        if now - self._broken_since >= self._resume_ns:
            if details.reason:
                raise errors.from_details(details)
            seconds = (now - self._broken_since) / NS_PER_S  # gRPC's own words name addresses and system calls
            raise errors.from_details(replace(details, message=f"the server has been out of reach for {seconds:.0f} s"))
        self.next_call = call
        delay = min(FIRST_DELAY_NS << min(self._attempts, 10), LONGEST_DELAY_NS)
        self._attempts += 1
        return max(delay, min(details.retry_after_ns, LONGEST_DELAY_NS))


def ended_early(request_id: str) -> StatusDetails:
    """The status of a stream that the server closed as if all was well, before every sequence had ended."""
    return StatusDetails(grpc.StatusCode.UNAVAILABLE, f"the stream of {request_id} ended before its last token")
