"""Growth at the edges: what the engine does for one event does not grow with the workers and their requests."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pagewire.v1 import scheduler_pb2, worker_pb2
from scheduler import fanout
from scheduler.config import SchedulerSettings
from scheduler.engine import Engine
from scheduler.gateway_link import Session
from scheduler.sequence import Sequence
from scheduler.step_plan import StepPlan
from scheduler.worker_link import WorkerLink
from tests.scheduler.peers import hello

WORKERS = 40


class CountedEngine:
    """An engine with many workers and one session, without sockets; counts what it does."""

    def __init__(self) -> None:
        self.engine = Engine(SchedulerSettings(max_workers=WORKERS), wall_ms=1)
        self.links = {}
        for number in range(WORKERS):
            link = WorkerLink(hello(f"w{number}"), self.engine.next_epoch(), self.engine.clock)
            self.engine.join(link)
            self.links[link.worker_id] = link
        self.session = Session("session", scheduler_pb2.GatewayHello(gateway_id="g", credit=1000), 1 << 20)
        self.engine.open(self.session)
        self.asked: Counter[str] = Counter()
        schedule = self.engine.dispatcher.schedule

        def counting(worker_id: str, now: int) -> StepPlan | None:
            self.asked[worker_id] += 1
            return schedule(worker_id, now)

        self.engine.dispatcher.schedule = counting  # type: ignore[method-assign]

    async def submit(self, number: int) -> str:
        """Gives a request to the engine; returns the worker that got it."""
        submit = scheduler_pb2.Submit(stream=number + 1, request_id=str(number), token_ids=[5, 6, 7])
        submit.sampling.temperature = 0.0
        submit.stop.max_tokens = 100
        self.engine.submit(self.session, submit)
        group = self.engine.dispatcher.find(str(number))
        assert group is not None
        assert group.worker_id is not None
        await asyncio.sleep(0)  # the engine's turn
        return group.worker_id

    async def answer(self, worker_id: str) -> None:
        """Executes the oldest plan of a worker with one sequence, and lets the engine have the result."""
        link = self.links[worker_id]
        message = worker_pb2.JoinResponse.FromString(await asyncio.wait_for(link.outgoing(), 5))
        result = worker_pb2.StepResult(epoch=link.epoch, step=message.step_plan.step, token_ids=[9])
        link.heard()
        self.engine.result(link, result)
        await asyncio.sleep(0)
        assert not self.engine.failed.done()


def test_a_request_or_result_asks_one_worker_for_plans() -> None:
    async def main() -> None:
        made = CountedEngine()
        for number in range(WORKERS):
            made.asked.clear()
            worker_id = await made.submit(number)
            assert set(made.asked) == {worker_id}
        for worker_id in made.links:
            made.asked.clear()
            await made.answer(worker_id)
            assert set(made.asked) == {worker_id}
        assert sum(made.engine.metrics.time_to_first_token.counts) == WORKERS

    asyncio.run(main())


def test_who_gets_a_steps_tokens_is_not_looked_up_again_because_a_request_comes_or_ends_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up: list[list[Sequence]] = []
    make_routes = fanout._make_routes

    async def main() -> None:
        made = CountedEngine()
        workers = [await made.submit(number) for number in range(WORKERS)]
        for worker_id in workers:
            await made.answer(worker_id)
        looked_up.clear()
        made.engine.abort("0")
        await asyncio.sleep(0)
        assert not made.engine.failed.done()
        await made.submit(WORKERS)
        for worker_id in workers[1:]:
            await made.answer(worker_id)
        assert looked_up == []

    def counting(sequences: list[Sequence]) -> list[fanout._Route]:
        looked_up.append(sequences)
        return make_routes(sequences)

    monkeypatch.setattr(fanout, "_make_routes", counting)
    asyncio.run(main())


def test_a_worker_that_leaves_costs_no_look_at_the_others() -> None:
    async def main() -> None:
        made = CountedEngine()
        made.engine.dispatcher.loads = None  # type: ignore[assignment,method-assign]
        made.engine.leave(made.links["w3"], "test")
        assert "w3" not in made.engine.dispatcher.workers()

    asyncio.run(main())
