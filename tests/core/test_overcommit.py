"""Three times more work than memory, with hardly any arena: everybody ends, with the right tokens, and nobody is
preempted without bound."""

from __future__ import annotations

import random
from array import array
from collections import deque

import pytest

from scheduler.dispatcher import Dispatcher, SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.sequence import Request, SequenceGroup
from scheduler.step_plan import StepPlan
from tests.core.simulated_worker import Behaviour, SimulatedWorker, undisturbed_output

NUM_REQUESTS = 500
ROWS = 32
BLOCK_SIZE = 4
RATES = TransferRates(10**9, 10**9, 10**6)  # what the simulated worker takes: swapping is cheaper


class Overcommitted:
    """500 requests on one worker whose pool holds a third of what its rows need at their largest."""

    def __init__(self, seed: int, host_blocks: int, *, mixed: bool, max_preemptions: int) -> None:
        self.random = random.Random(seed)
        self.config = SchedulerConfig(
            max_num_seqs=ROWS,
            token_budget=128,
            max_waiting=NUM_REQUESTS,
            watermark=0.0,
            headroom=0.0,
            max_preemptions=max_preemptions,
            max_retained=NUM_REQUESTS,
            retention_ns=1 << 60,
        )
        self.mixed = mixed
        blocks = ROWS * 40 // BLOCK_SIZE // 3
        capacity = WorkerCapacity(BLOCK_SIZE, blocks, host_blocks, 1000, ROWS, 128)
        self.dispatcher = Dispatcher(self.config)
        self.dispatcher.add_worker("w", capacity, RATES, 1, 0)
        self.worker = SimulatedWorker(capacity, 1)
        self.groups: list[SequenceGroup] = []
        self.now = 0

    def submit(self) -> None:
        dice, number = self.random, len(self.groups)
        request = Request(
            str(number),
            array("I", [dice.randrange(60) for _ in range(dice.randint(1, 20))]),
            max_tokens=dice.randint(10, 30),
            priority=dice.choice([0, 0, 1]) if self.mixed else 0,
            tenant=dice.choice(["a", "a", "a", "a", "b"]) if self.mixed else "",
            n=dice.choice([1, 1, 1, 2]),
            payload=Behaviour(),
        )
        group = self.dispatcher.submit(request, self.now).group
        assert group is not None
        self.groups.append(group)

    def run(self) -> None:
        plans: deque[StepPlan] = deque()
        oldest, preempted = 0, 0  # the oldest group that lives, and how often it had been preempted when it became that
        for step in range(100_000):
            self.now += 1
            for _ in range(min(3, NUM_REQUESTS - len(self.groups))):
                self.submit()
            while (plan := self.dispatcher.schedule("w", self.now)) is not None:
                plans.append(plan)
            if plans:
                self.dispatcher.apply("w", self.worker.execute(plans.popleft()), self.now)
            elif len(self.groups) == NUM_REQUESTS:
                break
            while oldest < len(self.groups) and self.groups[oldest].is_finished:
                oldest += 1
                preempted = self.groups[oldest].preemptions if oldest < len(self.groups) else 0
            if not self.mixed and oldest < len(self.groups):
                # Whoever is in the pool as the oldest stays there; it may have been outside when it became that.
                assert self.groups[oldest].preemptions == preempted
            if step % 50 == 0:
                self.dispatcher.check_integrity()
        self.dispatcher.check_integrity()

    def check(self) -> None:
        for group in self.groups:
            assert group.is_finished
            assert group.preemptions <= self.config.max_preemptions
            for sequence in group.sequences:
                assert sequence.output == undisturbed_output(group.request, sequence.index)[0]


@pytest.mark.parametrize("host_blocks", [0, 1, 7])
@pytest.mark.parametrize(("mixed", "max_preemptions"), [(False, 16), (True, 16), (True, 2)])
def test_everybody_ends_within_the_bound_however_small_the_arena(
    host_blocks: int, mixed: bool, max_preemptions: int
) -> None:
    service = Overcommitted(host_blocks, host_blocks, mixed=mixed, max_preemptions=max_preemptions)
    service.run()
    service.check()
    total = service.dispatcher.loads().workers[0].preemptions_total
    assert total["recompute"] > 50
    assert (total["swap"] > 0) == (host_blocks > 0)
    assert max(group.preemptions for group in service.groups) >= 2
