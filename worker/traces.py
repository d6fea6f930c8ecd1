"""Spans of the worker: one per step in every trace that the step's plan names."""

from __future__ import annotations

import time
from dataclasses import asdict

from pagewire.runtime.tracing import Tracer
from worker.step import StepPlan, StepResult

MAX_STEPS = 64
"""Launched steps whose results may be awaited at a time; beyond the plans in flight."""


class Traces:
    """Remembers when steps of traced requests began. Used only while traces are on."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self._begun: dict[tuple[int, int], tuple[StepPlan, int]] = {}

    def launching(self, plan: StepPlan) -> None:
        """The executing thread takes a plan up."""
        if plan.traceparents:
            while len(self._begun) >= MAX_STEPS:  # their sessions ended before their results were sent
                self._begun.pop(next(iter(self._begun)))
            self._begun[plan.epoch, plan.step] = (plan, time.time_ns())

    def finished(self, result: StepResult) -> None:
        """A result is there. Said again for a repeat, which makes no second span."""
        begun = self._begun.pop((result.epoch, result.step), None)
        if begun is None:
            return
        plan, start_ns = begun
        timings, end_ns = asdict(result.timings), time.time_ns()
        for traceparent in plan.traceparents:
            span = self.tracer.start(
                "pagewire.worker.step",
                traceparent,
                start_ns=start_ns,
                epoch=result.epoch,
                step=result.step,
                **timings,
            )
            span.end(end_ns=end_ns)
