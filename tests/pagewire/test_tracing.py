"""Traces that are off cost nothing, and those that cannot be are refused in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider

from pagewire.runtime.errors import StartError
from pagewire.runtime.settings import RoleSettings
from pagewire.runtime.trace_context import current_traceparent
from pagewire.runtime.tracing import ADVICE, Tracer, make_tracer

CONTEXT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("module", ["gateway.server", "scheduler.server", "worker.link", "pagewire.client"])
def test_a_role_without_traces_does_not_import_opentelemetry(module: str) -> None:
    look = f"import sys, {module}; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", look], check=True)
    assert make_tracer(RoleSettings()) is None


def test_traces_without_opentelemetry_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(StartError, match="--otlp-endpoint: install OpenTelemetry") as refused:
        make_tracer(RoleSettings(otlp_endpoint="http://127.0.0.1:4317"))
    assert ADVICE in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_collector_that_is_away_does_not_hold_up_a_stop(capfd: pytest.CaptureFixture[str]) -> None:
    tracer = make_tracer(RoleSettings(otlp_endpoint="http://127.0.0.1:1"))
    assert tracer is not None
    tracer.start("work").end()
    tracer.stop()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("wrong", ["", "garbage", "00-0-0-01", "\n", CONTEXT[:-3]])
def test_a_malformed_context_begins_a_new_trace(wrong: str) -> None:
    span = Tracer(TracerProvider()).start("work", wrong)
    assert span.is_sampled
    assert CONTEXT.split("-")[1] not in span.traceparent


def test_a_context_says_the_trace_and_whether_it_is_sampled() -> None:
    tracer = Tracer(TracerProvider())
    assert tracer.start("work", CONTEXT).child("part").traceparent.startswith(CONTEXT[:36])
    unsampled = tracer.start("work", CONTEXT[:-1] + "0")
    unsampled.end(error="INTERNAL")
    assert (unsampled.is_sampled, unsampled.traceparent[-2:]) == (False, "00")


def test_a_client_takes_the_context_around_it() -> None:
    assert current_traceparent() == ""
    with TracerProvider().get_tracer("a program").start_as_current_span("work") as span:
        assert f"{span.get_span_context().span_id:016x}" in current_traceparent()
