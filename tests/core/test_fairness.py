"""Tenants' counters, and what follows from them and from priorities: who starts, who is displaced, who is protected."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.dispatcher import SchedulerConfig
from scheduler.fairness import CREDIT, MAX_REMEMBERED, TenantTokens
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence, SequenceGroup
from scheduler.step_plan import StepPlan
from tests.core.factories import OneWorker, make_request
from tests.core.simulated_worker import undisturbed_output


def group_of(tenant: str) -> SequenceGroup:
    return SequenceGroup(make_request(tenant=tenant), 0, 0)


def started(plans: list[StepPlan]) -> list[str]:
    return [new.request.request_id for plan in plans for new in plan.new_sequences]


def core(service: OneWorker) -> Scheduler:
    return service.dispatcher._schedulers["w"]


# ---- the counters


def test_output_tokens_cost_twice_what_prompt_tokens_cost() -> None:
    tenants = TenantTokens()
    a, b = group_of("a"), group_of("b")
    tenants.enter(a)
    tenants.enter(b)
    tenants.charge_prompt(a, 100)
    tenants.charge_decodes([*a.sequences, *a.sequences, *b.sequences])
    assert (tenants.served(a), tenants.served(b)) == (-1 + 104, -2 + 2)


def test_who_was_away_is_ahead_of_the_others_by_the_credit_at_most() -> None:
    tenants = TenantTokens()
    a, b, sleeper = group_of("a"), group_of("b"), group_of("sleeper")
    for group in (a, b, sleeper):
        tenants.enter(group)
    tenants.charge_prompt(a, 10 * CREDIT)
    tenants.charge_prompt(b, 11 * CREDIT)
    tenants.enter(sleeper)  # another request of a tenant that has had little
    assert tenants.served(sleeper) == tenants.served(a) - CREDIT


def test_a_new_tenant_goes_before_the_others_without_having_saved_anything() -> None:
    tenants = TenantTokens()
    old, new = group_of("old"), group_of("new")
    tenants.enter(old)
    tenants.charge_prompt(old, 10 * CREDIT)
    tenants.enter(new)
    assert tenants.served(new) == tenants.served(old) - 1


def test_who_leaves_and_comes_back_keeps_its_bill() -> None:
    tenants = TenantTokens()
    a, b = group_of("a"), group_of("b")
    tenants.enter(a)
    tenants.enter(b)
    tenants.charge_prompt(a, 5000)
    bill = tenants.served(a)
    tenants.leave(a)
    tenants.enter(a)
    assert tenants.served(a) == bill


def test_a_tenant_is_charged_while_the_others_are_away_for_a_moment() -> None:
    tenants = TenantTokens()
    a, b = group_of("a"), group_of("b")
    tenants.enter(a)
    assert not tenants.is_charged
    tenants.enter(b)
    tenants.leave(b)
    assert tenants.is_charged
    tenants.leave(a)
    tenants.enter(a)
    assert not tenants.is_charged, "an idle worker owes nobody anything"


def test_tenants_that_come_and_go_are_not_remembered_without_end() -> None:
    tenants = TenantTokens()
    tenants.enter(group_of("stays"))
    for number in range(3 * MAX_REMEMBERED):
        group = group_of(str(number))
        tenants.enter(group)
        tenants.leave(group)
    assert len(tenants._remembered) == MAX_REMEMBERED


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_books_balance_whatever_comes_goes_and_is_charged(seed: int) -> None:
    dice, tenants, groups = random.Random(seed), TenantTokens(), []
    for _ in range(100):
        if groups and dice.random() < 0.45:
            tenants.leave(groups.pop(dice.randrange(len(groups))))
        else:
            groups.append(group_of(dice.choice("abcd")))
            tenants.enter(groups[-1])
        if groups and tenants.is_shared:
            tenants.charge_prompt(dice.choice(groups), dice.randint(0, 3 * CREDIT))
            decoding: list[Sequence] = [sequence for group in groups for sequence in group.sequences]
            tenants.charge_decodes(decoding)
        tenants.check_integrity(groups)


# ---- who starts


def test_a_flood_does_not_hold_up_another_tenant() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=2, watermark=0.0, headroom=0.0, prefix_cache=False), num_blocks=64)
    for number in range(8):
        service.submit(f"flood-{number}", tenant="heavy", max_tokens=20)
    service.step()
    service.submit("light", tenant="light", max_tokens=3)
    order = started(service.run_until_idle())
    assert order[0] == "light"


def test_two_floods_are_served_by_turns() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1, prefix_cache=False), num_blocks=64)
    for number in range(4):
        service.submit(f"a{number}", tenant="a", max_tokens=6)
    for number in range(4):
        service.submit(f"b{number}", tenant="b", max_tokens=6)
    tenants = [name[0] for name in started(service.run_until_idle())]
    assert sorted(tenants) == ["a"] * 4 + ["b"] * 4
    assert all(abs(tenants[:end].count("a") - tenants[:end].count("b")) <= 1 for end in range(9))


def test_a_light_tenants_prompt_does_not_share_its_step_with_those_of_a_flood() -> None:
    service = OneWorker(SchedulerConfig(prefix_cache=False), num_blocks=128, max_slots=16)
    for number in range(10):
        service.submit(f"flood-{number}", tenant="heavy", max_tokens=20)
    service.submit("first", [1], tenant="light")
    for _ in range(3):
        service.step()
    service.submit("late", tenant="heavy")
    service.submit("light", tenant="light")
    assert started([service.step()]) == ["light"]
    assert started([service.step()]) == ["late"]
    service.run_until_idle()


def test_one_tenant_alone_is_served_in_order_of_arrival() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    for name in "abc":
        service.submit(name, tenant="only", max_tokens=2)
    assert started(service.run_until_idle()) == ["a", "b", "c"]


# ---- who is displaced


def test_a_higher_priority_displaces_a_running_lower_one_in_the_same_step() -> None:
    service = OneWorker(
        SchedulerConfig(max_num_seqs=2, watermark=0.0, headroom=0.0, preemption_mode="swap", prefix_cache=False)
    )
    service.submit("old", max_tokens=20)
    low = service.submit("low", max_tokens=20)
    service.step()
    service.step()
    urgent = service.submit("urgent", priority=1, max_tokens=3)
    plan = service.step()
    assert started([plan]) == ["urgent"]
    assert len(plan.swap_out) == len(low.sequences[0].table) == 2
    assert low.preemptions == 1
    service.run_until_idle()
    assert urgent.finished_at is not None
    assert low.finished_at is not None
    assert urgent.finished_at < low.finished_at
    assert low.sequences[0].output == undisturbed_output(low.request, 0)[0]


def test_an_equal_priority_of_the_same_tenant_displaces_nobody() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    first = service.submit("first", max_tokens=20)
    service.step()
    service.submit("second")
    assert started(service.run_until_idle()) == ["second"]
    assert first.preemptions == 0


def test_nobody_is_displaced_for_a_claim_that_would_not_fit_even_then() -> None:
    service = OneWorker(SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False), num_blocks=16)
    service.submit("high", [1] * 40, priority=2, max_tokens=24)
    low = service.submit("low", max_tokens=8)
    service.step()
    service.submit("claims", [2] * 30, priority=1)
    while not low.is_finished:
        service.step()
    assert low.preemptions == 0


def test_a_preempted_group_does_not_take_the_room_that_a_higher_priority_waits_for() -> None:
    config = SchedulerConfig(watermark=0.0, headroom=0.0, preemption_mode="recompute", prefix_cache=False)
    service = OneWorker(config, num_blocks=12)
    high = service.submit("high", [1] * 31, priority=1, max_tokens=12)
    low = service.submit("low", [2] * 11, max_tokens=12)
    while not low.preemptions:
        service.step()
    service.submit("waits", [3] * 20, priority=1, max_tokens=2)
    order = []
    while not high.is_finished:
        order += started([service.step()])
    assert order == []  # low would fit, but then the other would have to wait for it
    assert started(service.run_until_idle()) == ["waits", "low"]


def test_a_light_tenant_takes_a_row_from_a_heavy_one_and_not_back() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=4, prefix_cache=False), num_blocks=64)
    heavy = [service.submit(f"h{number}", tenant="heavy", max_tokens=30) for number in range(6)]
    service.step()
    service.step()
    light = [service.submit(f"l{number}", tenant="light", max_tokens=30) for number in range(3)]
    for _ in range(6):
        service.step()
    running = list(core(service).running)
    assert heavy[3].preemptions == 1
    assert light[0] in running
    assert sum(group.request.tenant == "light" for group in running) == 1  # a second would leave heavy less than twice
    service.run_until_idle()
    assert max(group.preemptions for group in light) == 0


def test_whoever_was_displaced_often_enough_runs_to_its_end() -> None:
    config = SchedulerConfig(max_num_seqs=1, max_preemptions=3, prefix_cache=False)
    service = OneWorker(config, num_blocks=64)
    low = service.submit("low", max_tokens=30)
    for number in range(5):
        for _ in range(3):
            service.step()
        service.submit(f"urgent-{number}", priority=1, max_tokens=2)
    order = started(service.run_until_idle())
    assert low.preemptions == 2
    assert order == ["urgent-2", "urgent-3", "urgent-4"]  # they waited for it
    assert low.sequences[0].output == undisturbed_output(low.request, 0)[0]
