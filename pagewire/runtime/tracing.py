"""OpenTelemetry traces of a role: spans that the next process continues by a W3C traceparent, sent by OTLP over gRPC.

Off unless `--otlp-endpoint` is given, and then nothing of OpenTelemetry is even imported: whoever can make spans holds
`Tracer | None`. Spans hold ids, names, counts and times, never a prompt, a token or generated text.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from pagewire.runtime import logs
from pagewire.runtime.errors import StartError
from pagewire.runtime.settings import RoleSettings

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan

EXPORT_TIMEOUT_S = 2.0
"""Short, because a role that stops waits for its last export."""
MAX_QUEUED_SPANS = 8192
"""Spans that may wait for a collector; beyond these they are dropped, so one that is away costs no memory."""
EXPORT_INTERVAL_MS = 1000.0
ADVICE = "install OpenTelemetry with: pip install 'pagewire[traces]', or leave --otlp-endpoint out"

log = logs.get_logger("pagewire.tracing")

Attribute = str | bool | int | float


def make_tracer(settings: RoleSettings) -> Tracer | None:
    """The role's tracer; None while traces are off. Raises StartError when OpenTelemetry is not installed."""
    if not settings.otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        raise StartError(f"--otlp-endpoint: {ADVICE}") from None
    resource = Resource.create(
        {"service.name": f"pagewire-{settings.role}", "service.instance.id": f"{socket.gethostname()}-{os.getpid()}"}
    )
    sampler = ParentBased(TraceIdRatioBased(settings.trace_sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_endpoint,
        insecure=not settings.otlp_endpoint.startswith("https://"),
        timeout=EXPORT_TIMEOUT_S,
    )
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=EXPORT_INTERVAL_MS)
    )
    _say_in_our_log()
    return Tracer(provider)


class Tracer:
    """Makes spans. Calls come from any thread."""

    def __init__(self, provider: Any) -> None:
        """`provider` is an `opentelemetry.sdk.trace.TracerProvider`."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pagewire")
        self._propagator = TraceContextTextMapPropagator()

    def start(
        self, name: str, traceparent: str = "", *, start_ns: int | None = None, served: bool = False, **about: Attribute
    ) -> Span:
        """Begins a span.

        Args:
            name: what is done, the same for every request.
            traceparent: W3C trace context of the parent, whose sampling is obeyed; empty or malformed: a new trace.
            start_ns: wall-clock time; None: now.
            served: the span answers a call from outside.
            about: attributes; they are shown with `pagewire.` in front.
        """
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            name,
            context=self._propagator.extract({"traceparent": traceparent}),
            kind=SpanKind.SERVER if served else SpanKind.INTERNAL,
            attributes=_named(about),
            start_time=start_ns,
        )
        return Span(self, span)

    def traceparent_of(self, span: OtelSpan) -> str:
        """What a child in another process needs."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def stop(self) -> None:
        """Sends what waits and ends; waits for the collector, but not for longer than an export may take."""
        self._provider.shutdown()


class Span:
    """Something that takes time. One that is not sampled takes no attributes and is not sent."""

    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self.is_sampled = span.is_recording()
        self.traceparent = tracer.traceparent_of(span)
        """For children elsewhere; says too whether they are sampled."""

    def child(self, name: str, *, start_ns: int | None = None, **about: Attribute) -> Span:
        """Begins a span inside this one."""
        return self._tracer.start(name, self.traceparent, start_ns=start_ns, served=False, **about)

    def set(self, **about: Attribute) -> None:
        """Adds attributes."""
        self._span.set_attributes(_named(about))

    def event(self, name: str) -> None:
        """Notes a moment."""
        self._span.add_event(name)

    def end(self, *, error: str = "", end_ns: int | None = None) -> None:
        """Ends the span; a second time does nothing. `error` is a reason of docs/errors.md; empty: it went well."""
        if not self._span.is_recording():
            return
        if error:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, error)
            self._span.set_attribute("error.type", error)
        self._span.end(end_ns)


def _named(about: dict[str, Attribute]) -> dict[str, Attribute]:
    return {f"pagewire.{name}": value for name, value in about.items()}


class _OurLog(logging.Handler):
    """OpenTelemetry logs that a collector is away; so do we, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("traces", what=record.getMessage())


def _say_in_our_log() -> None:
    theirs = logging.getLogger("opentelemetry")
    theirs.propagate = False
    theirs.setLevel(logging.WARNING)
    if not any(isinstance(handler, _OurLog) for handler in theirs.handlers):
        theirs.addHandler(_OurLog())
