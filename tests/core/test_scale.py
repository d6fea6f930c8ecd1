"""Growth: what one event costs does not grow with the pool. Work is counted here, time is not measured."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from scheduler import inspection
from scheduler.dispatcher import (
    Admission,
    Continuation,
    Dispatcher,
    FinishReason,
    ParkingVerdict,
    SchedulerConfig,
    TransferRates,
)
from scheduler.line import Line
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence, SequenceGroup
from scheduler.step_plan import StepPlan
from tests.core.factories import CAPACITY, make_request
from tests.core.simulated_worker import SimulatedWorker

SIZES = (8, 256)
CONFIG = SchedulerConfig(watermark=0.0, headroom=0.0, max_waiting=10_000, retention_ns=50, max_parked=10_000)


class CountedScheduler(Scheduler):
    """Counts what is asked of all schedulers together."""

    asked: ClassVar[Counter[str]] = Counter()

    @property
    def load(self) -> float:
        self.asked["load"] += 1
        return super().load

    def why_never(self, group: SequenceGroup) -> str | None:
        self.asked["why_never"] += 1
        return super().why_never(group)

    def add(self, group: SequenceGroup) -> None:
        self.asked["add"] += 1
        super().add(group)

    def schedule(self, now: int) -> StepPlan | None:
        self.asked["schedule"] += 1
        return super().schedule(now)


class CountedWorkers(dict[str, Scheduler]):
    """The workers of a dispatcher; counts how often somebody goes through all of them."""

    rounds = 0

    def __iter__(self) -> Iterator[str]:
        self.rounds += 1
        return super().__iter__()

    def keys(self) -> Any:
        self.rounds += 1
        return super().keys()

    def values(self) -> Any:
        self.rounds += 1
        return super().values()

    def items(self) -> Any:
        self.rounds += 1
        return super().items()


class CountedQueue(Line):
    """A queue that counts who is looked at when somebody goes through it."""

    looks = 0

    def __iter__(self) -> Iterator[SequenceGroup]:
        self.looks += len(self)
        return super().__iter__()


class CountedGroups(dict[SequenceGroup, None]):
    """Running groups; counts who is looked at when somebody goes through them."""

    looks = 0

    def __iter__(self) -> Iterator[SequenceGroup]:
        self.looks += len(self)
        return super().__iter__()


class ManyWorkers:
    """A pool of simulated workers. Every worker is driven only when the dispatcher names it or its result is in."""

    def __init__(self, num_workers: int, config: SchedulerConfig = CONFIG) -> None:
        CountedScheduler.asked.clear()
        self.asked = CountedScheduler.asked
        self.dispatcher = Dispatcher(config, CountedScheduler)
        self.workers: dict[str, SimulatedWorker] = {}
        self.plans: dict[str, list[StepPlan]] = {}
        self.now = 0
        for number in range(num_workers):
            self.join(str(number), number + 1)
        self.visited = CountedWorkers(self.dispatcher._schedulers)
        self.dispatcher._schedulers = self.visited

    def join(self, worker_id: str, epoch: int) -> None:
        blocks = 64 - epoch % 8  # no two neighbours have pools of one size, as on real machines
        self.dispatcher.add_worker(worker_id, replace(CAPACITY, num_blocks=blocks), TransferRates(), epoch, self.now)
        self.workers[worker_id] = SimulatedWorker(replace(CAPACITY, num_blocks=blocks), epoch)
        self.plans[worker_id] = []

    def submit(self, name: str, **fields: Any) -> None:
        assert self.dispatcher.submit(make_request(name, **fields), self.now).admission is Admission.OK

    def plan(self, worker_ids: Iterable[str]) -> None:
        for worker_id in worker_ids:
            while (plan := self.dispatcher.schedule(worker_id, self.now)) is not None:
                self.plans[worker_id].append(plan)

    def run_until_idle(self) -> int:
        """Returns how many results there were."""
        results = 0
        self.plan(self.dispatcher.take_woken())
        while any(self.plans.values()):
            for worker_id, plans in self.plans.items():
                if plans:
                    self.now += 1
                    results += 1
                    self.dispatcher.apply(worker_id, self.workers[worker_id].execute(plans.pop(0)), self.now)
                    self.dispatcher.take_events()
                    self.plan([worker_id])
                    self.plan(self.dispatcher.take_woken())
        return results


def test_no_event_goes_through_all_workers() -> None:
    pool = ManyWorkers(24)
    dispatcher = pool.dispatcher
    for number in range(100):
        pool.submit(str(number), deadline=10_000 if number % 3 else None)
    dispatcher.abort("7", FinishReason.CANCELLED, pool.now)
    pool.plan(dispatcher.take_woken())
    dispatcher.stop_sequence("8", 0, 0, "stop", pool.now)
    for number in range(10, 20):
        assert dispatcher.park(str(number), 0, pool.now) is ParkingVerdict.OK
        if number % 2:
            assert dispatcher.resume(str(number), Continuation(), pool.now).verdict is ParkingVerdict.OK
    pool.run_until_idle()
    dispatcher.next_expiry()
    dispatcher.expire(20_000)
    assert pool.visited.rounds == 0
    dispatcher.check_integrity()


def test_a_refusal_at_a_full_queue_goes_through_no_workers() -> None:
    pool = ManyWorkers(24, replace(CONFIG, max_waiting=100))
    answers = [pool.dispatcher.submit(make_request(str(number)), 0).admission for number in range(150)]
    assert answers.count(Admission.LATER) == 50
    pool.plan(pool.dispatcher.take_woken())
    assert pool.dispatcher.submit(make_request("next"), 0).admission is Admission.OK
    assert pool.visited.rounds == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_request_asks_few_workers_whatever_the_size_of_the_pool(size: int) -> None:
    pool = ManyWorkers(size)
    for number in range(2 * size):
        pool.submit(str(number))
    pool.asked.clear()
    for number in range(500):
        pool.dispatcher.abort(str(number), FinishReason.CANCELLED, 0)
        pool.submit(str(number + 2 * size))
    assert pool.asked["load"] <= 500 * 10
    assert pool.asked["why_never"] <= 500 * 3


@pytest.mark.parametrize("size", SIZES)
def test_plans_are_asked_for_once_more_per_result_and_request_whatever_the_size_of_the_pool(size: int) -> None:
    pool = ManyWorkers(size)
    pool.run_until_idle()
    pool.asked.clear()
    results = 0
    for number in range(30):
        pool.submit(str(number))
        results += pool.run_until_idle()
    assert pool.asked["schedule"] <= 2 * results + 2 * 30


def test_workers_that_join_one_by_one_move_each_waiting_request_a_few_times_at_most() -> None:
    pool = ManyWorkers(1)
    for number in range(640):
        pool.submit(str(number))
    pool.asked.clear()
    for number in range(1, 64):
        pool.join(str(number), number + 1)
    assert pool.asked["add"] <= 640 * 6, "the harmonic number of 64 is 4.7"
    assert [worker.assigned_sequences for worker in pool.dispatcher.schedulers] == [10] * 64
    pool.dispatcher.check_integrity()


def test_the_figures_of_a_worker_do_not_go_through_its_decode_set(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Sequence] = []
    count = inspection.empty_slots

    def counting(sequences: Iterable[Sequence], scheduler: Scheduler) -> int:
        looked_at.extend(sequences := list(sequences))
        return count(sequences, scheduler)

    pool = ManyWorkers(1)
    for number in range(8):
        pool.submit(str(number), max_tokens=20)
    for _ in range(4):
        pool.plan(["0"])
        pool.dispatcher.apply("0", pool.workers["0"].execute(pool.plans["0"].pop(0)), 0)
    monkeypatch.setattr(inspection, "empty_slots", counting)
    (figures,) = pool.dispatcher.loads().workers
    assert figures.running_sequences == 8
    assert figures.kv_waste_ratio > 0
    assert looked_at == []


def test_a_request_that_waits_adds_few_objects_to_what_the_garbage_collector_walks() -> None:
    pool = ManyWorkers(1)
    requests = [make_request(str(number)) for number in range(200)]
    gc.disable()
    try:
        before = len(gc.get_objects())
        for request in requests:
            pool.dispatcher.submit(request, pool.now)
        added = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert added <= 8 * len(requests)  # group, rank, sequence, block table, and three lists


def test_a_request_that_starts_is_found_without_a_look_at_all_who_wait() -> None:
    pool = ManyWorkers(1)
    for number in range(300):
        pool.submit(str(number), tenant=f"tenant {number % 3}", priority=number % 2)
    (scheduler,) = pool.dispatcher.schedulers
    scheduler.waiting = queue = CountedQueue(scheduler.waiting)
    pool.run_until_idle()
    assert not queue
    assert queue.looks == 0
    pool.dispatcher.check_integrity()


def test_a_step_in_which_somebody_waits_for_rows_goes_through_no_running_groups() -> None:
    pool = ManyWorkers(1)
    for number in range(24):  # eight rows, and a prompt for each tenant and priority in all of them
        pool.submit(str(number), max_tokens=30, tenant=f"tenant {number % 2}", priority=number // 2 % 2)
    for _ in range(3):
        pool.plan(["0"])
        pool.dispatcher.apply("0", pool.workers["0"].execute(pool.plans["0"].pop(0)), 0)
    (scheduler,) = pool.dispatcher.schedulers
    scheduler.running = running = CountedGroups(scheduler.running)
    for _ in range(10):
        pool.dispatcher.apply("0", pool.workers["0"].execute(pool.plans["0"].pop(0)), 0)
        pool.plan(["0"])
    assert len(running) == 8
    assert len(scheduler.waiting) == 16
    assert running.looks == 0
    pool.dispatcher.check_integrity()
