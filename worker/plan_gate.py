"""Fencing: which plans of a stream are executed, answered from memory, or ignored."""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

from worker.step import PlanError, StepPlan

Answer = TypeVar("Answer")


class Verdict(enum.Enum):
    """What to do with a plan."""

    EXECUTE = "execute"
    """It is the next step."""
    REPEAT = "repeat"
    """It is the last step again: answer with `last_answer`, compute nothing."""
    STALE = "stale"
    """It is of an older epoch or an older step: ignore it."""


class PlanGate(Generic[Answer]):
    """Lets every step of one epoch through once and in order.

    A gate belongs to one stream, whose welcome set the epoch. `judge` is asked before a plan is executed and `record`
    told afterwards.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.last_step = 0
        self.last_answer: Answer | None = None
        self.stale_plans = 0
        """Plans ignored so far."""

    def judge(self, plan: StepPlan) -> Verdict:
        """Says what to do with the plan. Raises PlanError for a newer epoch than welcomed, or a gap in the steps."""
        if plan.epoch > self.epoch:
            raise PlanError(f"plan of epoch {plan.epoch} on a stream of epoch {self.epoch}")
        if plan.epoch < self.epoch or plan.step < self.last_step:
            self.stale_plans += 1
            return Verdict.STALE
        if plan.step == self.last_step and self.last_answer is not None:
            return Verdict.REPEAT
        if plan.step != self.last_step + 1:
            raise PlanError(f"plan of step {plan.step} after step {self.last_step}")
        return Verdict.EXECUTE

    def record(self, plan: StepPlan, answer: Answer) -> None:
        """Remembers the answer to the plan just executed."""
        assert plan.epoch == self.epoch
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        self.last_answer = answer
