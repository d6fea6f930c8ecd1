"""Spans of the scheduler: one per sampled request from submit to end, with its time in the queue, and which requests'
traces a step plan belongs to. The core knows nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pagewire.runtime.tracing import Span, Tracer
from pagewire.v1 import scheduler_pb2
from scheduler.sequence import Sequence, SequenceGroup

MAX_STEPS_OF_A_TRACE = 256
"""Step plans of one request that carry its trace. A trace of thousands of spans helps nobody."""


class Traces:
    """The spans of live requests that are sampled. Used only while traces are on."""

    def __init__(self, tracer: Tracer, clock: Callable[[], int]) -> None:
        """`clock` gives the nanoseconds that groups' times are in."""
        self.tracer = tracer
        self._clock = clock
        self._spans: dict[SequenceGroup, Span] = {}
        self._steps: dict[SequenceGroup, int] = {}

    def submitted(self, group: SequenceGroup) -> None:
        """A request has been accepted."""
        request = group.request
        submit = request.payload
        assert isinstance(submit, scheduler_pb2.Submit)
        span = self.tracer.start(
            "pagewire.scheduler.request",
            submit.traceparent,
            start_ns=self._wall(group.accepted_at),
            request_id=request.request_id,
            prompt_tokens=len(request.prompt),
            n=request.n,
            priority=request.priority,
        )
        if span.is_sampled:
            self._spans[group] = span
            self._steps[group] = 0

    def refused(self, submit: scheduler_pb2.Submit, reason: str) -> None:
        """A request was not accepted."""
        span = self.tracer.start("pagewire.scheduler.request", submit.traceparent, request_id=submit.request_id)
        span.end(error=reason)

    def admitted(self, group: SequenceGroup) -> None:
        """A request has begun to run."""
        span = self._spans.get(group)
        if span is not None and group.started_at is not None:
            queued = span.child("pagewire.scheduler.queue", start_ns=self._wall(group.accepted_at))
            queued.end(end_ns=self._wall(group.started_at))

    def of_plan(self, computing: Iterable[Sequence]) -> list[str]:
        """Trace contexts for a plan that computes for these sequences, one per sampled request."""
        found: list[str] = []
        if self._spans:
            for group in dict.fromkeys(sequence.group for sequence in computing):
                span = self._spans.get(group)
                if span is not None and self._steps[group] < MAX_STEPS_OF_A_TRACE:
                    self._steps[group] += 1
                    found.append(span.traceparent)
        return found

    def ended(self, group: SequenceGroup, reason: str) -> None:
        """A request has ended; `reason` says why it failed and is empty if it did not."""
        span = self._spans.pop(group, None)
        if span is None:
            return
        span.set(
            completion_tokens=sum(len(sequence.output) for sequence in group.sequences),
            cached_tokens=group.cached_tokens,
            preemptions=group.preemptions,
            swapped_bytes=group.swapped_bytes,
            recomputed_tokens=group.recomputed_tokens,
            traced_steps=self._steps.pop(group),
            worker_id=group.worker_id or "",
        )
        span.end(error=reason)

    def _wall(self, moment: int) -> int:
        """A moment of the clock as nanoseconds since 1970."""
        return time.time_ns() - (self._clock() - moment)
