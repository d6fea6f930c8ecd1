"""Small makers of what the core's tests need, with defaults that do not matter to them."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

from scheduler.dispatcher import Dispatcher, SchedulerConfig, StepOutput, TransferRates, WorkerCapacity
from scheduler.sequence import Request, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult
from tests.core.simulated_worker import Behaviour, SimulatedWorker

CAPACITY = WorkerCapacity(
    block_size=4, num_blocks=16, host_blocks=16, block_bytes=1000, max_slots=8, max_step_tokens=64
)


def make_request(request_id: str = "a", prompt: list[int] | None = None, **fields: Any) -> Request:
    """A request for 8 tokens after the prompt 1, 2, 3, 4, 5 that no token ends."""
    fields.setdefault("max_tokens", 8)
    fields.setdefault("payload", Behaviour())
    return Request(request_id, array("I", [1, 2, 3, 4, 5] if prompt is None else prompt), **fields)


class OneWorker:
    """A dispatcher with one simulated worker, driven by hand. Times are the number of the call."""

    def __init__(self, config: SchedulerConfig | None = None, rates: TransferRates | None = None, **sizes: int) -> None:
        self.now = 0
        self.capacity = replace(CAPACITY, **sizes)
        self.dispatcher = Dispatcher(config or SchedulerConfig(watermark=0.0, headroom=0.0))
        self.rates = rates or TransferRates()
        self.join()

    def join(self, epoch: int = 1) -> None:
        self.dispatcher.add_worker("w", self.capacity, self.rates, epoch, self.now)
        self.worker = SimulatedWorker(self.capacity, epoch)
        self.pending: list[StepPlan] = []

    def submit(self, request_id: str = "a", prompt: list[int] | None = None, **fields: Any) -> SequenceGroup:
        answer = self.dispatcher.submit(make_request(request_id, prompt, **fields), self.tick())
        assert answer.group is not None, answer
        return answer.group

    def tick(self) -> int:
        self.now += 1
        return self.now

    def plan(self) -> StepPlan:
        """The next plan, which must exist."""
        plan = self.maybe_plan()
        assert plan is not None
        return plan

    def maybe_plan(self) -> StepPlan | None:
        plan = self.dispatcher.schedule("w", self.tick())
        self.dispatcher.check_integrity()
        if plan is not None:
            self.pending.append(plan)
        return plan

    def execute(self) -> StepResult:
        """The result of the oldest plan, not applied yet."""
        return self.worker.execute(self.pending.pop(0))

    def apply(self, result: StepResult | None = None) -> StepOutput:
        output = self.dispatcher.apply("w", result or self.execute(), self.tick())
        self.dispatcher.check_integrity()
        return output

    def step(self) -> StepPlan:
        """Plans, executes and applies one step."""
        plan = self.plan()
        self.apply()
        return plan

    def run_until_idle(self, limit: int = 500) -> list[StepPlan]:
        """All further plans, one step ahead, until nothing is left to do."""
        plans = []
        for _ in range(limit):
            while (plan := self.maybe_plan()) is not None:
                plans.append(plan)
            if not self.pending:
                return plans
            self.apply()
        raise AssertionError(f"not idle after {limit} steps")

    @property
    def free_blocks(self) -> int:
        return self.dispatcher.loads().workers[0].kv_blocks_free
