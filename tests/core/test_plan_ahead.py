"""When a plan is made: shortly before the worker needs it while requests keep coming, at once while none does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.dispatcher import SchedulerConfig
from scheduler.plan_ahead import EXPECTED_NS, FIRST_LEAD_NS, LEAST_LEAD_NS, PlanAhead
from tests.core.factories import OneWorker

MS = 1_000_000
STEP_NS = 20 * MS


def steps(ahead: PlanAhead, count: int, idle_ns: int = 0, *, are_late: bool = True) -> None:
    for _ in range(count):
        ahead.planned(STEP_NS, 0, is_late=are_late)
        ahead.applied(0, STEP_NS, idle_ns)


def test_a_plan_that_the_device_waited_for_makes_the_lead_longer_by_that_wait() -> None:
    ahead = PlanAhead()
    steps(ahead, 1, idle_ns=2 * MS)
    assert ahead.lead_ns == FIRST_LEAD_NS + 2 * MS
    steps(ahead, 1, idle_ns=1000 * MS)
    assert ahead.lead_ns == FIRST_LEAD_NS + 2 * MS + STEP_NS, "a stall counts as a step at most"


def test_plans_in_time_make_it_shorter_down_to_a_least_one() -> None:
    ahead = PlanAhead()
    steps(ahead, 1)
    assert FIRST_LEAD_NS * 0.99 < ahead.lead_ns < FIRST_LEAD_NS
    steps(ahead, 2000)
    assert ahead.lead_ns == LEAST_LEAD_NS


def test_a_wait_for_a_plan_that_was_not_late_says_nothing() -> None:
    ahead = PlanAhead()
    steps(ahead, 10, idle_ns=50 * MS, are_late=False)
    assert ahead.lead_ns == FIRST_LEAD_NS


def test_the_lead_is_an_eighth_of_the_last_step_at_least() -> None:
    ahead = PlanAhead()
    ahead.planned(80 * MS, 0)
    assert ahead.due == 70 * MS
    ahead.planned(8 * MS, 1 * MS)
    assert ahead.due == 88 * MS - FIRST_LEAD_NS
    ahead.applied(90 * MS, 80 * MS, 0)
    assert ahead.due == 98 * MS - FIRST_LEAD_NS, "counted anew from a result"


def learned(**settings: int) -> OneWorker:
    """A worker whose steps of 20 ms have been learned, decoding one request; the last one came a moment ago."""
    sizes = {"num_blocks": 256, "max_slots": 4, "max_step_tokens": 64, **settings}
    service = OneWorker(SchedulerConfig(prefix_cache=False), **sizes)
    service.submit("first", max_tokens=200)
    for number in range(20):
        if number == 10:
            service.submit("second", max_tokens=5)
        service.plan()
        result = service.execute()
        service.now += STEP_NS
        service.apply(replace(result, timings=replace(result.timings, forward_ns=STEP_NS)))
    return service


def test_while_requests_keep_coming_a_plan_is_made_shortly_before_the_worker_needs_it() -> None:
    service = learned()
    begun = service.now
    service.plan()
    assert service.maybe_plan() is None
    due = service.dispatcher.next_expiry()
    assert due is not None
    assert due - begun == pytest.approx(STEP_NS - FIRST_LEAD_NS, abs=MS / 10)
    service.submit("third")
    assert service.maybe_plan() is None, "another may come"
    service.now = due
    service.dispatcher.expire(due)
    assert service.dispatcher.take_woken() == ["w"]
    assert [new.request.request_id for new in service.plan().new_sequences] == ["third"]
    service.run_until_idle()


def test_a_result_is_followed_by_a_plan_at_once() -> None:
    service = learned()
    service.plan()
    assert service.maybe_plan() is None
    service.apply()  # after a microsecond
    assert service.maybe_plan() is not None
    service.run_until_idle()


def test_plans_are_made_at_once_when_nobody_has_come_for_a_second() -> None:
    service = learned()
    service.now += EXPECTED_NS
    service.plan()
    assert service.maybe_plan() is not None
    service.run_until_idle()


def test_plans_are_made_at_once_while_somebody_waits_for_room() -> None:
    service = learned()
    for number in range(4):  # the worker has four rows, and one is taken
        service.submit(f"more-{number}", max_tokens=50)
    service.plan()
    assert service.maybe_plan() is not None, "who comes now would wait behind the fourth"
    service.run_until_idle()
