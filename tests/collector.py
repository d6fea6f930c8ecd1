"""An OpenTelemetry collector in this process: takes spans over OTLP and keeps them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Collected:
    """One span, as it arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    about: dict[str, Any]
    failed: str
    """The status message of a span that failed."""
    begin_ns: int
    end_ns: int


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.address = ""
        self.raw: list[bytes] = []
        """Every export, as it came over the wire."""
        self.spans: list[Collected] = []
        self._more = asyncio.Event()

    async def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> Any:  # noqa: N802
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [_collected(service, span) for span in scope.spans]
        self._more.set()
        return otlp.ExportTraceServiceResponse()

    def of(self, trace_id: str, name: str = "") -> list[Collected]:
        """Spans of a trace, oldest first."""
        found = [span for span in self.spans if span.trace_id == trace_id and name in ("", span.name)]
        return sorted(found, key=lambda span: span.begin_ns)

    async def wait_for(self, trace_id: str, name: str) -> Collected:
        """The first span of that name in the trace, once it is here."""
        while not (found := self.of(trace_id, name)):
            self._more.clear()
            await self._more.wait()
        return found[0]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on a free port of loopback."""
    collector, server = Collector(), grpc.aio.server()
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(0)


def _collected(service: str, span: trace_pb2.Span) -> Collected:
    return Collected(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _values(span.attributes),
        span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else "",
        span.start_time_unix_nano,
        span.end_time_unix_nano,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in attributes}
