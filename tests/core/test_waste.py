"""KV waste on a load with the lengths of ShareGPT."""

from __future__ import annotations

import math
import random
from array import array

from scheduler.dispatcher import Dispatcher, SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.sequence import Request
from scheduler.step_plan import StepResult


def lognormal_length(dice: random.Random, mean: int, sigma: float) -> int:
    return min(1024, max(4, round(dice.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def test_waste_is_under_four_percent_at_block_size_16_on_a_sharegpt_like_load() -> None:
    dice = random.Random(0)
    dispatcher = Dispatcher(SchedulerConfig(max_num_seqs=64))
    capacity = WorkerCapacity(16, 2000, 0, 1, 64, 2048)
    dispatcher.add_worker("w", capacity, TransferRates(), 1, 0)
    for number in range(200):
        prompt = array("I", [dice.randrange(31000) for _ in range(lognormal_length(dice, 161, 1.0))])
        request = Request(str(number), prompt, max_tokens=lognormal_length(dice, 338, 0.8))
        assert dispatcher.submit(request, 0).group is not None
    core = dispatcher._schedulers["w"]
    empty = allocated = 0.0
    while (plan := dispatcher.schedule("w", 0)) is not None:
        rows = len(core.in_flight[-1].rows)
        if plan.step % 5 == 0:
            (worker,) = dispatcher.loads().workers
            empty += worker.kv_waste_ratio * worker.kv_blocks_used
            allocated += worker.kv_blocks_used
        dispatcher.apply("w", StepResult(1, plan.step, [5] * rows), 0)
    assert all(dispatcher.find(str(number)) is not None for number in range(200))
    assert dispatcher.loads().running == 0
    assert 0.0 < empty / allocated < 0.04
