"""Who counts as a light tenant, and what is kept short for it: the others' chunks, and the time for which a plan that
has been made stands before its request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatcher import SchedulerConfig
from scheduler.light_tenants import GUARD_NS, HALF_LIFE_NS, LIGHT, LOOK_NS, Demand, heavy_budget
from scheduler.plan_ahead import FIRST_LEAD_NS
from scheduler.step_time import LEAST_CHUNK, StepTime
from tests.core.factories import OneWorker
from tests.core.simulated_worker import undisturbed_output

MS = 1_000_000


# ---- who is light


def test_a_tenant_is_light_beside_one_that_was_charged_four_times_as_much() -> None:
    demand = Demand()
    assert not demand.is_light("new"), "nobody is heavy"
    demand.charge("heavy", 100 * LIGHT)
    demand.charge("a", 100)
    demand.charge("b", 101)
    assert [demand.is_light(tenant) for tenant in ("heavy", "a", "b", "new")] == [False, True, False, True]


def test_what_was_charged_long_ago_no_longer_counts() -> None:
    demand = Demand()
    demand.look(0, ())
    demand.charge("once heavy", 1000)
    demand.charge("a", 100)
    assert demand.is_light("a")
    demand.look(3 * HALF_LIFE_NS, ())
    demand.charge("a", 100)
    assert not demand.is_light("a")
    demand.look(100 * HALF_LIFE_NS, ())
    demand.charge("b", 1)
    assert not demand.is_light("b")


def test_a_light_tenant_is_expected_back_for_a_minute() -> None:
    demand, both = Demand(), ("heavy", "light")
    demand.charge("heavy", 1000)
    demand.look(0, ("heavy",))
    assert not demand.is_guarded, "a tenant that is alone has nobody to be careful of"
    demand.came("light")
    demand.look(1, both)
    assert demand.is_guarded
    demand.look(GUARD_NS, ("heavy",))
    assert demand.is_guarded
    demand.look(GUARD_NS + 1, ("heavy",))
    assert not demand.is_guarded


def test_a_tenant_that_becomes_light_while_it_is_there_is_seen_soon() -> None:
    demand, both = Demand(), ("a", "b")
    demand.look(0, both)
    demand.charge("a", 100)
    demand.charge("b", 100)
    demand.look(LOOK_NS, both)
    assert not demand.is_guarded, "two equal tenants"
    demand.charge("a", 1000)
    demand.look(2 * LOOK_NS, both)
    assert demand.is_guarded


# ---- the others' chunks

LEARNED = StepTime()
for decodes in (8, 64, 200):
    for _ in range(20):
        LEARNED.observe(decodes, 0, 5 * MS + decodes * 30_000)
        LEARNED.observe(decodes, 512, 5 * MS + decodes * 30_000 + 512 * 25_000)


@given(st.integers(1, 4096), st.integers(0, 100_000), st.integers(0, 256), st.sampled_from([LEARNED, StepTime()]))
def test_heavy_prompts_always_go_on_and_never_beyond_the_step(
    left: int, backlog: int, decodes: int, known: StepTime
) -> None:
    budget = heavy_budget(left, backlog, decodes, known)
    assert min(left, LEAST_CHUNK) <= budget <= left


def test_heavy_prompts_make_a_step_half_as_long_again_or_are_spread_and_double_it_at_most() -> None:
    alone = LEARNED.ns(200, 0)
    few, some, many = (heavy_budget(2048, backlog, 200, LEARNED) for backlog in (100, 2400, 1 << 20))
    assert LEARNED.ns(200, few) == pytest.approx(1.5 * alone, rel=0.01)
    assert some == 300
    assert LEARNED.ns(200, many) == pytest.approx(2 * alone, rel=0.01)
    assert heavy_budget(2048, 1 << 20, 200, StepTime()) == 2048, "no time is known"


# ---- the step that is planned behind the one that runs


def step(service: OneWorker) -> None:
    """One step that takes 20 ms."""
    service.plan()
    result = service.execute()
    service.now += 20 * MS
    service.apply(replace(result, timings=replace(result.timings, forward_ns=20 * MS)))


def beside_a_flood(tenant: str | None = None, **settings: Any) -> OneWorker:
    """A worker on which a flood is decoding, and a request of another tenant, if one is given."""
    sizes = {"num_blocks": 1024, "max_slots": 32, "max_step_tokens": 64}
    service = OneWorker(SchedulerConfig(prefix_cache=False, **settings), **sizes)
    for number in range(16):
        service.submit(f"flood-{number}", tenant="heavy", max_tokens=100)
    if tenant:
        service.submit("first", [1], max_tokens=90, tenant=tenant)
    for _ in range(60):
        step(service)
    return service


def test_a_plan_waits_for_a_light_tenants_request_until_the_worker_needs_it() -> None:
    service = beside_a_flood("light")
    begun = service.now
    service.plan()
    assert service.maybe_plan() is None
    due = service.dispatcher.next_expiry()
    assert due is not None
    assert abs(due - begun - (20 * MS - FIRST_LEAD_NS)) < 0.1 * MS
    service.dispatcher.take_woken()
    service.dispatcher.expire(due - 1)
    assert not service.dispatcher.has_woken
    service.dispatcher.expire(due)
    assert service.dispatcher.take_woken() == ["w"]
    service.now = due
    assert service.maybe_plan() is not None
    assert service.dispatcher.next_expiry() is None
    service.run_until_idle()


def test_a_light_tenants_request_that_comes_meanwhile_is_in_that_plan() -> None:
    service = beside_a_flood("light")
    service.plan()
    assert service.maybe_plan() is None
    service.submit("of the heavy one", tenant="heavy")
    assert service.maybe_plan() is None
    service.submit("second", tenant="light")
    plan = service.plan()
    assert [new.request.request_id for new in plan.new_sequences] == ["second"]
    service.run_until_idle()


def test_a_result_is_followed_by_a_plan_whatever_was_predicted() -> None:
    service = beside_a_flood("light")
    service.plan()
    assert service.maybe_plan() is None
    service.apply()  # after a microsecond
    assert service.maybe_plan() is not None
    service.run_until_idle()


def test_plans_are_made_as_early_as_can_be_where_no_light_tenant_is_and_nobody_has_come_for_a_second() -> None:
    for tenant in (None, "heavy"):
        service = beside_a_flood(tenant)
        service.plan()
        assert service.maybe_plan() is not None
        service.run_until_idle()


# ---- the light tenant's prompt has its step to itself


def test_the_decode_set_sits_out_the_step_of_a_light_tenants_prompt() -> None:
    service = beside_a_flood("light")
    decoding = [sequence.slot for sequence in service.dispatcher._schedulers["w"].decoding]
    assert len(decoding) == 17
    flood = list(service.dispatcher._schedulers["w"].running)
    second = service.submit("second", [2] * 40, tenant="light")
    service.submit("of the heavy one", tenant="heavy")
    alone = service.plan()
    service.apply()
    together = service.plan()
    assert (alone.decode_remove, alone.decode_add, alone.chunk_tokens) == (decoding, [], [40])
    assert together.decode_add == [*decoding, *alone.chunk_slots]
    assert together.chunk_tokens == [5], "the heavy tenant's next prompt"
    service.run_until_idle()
    for group in (second, *flood):
        assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_the_first_request_of_a_light_tenant_has_its_step_to_itself_although_nobody_shared_the_worker_before() -> None:
    service = beside_a_flood()
    service.submit("first", [2] * 40, tenant="light")
    plan = service.plan()
    assert plan.decode_remove
    assert plan.chunk_tokens == [40]
    service.run_until_idle()


def test_it_never_sits_out_two_steps_in_a_row() -> None:
    service = beside_a_flood("light")
    service.submit("long", [2] * 300, tenant="light")
    plans = [service.plan(), service.plan()]
    for _ in range(2):
        service.apply()
        plans.append(service.plan())
    assert [bool(plan.decode_remove) for plan in plans] == [True, False, True, False]
    assert [sum(plan.chunk_tokens) for plan in plans] == [64, 64 - 17, 64, 64 - 17]
    service.run_until_idle()


def test_it_sits_out_nothing_where_the_time_between_two_tokens_has_a_target() -> None:
    service = beside_a_flood("light", target_itl_ns=30 * MS)
    service.submit("second", [2] * 40, tenant="light")
    plan = service.plan()
    assert plan.chunk_slots
    assert not plan.decode_remove
    service.run_until_idle()


def test_a_light_tenants_prompt_that_finds_no_room_stops_nobody() -> None:
    service = beside_a_flood("light", max_num_seqs=17, max_preemptions=1)
    service.submit("second", [2] * 40, tenant="light")
    plan = service.plan()
    assert not plan.decode_remove
    assert not plan.chunk_slots
    service.run_until_idle()
