"""The trace context around us, for clients inside programs that use OpenTelemetry. Imports nothing of it by itself."""

from __future__ import annotations

import sys


def current_traceparent() -> str:
    """The trace context that a program around us has set with OpenTelemetry; empty: none."""
    if "opentelemetry.trace" not in sys.modules:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")
