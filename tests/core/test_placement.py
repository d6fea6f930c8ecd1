"""Placement: always the least loaded worker that could run the group, whatever has ended since."""

from __future__ import annotations

import random
from dataclasses import replace

from scheduler.dispatcher import Dispatcher, SchedulerConfig, TransferRates
from scheduler.sequence import FinishReason, SequenceGroup
from tests.core.factories import CAPACITY, make_request


def pool(*num_blocks: int) -> Dispatcher:
    """Workers "0", "1", ... with so many blocks."""
    dispatcher = Dispatcher(SchedulerConfig(watermark=0.0, headroom=0.0, max_waiting=10_000))
    for number, blocks in enumerate(num_blocks):
        capacity = replace(CAPACITY, num_blocks=blocks)
        dispatcher.add_worker(str(number), capacity, TransferRates(), number + 1, 0)
    return dispatcher


def worker_of(dispatcher: Dispatcher, request_id: str) -> str | None:
    group = dispatcher.find(request_id)
    assert group is not None
    return group.worker_id


def test_equal_workers_are_taken_in_order_of_joining() -> None:
    dispatcher = pool(16, 16, 16)
    for number in range(6):
        dispatcher.submit(make_request(str(number)), 0)
    assert [worker_of(dispatcher, str(number)) for number in range(6)] == ["0", "1", "2", "0", "1", "2"]


def test_a_worker_whose_request_ended_is_the_least_loaded_again() -> None:
    dispatcher = pool(16, 16, 16)
    for number in range(6):
        dispatcher.submit(make_request(str(number)), 0)
    dispatcher.abort("4", FinishReason.CANCELLED, 0)
    dispatcher.submit(make_request("next"), 0)
    assert worker_of(dispatcher, "next") == "1"


def test_only_a_worker_that_could_run_the_request_gets_it() -> None:
    dispatcher = pool(2, 16, 2)
    for number in range(3):
        dispatcher.submit(make_request(str(number), [1] * 30), 0)
    assert [worker_of(dispatcher, str(number)) for number in range(3)] == ["1", "1", "1"]
    dispatcher.submit(make_request("small"), 0)
    assert worker_of(dispatcher, "small") == "0"


def test_a_lost_worker_gets_nothing_and_its_successor_begins_empty() -> None:
    dispatcher = pool(16, 16)
    for number in range(4):
        dispatcher.submit(make_request(str(number)), 0)
    dispatcher.remove_worker("0", 0)
    dispatcher.submit(make_request("after"), 0)
    assert {worker_of(dispatcher, name) for name in ("0", "1", "2", "3", "after")} == {"1"}
    dispatcher.schedule("1", 0)  # the five start, so that they are not distributed anew
    dispatcher.add_worker("0", CAPACITY, TransferRates(), 9, 0)
    dispatcher.submit(make_request("successor's"), 0)
    assert worker_of(dispatcher, "successor's") == "0"
    dispatcher.check_integrity()


def test_the_choice_equals_a_search_over_all_workers_whatever_comes_and_goes() -> None:
    dice = random.Random(1)
    dispatcher = pool(*([16, 2, 16, 64] * 4))
    epoch = 100
    live: list[str] = []
    for number in range(3000):
        action = dice.random()
        if action < 0.55 or not live:
            request = make_request(str(number), [1] * dice.choice([3, 30, 100]), n=dice.randint(1, 3))
            group = SequenceGroup(request, 0, 0)
            able = [s for s in dispatcher._schedulers.values() if s.why_never(group) is None]
            expected = min(able, key=lambda s: (s.assigned_sequences / s.max_rows, s.epoch), default=None)
            answer = dispatcher.submit(request, 0)
            assert (answer.group is None) == (expected is None)
            if answer.group is not None and expected is not None:
                assert answer.group.worker_id == expected.worker_id
                live.append(request.request_id)
        elif action < 0.98:
            dispatcher.abort(live.pop(dice.randrange(len(live))), FinishReason.CANCELLED, 0)
        elif action < 0.99:
            dispatcher.remove_worker(dice.choice(dispatcher.workers()), 0)
        else:
            epoch += 1
            capacity = replace(CAPACITY, num_blocks=dice.choice([2, 16, 64]))
            dispatcher.add_worker(str(dice.randrange(16)), capacity, TransferRates(), epoch, 0)
        live = [request_id for request_id in live if request_id in dispatcher._groups]
        if number % 50 == 0:
            dispatcher.check_integrity()


def test_notes_of_ended_requests_do_not_pile_up() -> None:
    dispatcher = pool(16, 16)
    for number in range(2000):
        dispatcher.submit(make_request(str(number)), 0)
        dispatcher.abort(str(number), FinishReason.CANCELLED, 0)
    (kind,) = dispatcher._placement._kinds.values()
    assert len(kind._heap) <= 4 * 2 + 65


def test_the_queue_is_full_at_its_bound_and_free_again_when_somebody_leaves() -> None:
    dispatcher = Dispatcher(SchedulerConfig(max_waiting=3))
    answers = [dispatcher.submit(make_request(str(number)), 0).admission.value for number in range(5)]
    assert answers == ["ok", "ok", "ok", "later", "later"]
    dispatcher.abort("1", FinishReason.CANCELLED, 0)
    assert dispatcher.submit(make_request("5"), 0).admission.value == "ok"
    assert dispatcher.submit(make_request("6"), 0).admission.value == "later"
