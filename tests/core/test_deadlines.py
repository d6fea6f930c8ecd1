"""Requests whose deadline cannot be met are refused before they run, earlier deadlines go first, and one that passes
frees everything, in whatever state its request is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from scheduler.dispatcher import (
    Admission,
    Continuation,
    Failed,
    ParkingVerdict,
    SchedulerConfig,
    StatusCode,
    TransferRates,
)
from scheduler.policy import PreemptionMode
from scheduler.sequence import PATIENCE_NS, FinishReason, SequenceGroup, SequenceStatus
from tests.core.factories import OneWorker, make_request

MS = 1_000_000
RATES = TransferRates(prefill_tokens_per_second=1000)  # a millisecond per prompt token


def one_at_a_time() -> OneWorker:
    return OneWorker(
        SchedulerConfig(max_num_seqs=1, watermark=0.0, headroom=0.0), RATES, num_blocks=100, max_step_tokens=64
    )


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


# ---- a deadline that passes, in every state

DUE = 10**12
WAITING, PREFILLING, RUNNING = SequenceStatus.WAITING, SequenceStatus.PREFILLING, SequenceStatus.RUNNING
ENDING, SWAPPED, PREEMPTED = SequenceStatus.ENDING, SequenceStatus.SWAPPED, SequenceStatus.PREEMPTED
SEARCH = {"n": 2, "beam_width": 3, "max_tokens": 20}


def steps(count: int) -> Callable[[OneWorker], None]:
    def run(service: OneWorker) -> None:
        for _ in range(count):
            service.step()

    return run


def under_way(count: int) -> Callable[[OneWorker], None]:
    """Plans without results."""

    def run(service: OneWorker) -> None:
        for _ in range(count):
            service.plan()

    return run


def displaced(service: OneWorker) -> None:
    """After three steps it gives way to a request of a higher priority."""
    steps(3)(service)
    service.submit("urgent", n=4, priority=1, max_tokens=30)
    service.plan()


def displaced_search_with_its_offers(service: OneWorker) -> None:
    """The result of its last step comes after it has given way: beams are forked where they are then."""
    displaced(service)
    while service.pending:
        service.apply()


def continued(tokens: list[int]) -> Callable[[OneWorker], None]:
    """It has been parked, its KV is in the arena, and it waits in line behind a request that takes all rows."""

    def run(service: OneWorker) -> None:
        steps(3)(service)
        assert service.dispatcher.park("a", 0, service.tick()) is ParkingVerdict.OK
        service.submit("urgent", n=4, priority=1, max_tokens=30)
        service.step()
        resumed = service.dispatcher.resume("a", Continuation(tokens=tokens, deadline=DUE), service.tick())
        assert resumed.verdict is ParkingVerdict.OK
        service.plan()

    return run


@dataclass(frozen=True)
class State:
    """How a request gets somewhere, and where its sequences are then."""

    reach: Callable[[OneWorker], None]
    statuses: set[SequenceStatus]
    fields: dict[str, Any] = field(default_factory=dict)
    mode: PreemptionMode = "swap"
    rows_taken: bool = False  # by another request, before it comes
    uses_arena: bool = False


STATES = {
    "waiting": State(steps(1), {WAITING}, rows_taken=True),
    "prefilling": State(steps(1), {PREFILLING}, {"prompt": [1] * 20}),
    "prefilling, and a step under way": State(under_way(2), {PREFILLING}, {"prompt": [1] * 20}),
    "running": State(steps(3), {RUNNING}),
    "running, and two steps under way": State(under_way(2), {RUNNING}),
    "samples": State(steps(3), {RUNNING}, {"n": 3}),
    "its last token under way": State(under_way(2), {ENDING}, {"max_tokens": 2}),
    "swapped": State(displaced, {SWAPPED}, uses_arena=True),
    "preempted": State(displaced, {PREEMPTED}, mode="recompute"),
    "swapped samples": State(displaced, {SWAPPED}, {"n": 3}, uses_arena=True),
    "a search whose prompt is under way": State(under_way(1), {RUNNING, PREFILLING}, SEARCH),
    "a search": State(steps(4), {RUNNING}, SEARCH),
    "a swapped search": State(displaced, {SWAPPED}, SEARCH, uses_arena=True),
    "a swapped search that has moved on": State(displaced_search_with_its_offers, {SWAPPED}, SEARCH, uses_arena=True),
    "a search to be recomputed": State(displaced, {PREEMPTED}, SEARCH, mode="recompute"),
    "continued as it was": State(continued([]), {SWAPPED}, uses_arena=True),
    "continued behind input": State(continued([7, 8, 9]), {WAITING}, uses_arena=True),
}


@pytest.mark.parametrize("name", STATES)
def test_a_deadline_that_passes_frees_everything_at_once_and_rows_with_the_next_plan(name: str) -> None:
    state = STATES[name]
    config = SchedulerConfig(
        watermark=0.0, headroom=0.0, token_budget=8, preemption_mode=state.mode, prefix_cache=False
    )
    service = OneWorker(config, max_slots=4)
    if state.rows_taken:
        service.submit("first", n=4, max_tokens=30)
    group = service.submit("a", **{"max_tokens": 20, "deadline": DUE} | state.fields)
    state.reach(service)
    assert {sequence.status for sequence in group.sequences} == state.statuses
    assert (service.dispatcher.loads().workers[0].host_blocks_used > 0) == state.uses_arena
    service.now = DUE - 1
    service.dispatcher.expire(DUE - 1)
    assert not group.is_finished
    assert service.dispatcher.next_expiry() == DUE
    service.dispatcher.expire(DUE)
    service.dispatcher.check_integrity()
    check_gone(service, group)
    with_its_tokens = [token for sequence in group.sequences for token in sequence.output]
    while service.pending:
        assert not [sequence for sequence in service.apply().sequences if sequence.group is group]
    assert [token for sequence in group.sequences for token in sequence.output] == with_its_tokens
    service.submit("next", max_tokens=1)
    service.step()  # the plan that releases rows
    assert all(row.request is not group.request for row in service.worker.rows.values())
    service.run_until_idle()
    check_gone(service, group)
    (load,) = service.dispatcher.loads().workers
    assert (load.kv_blocks_used, load.host_blocks_used) == (0, 0)


def check_gone(service: OneWorker, group: SequenceGroup) -> None:
    for sequence in group.sequences:
        assert sequence.finish is not None
        assert sequence.finish.reason is FinishReason.DEADLINE
        assert sequence.table.blocks == []
    assert service.dispatcher.loads().workers[0].host_blocks_used == 0


def test_in_a_full_batch_with_others_waiting_a_token_takes_as_long_as_it_takes_there() -> None:
    service = OneWorker(
        SchedulerConfig(max_num_seqs=8, watermark=0.0, headroom=0.0), RATES, num_blocks=200, max_step_tokens=64
    )
    for number in range(11):
        service.submit(f"flood-{number}", max_tokens=40)
        for _ in range(3):
            service.step()  # a microsecond per token
    request = make_request("long", max_tokens=500, min_tokens=500, deadline=service.now + 2_000_000)
    assert service.dispatcher.submit(request, service.now).admission is Admission.TOO_LATE, "8 us per token"
    for number in range(8, 11):
        service.dispatcher.abort(f"flood-{number}", FinishReason.CANCELLED, service.now)
    assert service.dispatcher.submit(request, service.now).admission is Admission.OK, "the others may end soon"
