from __future__ import annotations

import pytest

from worker.plan_gate import PlanGate, Verdict
from worker.step import PlanError, StepPlan


def gate_after(steps: int, epoch: int = 7) -> PlanGate[str]:
    gate: PlanGate[str] = PlanGate(epoch)
    for step in range(1, steps + 1):
        plan = StepPlan(epoch, step)
        assert gate.judge(plan) is Verdict.EXECUTE
        gate.record(plan, f"answer {step}")
    return gate


def test_steps_are_executed_once_and_in_order() -> None:
    gate = gate_after(3)
    assert gate.judge(StepPlan(7, 4)) is Verdict.EXECUTE
    assert gate.last_answer == "answer 3"


def test_a_repeat_of_the_last_step_is_answered_from_memory() -> None:
    gate = gate_after(3)
    assert gate.judge(StepPlan(7, 3)) is Verdict.REPEAT
    assert gate.judge(StepPlan(7, 3)) is Verdict.REPEAT
    assert gate.stale_plans == 0


def test_older_steps_and_older_epochs_are_ignored_and_counted() -> None:
    gate = gate_after(3)
    assert gate.judge(StepPlan(7, 2)) is Verdict.STALE
    assert gate.judge(StepPlan(6, 4)) is Verdict.STALE
    assert gate.judge(StepPlan(6, 3)) is Verdict.STALE
    assert gate.stale_plans == 3
    assert gate.judge(StepPlan(7, 4)) is Verdict.EXECUTE


@pytest.mark.parametrize(("epoch", "step"), [(7, 5), (8, 4), (8, 1)])
def test_a_gap_or_an_unknown_epoch_is_an_error(epoch: int, step: int) -> None:
    with pytest.raises(PlanError):
        gate_after(3).judge(StepPlan(epoch, step))


@pytest.mark.parametrize("step", [0, 2])
def test_an_epoch_begins_with_step_one(step: int) -> None:
    with pytest.raises(PlanError, match="after step 0"):
        gate_after(0).judge(StepPlan(7, step))
