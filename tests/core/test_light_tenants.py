"""Who counts as a light tenant, and what is kept short for it: the others' chunks, and the time for which a plan that
has been made stands before its request."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatcher import SchedulerConfig
from scheduler.light_tenants import GUARD_NS, HALF_LIFE_NS, LEAD_NS, LIGHT, LOOK_NS, Demand, heavy_budget
from scheduler.step_time import LEAST_CHUNK, StepTime
from tests.core.factories import OneWorker

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


def test_heavy_prompts_are_spread_over_steps_and_double_a_step_at_most() -> None:
    assert heavy_budget(2048, 1000, 200, LEARNED) == 125
    alone = LEARNED.ns(200, 0)
    assert LEARNED.ns(200, heavy_budget(2048, 1 << 20, 200, LEARNED)) <= 2.01 * alone
    assert heavy_budget(2048, 1 << 20, 200, StepTime()) == 2048, "no time is known"


# ---- the step that is planned behind the one that runs


def step(service: OneWorker) -> None:
    """One step that takes 20 ms."""
    service.plan()
    result = service.execute()
    service.now += 20 * MS
    service.apply(replace(result, timings=replace(result.timings, forward_ns=20 * MS)))


def beside_a_flood(tenant: str | None = None) -> OneWorker:
    """A worker on which a flood is decoding, and a request of another tenant, if one is given."""
    service = OneWorker(SchedulerConfig(prefix_cache=False), num_blocks=256, max_slots=32, max_step_tokens=256)
    for number in range(16):
        service.submit(f"flood-{number}", tenant="heavy", max_tokens=40)
    if tenant:
        service.submit("first", [1], max_tokens=16, tenant=tenant)
    for _ in range(12):
        step(service)
    return service


def test_a_plan_waits_for_a_light_tenants_request_until_the_worker_needs_it() -> None:
    service = beside_a_flood("light")
    begun = service.now
    service.plan()
    assert service.maybe_plan() is None
    due = service.dispatcher.next_expiry()
    assert due is not None
    assert abs(due - begun - (20 * MS - 2.5 * MS)) < 0.1 * MS, "an eighth of the step before its end"
    assert 2.5 * MS > LEAD_NS
    service.dispatcher.take_woken()
    service.dispatcher.expire(due - 1)
    assert service.dispatcher.take_woken() == []
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


def test_plans_are_made_as_early_as_can_be_where_no_light_tenant_is() -> None:
    for tenant in (None, "heavy"):
        service = beside_a_flood(tenant)
        service.plan()
        assert service.maybe_plan() is not None
        service.run_until_idle()
