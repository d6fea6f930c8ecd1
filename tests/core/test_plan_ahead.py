"""When a plan is made: shortly before the worker needs it while requests keep coming, at once while none does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.dispatcher import SchedulerConfig
from scheduler.plan_ahead import EXPECTED_NS, FIRST_LEAD_NS, LEAST_LEAD_NS, PlanAhead
from scheduler.step_plan import StepTimings
from tests.core.factories import OneWorker

MS = 1_000_000
STEP_NS = 20 * MS


def steps(ahead: PlanAhead, count: int, *, has_chunks: bool = False, **timings: int) -> None:
    """Steps of 20 ms; the plan of each is made when the one before it begins."""
    for _ in range(count):
        ahead.planned(STEP_NS, 0, 0, has_chunks=has_chunks)
        ahead.planned(STEP_NS, 0, 0, has_chunks=has_chunks)
        for _ in range(2):
            ahead.applied(0, StepTimings(forward_ns=STEP_NS, **timings))


def test_the_lead_becomes_what_plans_need_and_a_little_more() -> None:
    for early_ms in (14, 18):
        ahead = PlanAhead()
        steps(ahead, 500, early_ns=early_ms * MS)
        needed = STEP_NS - early_ms * MS
        assert needed * 0.99 < ahead.lead_ns[False] < needed * 1.25
        assert ahead.lead_ns[True] == FIRST_LEAD_NS, "nothing was behind chunks"


def test_a_plan_that_the_device_waited_for_makes_it_longer_by_a_quarter_at_most() -> None:
    ahead = PlanAhead()
    steps(ahead, 1, idle_ns=1000 * MS)
    assert ahead.lead_ns[False] == FIRST_LEAD_NS * 5 // 4


def test_it_has_a_least_value() -> None:
    ahead = PlanAhead()
    steps(ahead, 2000, early_ns=STEP_NS)
    assert ahead.lead_ns[False] == LEAST_LEAD_NS


def test_behind_a_step_with_chunks_it_is_another_one() -> None:
    ahead = PlanAhead()
    steps(ahead, 1, has_chunks=True, idle_ns=5 * MS)
    assert ahead.lead_ns == {False: FIRST_LEAD_NS, True: FIRST_LEAD_NS * 5 // 4}
    assert ahead.due == -ahead.lead_ns[True]


def test_a_plan_behind_nothing_or_behind_a_step_of_unknown_time_says_nothing() -> None:
    ahead = PlanAhead()
    for step_ns in (STEP_NS, 0):
        ahead.planned(step_ns, 0, 0)
        ahead.applied(0, StepTimings(idle_ns=50 * MS))
    ahead.planned(0, 0, 0)
    ahead.planned(STEP_NS, 0, 0)
    for _ in range(2):
        ahead.applied(0, StepTimings(idle_ns=50 * MS))
    assert ahead.lead_ns == {False: FIRST_LEAD_NS, True: FIRST_LEAD_NS}


def test_what_a_timer_is_late_by_counts_as_needed() -> None:
    ahead = PlanAhead()
    ahead.planned(STEP_NS, 0, 0)
    ahead.planned(STEP_NS, 18 * MS, 16 * MS)
    for _ in range(2):
        ahead.applied(0, StepTimings(forward_ns=STEP_NS, early_ns=500_000))
    assert ahead.lead_ns[False] == 4 * MS - 500_000


def test_the_end_of_what_is_in_flight_is_counted_anew_from_a_result() -> None:
    ahead = PlanAhead()
    ahead.planned(80 * MS, 0, 0)
    assert ahead.due == 80 * MS - FIRST_LEAD_NS
    ahead.planned(8 * MS, 1 * MS, 1 * MS)
    assert ahead.due == 88 * MS - FIRST_LEAD_NS
    ahead.applied(90 * MS, StepTimings(forward_ns=80 * MS))
    assert ahead.due == 98 * MS - FIRST_LEAD_NS


def test_another_request_is_expected_for_some_of_the_gaps_between_the_last_ones() -> None:
    ahead = PlanAhead()
    ahead.came(0)
    assert not ahead.expects(1), "one alone says nothing"
    for number in range(1, 20):
        ahead.came(number * 50 * MS)
    last = 19 * 50 * MS
    assert ahead.expects(last + 399 * MS)
    assert not ahead.expects(last + 400 * MS)
    for number in range(1, 20):
        ahead.came(last + number * 200 * MS)
    last += 19 * 200 * MS
    assert ahead.expects(last + EXPECTED_NS - 1)
    assert not ahead.expects(last + EXPECTED_NS), "not for ever"


def test_behind_a_burst_nobody_is_expected_for_long() -> None:
    ahead = PlanAhead()
    for burst in (0, 5000 * MS):
        for number in range(8):
            ahead.came(burst + number)
        assert ahead.expects(burst + 99 * MS)
        assert not ahead.expects(burst + 101 * MS)


def test_requests_that_come_one_at_a_time_and_seldom_do_not_make_plans_late() -> None:
    ahead = PlanAhead()
    for number in range(20):
        ahead.came(number * 260 * MS)
        assert not ahead.expects(number * 260 * MS + 4 * MS)


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
