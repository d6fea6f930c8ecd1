"""Requests whose deadline cannot be met are refused before they run, and earlier deadlines go first."""

from __future__ import annotations

from scheduler.dispatcher import Admission, Failed, SchedulerConfig, StatusCode, TransferRates
from scheduler.sequence import PATIENCE_NS, FinishReason
from tests.core.factories import OneWorker, make_request

MS = 1_000_000
RATES = TransferRates(prefill_tokens_per_second=1000)  # a millisecond per prompt token


def one_at_a_time() -> OneWorker:
    return OneWorker(SchedulerConfig(max_num_seqs=1, watermark=0.0), RATES, num_blocks=100, max_step_tokens=64)


def test_a_prompt_that_takes_longer_than_there_is_time_is_refused_by_name() -> None:
    service = one_at_a_time()
    answer = service.dispatcher.submit(make_request("a", [1] * 40, deadline=20 * MS), 0)
    assert (answer.admission, answer.group) == (Admission.TOO_LATE, None)
    assert answer.reason == "the deadline is in 20 ms, but the request needs 32 ms at least"
    assert service.dispatcher.find("a") is None
    assert service.dispatcher.submit(make_request("b", [1] * 40, deadline=40 * MS), 0).group is not None


def test_nobody_is_refused_while_no_rate_is_known() -> None:
    service = OneWorker(num_blocks=100)
    assert service.dispatcher.submit(make_request("a", [1] * 40, deadline=2), 0).group is not None


def test_what_the_prefix_cache_holds_need_not_be_computed() -> None:
    service = one_at_a_time()
    service.submit("first", [1] * 40, max_tokens=1)  # takes 40 us
    service.run_until_idle()
    known = service.dispatcher.submit(make_request("known", [1] * 40, deadline=20_000), 0)
    new = service.dispatcher.submit(make_request("new", [2] * 40, deadline=20_000), 0)
    assert (known.admission, new.admission) == (Admission.OK, Admission.TOO_LATE)


def test_tokens_that_are_asked_for_at_least_take_a_step_each() -> None:
    service = one_at_a_time()
    service.submit("a", max_tokens=50)
    service.run_until_idle()  # now it is known that a step takes a microsecond per token
    few = make_request("few", max_tokens=500, deadline=service.now + 40_000)
    many = make_request("many", max_tokens=500, min_tokens=500, deadline=service.now + 40_000)
    assert service.dispatcher.submit(many, service.now).admission is Admission.TOO_LATE
    assert service.dispatcher.submit(few, service.now).admission is Admission.OK


def test_who_waits_is_refused_at_the_last_moment_at_which_it_could_have_started() -> None:
    service = one_at_a_time()
    service.submit("running", max_tokens=50)
    service.plan()
    group = service.dispatcher.submit(make_request("waiting", [1] * 40, deadline=100 * MS), service.now).group
    assert group is not None
    assert service.dispatcher.next_expiry() == 68 * MS
    service.dispatcher.expire(68 * MS - 1)
    assert not group.is_finished
    service.dispatcher.expire(68 * MS + 1)
    failed = service.dispatcher.take_events()[-1]
    assert isinstance(failed, Failed)
    assert (failed.group, failed.code) == (group, StatusCode.DEADLINE_EXCEEDED)
    assert failed.reason == "DEADLINE_UNREACHABLE"
    service.dispatcher.check_integrity()


def test_who_has_started_in_time_has_until_its_deadline() -> None:
    service = one_at_a_time()
    group = service.dispatcher.submit(make_request("a", [1] * 40, max_tokens=50, deadline=100 * MS), 0).group
    assert group is not None
    service.plan()
    service.dispatcher.expire(99 * MS)
    assert not group.is_finished
    assert service.dispatcher.next_expiry() == 100 * MS
    service.dispatcher.expire(100 * MS)
    assert group.sequences[0].finish is not None
    assert group.sequences[0].finish.reason is FinishReason.DEADLINE
    service.dispatcher.check_integrity()


def test_the_earlier_deadline_starts_first_within_a_priority() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    service.submit("running", max_tokens=2)
    service.plan()
    service.submit("late", deadline=9000 * MS)
    service.submit("none")
    service.submit("soon", deadline=5000 * MS)
    service.submit("high", priority=1)
    started = [new.request.request_id for plan in service.run_until_idle() for new in plan.new_sequences]
    assert started == ["high", "running", "soon", "late", "none"]


def test_deadlines_do_not_pass_for_ever_who_has_none() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    service.submit("running", max_tokens=2)
    service.plan()
    service.submit("patient")
    service.now = PATIENCE_NS
    service.submit("soon", deadline=PATIENCE_NS + 5000 * MS)
    started = [new.request.request_id for plan in service.run_until_idle() for new in plan.new_sequences]
    assert started == ["patient", "soon"]
