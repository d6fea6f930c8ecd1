"""The link over real sockets, against a scheduler driven by hand."""

from __future__ import annotations

import queue
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from pagewire.runtime.errors import StartError
from pagewire.v1 import inference_pb2, worker_pb2
from tests.worker.fake_scheduler import LIMIT_S, FakeScheduler, Session
from tests.worker.toy import ToyModel, make_executor
from worker.link import SchedulerLink
from worker.metrics import start_page
from worker.step import PlanError

PROMPT = [7, 3, 30, 11]


class StepFailed(BaseException):
    """Ends the thread where a real worker would end its process."""


class RunningLink:
    """A link on a thread of its own, as a worker's main thread would run it."""

    def __init__(self, address: str) -> None:
        self.model = ToyModel()
        self.executor = make_executor(self.model)
        self.failures: queue.Queue[BaseException] = queue.Queue()
        self.welcomes: queue.Queue[None] = queue.Queue()
        self.error: BaseException | None = None
        hello = worker_pb2.WorkerHello(protocol_version=1, worker_id="toy")
        self.link = SchedulerLink(
            address,
            hello,
            self.executor,
            on_welcome=lambda: self.welcomes.put(None),
            on_failure=self._fail,
        )
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.link.run()
        except (StartError, StepFailed) as error:
            self.error = error

    def _fail(self, error: BaseException) -> NoReturn:
        self.failures.put(error)
        self.link.stop()
        raise StepFailed

    def join(self) -> None:
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()


@pytest.fixture
def scheduler() -> Iterator[FakeScheduler]:
    scheduler = FakeScheduler()
    yield scheduler
    scheduler.stop()


@pytest.fixture
def worker(scheduler: FakeScheduler) -> Iterator[RunningLink]:
    worker = RunningLink(scheduler.address)
    yield worker
    worker.link.stop()
    scheduler.stop()
    worker.join()


def first_plan(session: Session, slot: int = 0) -> worker_pb2.StepPlan:
    """A greedy sequence, prefilled at once; blocks for twelve tokens."""
    sampling = inference_pb2.SamplingParams(temperature=0, seed=1)
    new = worker_pb2.NewSequence(
        slot=slot, token_ids=PROMPT, prompt_tokens=len(PROMPT), blocks=[4, 2, 9], sampling=sampling
    )
    return session.plan(new_sequences=[new], chunk_slots=[slot], chunk_tokens=[len(PROMPT)])


def test_plans_are_executed_and_answered_in_order(scheduler: FakeScheduler, worker: RunningLink) -> None:
    session = scheduler.session()
    assert session.hello.worker_id == "toy"
    worker.welcomes.get(timeout=LIMIT_S)
    # Plan 2 is sent before the result of plan 1 is known.
    first_plan(session)
    session.plan(decode_add=[0])
    session.plan()
    results = [session.result() for _ in range(3)]
    assert [(result.epoch, result.step) for result in results] == [(1, 1), (1, 2), (1, 3)]
    assert [result.token_ids[0] for result in results] == worker.model.greedy(PROMPT, 3)
    assert results[0].timings.chunk_tokens == 4
    assert results[2].timings.decode_tokens == 1


def test_a_repeated_plan_is_answered_again_without_computing(scheduler: FakeScheduler, worker: RunningLink) -> None:
    session = scheduler.session()
    first_plan(session)
    repeated = session.plan(decode_add=[0])
    session.send(repeated)
    session.send(worker_pb2.StepPlan(epoch=1, step=1))  # older than the last: ignored
    session.send(worker_pb2.StepPlan(epoch=0, step=3))  # of an older epoch: ignored
    session.plan()
    results = [session.result() for _ in range(4)]
    assert [result.step for result in results] == [1, 2, 2, 3]
    assert results[1] == results[2]
    tokens = [result.token_ids[0] for result in results]
    assert [tokens[0], tokens[1], tokens[3]] == worker.model.greedy(PROMPT, 3)


def test_heartbeats_say_how_far_the_worker_is(scheduler: FakeScheduler, worker: RunningLink) -> None:
    session = scheduler.session()
    before = session.heartbeats.get(timeout=LIMIT_S)
    assert (before.epoch, before.last_step) == (1, 0)
    first_plan(session)
    session.result()
    while (beat := session.heartbeats.get(timeout=LIMIT_S)).last_step == 0:
        pass
    assert beat.last_step == 1
    assert beat.progress == before.progress + 3  # two layers and the step


@pytest.mark.parametrize("how", ["end of stream", "end of process"])
def test_a_lost_scheduler_is_joined_again_with_nothing_left_of_before(how: str) -> None:
    scheduler = FakeScheduler()
    worker = RunningLink(scheduler.address)
    session = scheduler.session()
    first_plan(session)
    session.plan(decode_add=[0])
    session.result()
    if how == "end of stream":
        session.end()
    else:
        scheduler.stop()
        scheduler = FakeScheduler(scheduler.address, first_epoch=5)
    again = scheduler.session()
    assert again.epoch > session.epoch
    assert again.hello.worker_id == "toy"
    # Slot 0 is empty again and steps count from 1.
    first_plan(again)
    result = again.result()
    assert (result.epoch, result.step) == (again.epoch, 1)
    assert result.token_ids[0] == worker.model.greedy(PROMPT, 1)[0]
    worker.link.stop()
    scheduler.stop()
    worker.join()


def test_a_session_with_an_epoch_that_is_not_new_is_left(scheduler: FakeScheduler, worker: RunningLink) -> None:
    session = scheduler.session()
    worker.welcomes.get(timeout=LIMIT_S)
    scheduler.next_epoch = session.epoch  # a scheduler that forgot what it gave out
    session.end()
    scheduler.session()  # refused by the worker, which dials again
    accepted = scheduler.session()
    assert accepted.epoch == session.epoch + 1
    first_plan(accepted)
    assert accepted.result().epoch == accepted.epoch
    assert worker.welcomes.qsize() == 1


def test_a_refusal_ends_the_worker_with_the_schedulers_reason() -> None:
    scheduler = FakeScheduler()
    scheduler.refusal = "another model is served"
    worker = RunningLink(scheduler.address)
    worker.join()
    assert isinstance(worker.error, StartError)
    assert "another model is served" in str(worker.error)
    scheduler.stop()


@pytest.mark.parametrize(
    "fields", [{"decode_add": [3]}, {"release_slots": [99]}, {"append_slots": [0], "append_blocks": [10**6]}]
)
def test_a_plan_that_contradicts_the_batch_ends_the_worker(fields: dict[str, Any]) -> None:
    scheduler = FakeScheduler()
    worker = RunningLink(scheduler.address)
    session = scheduler.session()
    first_plan(session)
    assert session.result().step == 1
    session.plan(**fields)
    assert isinstance(worker.failures.get(timeout=LIMIT_S), PlanError)
    worker.join()
    assert session.results.empty()
    scheduler.stop()


def test_a_gap_in_the_steps_ends_the_worker() -> None:
    scheduler = FakeScheduler()
    worker = RunningLink(scheduler.address)
    session = scheduler.session()
    session.send(worker_pb2.StepPlan(epoch=1, step=2))
    assert "step 2 after step 0" in str(worker.failures.get(timeout=LIMIT_S))
    worker.join()
    scheduler.stop()


def test_the_page_counts_and_is_healthy_while_the_worker_is_joined(
    scheduler: FakeScheduler, worker: RunningLink
) -> None:
    address = start_page(worker.link, "127.0.0.1", 0)
    session = scheduler.session()
    worker.welcomes.get(timeout=LIMIT_S)
    first_plan(session)
    session.result()
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    assert {"pagewire_worker_joined 1.0", "pagewire_worker_sessions_total 1.0"} <= set(lines)
    assert urllib.request.urlopen(f"http://{address}/health").status == 200
    worker.link.stop()
    scheduler.stop()
    worker.join()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"http://{address}/health")


def test_a_port_of_the_page_that_is_in_use_is_a_clear_error(worker: RunningLink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError, match="it is in use"):
        start_page(worker.link, "127.0.0.1", taken.getsockname()[1])
