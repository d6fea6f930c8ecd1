"""The dispatcher: admission verdicts, several workers, loss and return, deadlines, retention."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.dispatcher import (
    Admission,
    Admitted,
    Dispatcher,
    Failed,
    Finished,
    FinishReason,
    SchedulerConfig,
    StatusCode,
    TransferRates,
)
from tests.core.factories import CAPACITY, OneWorker, make_request
from tests.core.simulated_worker import Behaviour, SimulatedWorker, WorkerDiedError, undisturbed_output


def two_workers(**settings: object) -> Dispatcher:
    dispatcher = Dispatcher(SchedulerConfig(**settings))  # type: ignore[arg-type]
    dispatcher.add_worker("first", CAPACITY, TransferRates(), 1, 0)
    dispatcher.add_worker("second", CAPACITY, TransferRates(), 2, 0)
    return dispatcher


def worker_of(dispatcher: Dispatcher, request_id: str) -> str | None:
    group = dispatcher.find(request_id)
    assert group is not None
    return group.worker_id


def test_a_live_request_id_is_refused_and_a_finished_one_can_be_used_again() -> None:
    service = OneWorker()
    old = service.submit("a")
    assert service.dispatcher.submit(make_request("a"), 0).admission is Admission.DUPLICATE
    service.run_until_idle()
    new = service.submit("a")
    assert service.dispatcher.find("a") is new
    assert old.is_finished


def test_a_full_queue_answers_later() -> None:
    dispatcher = Dispatcher(SchedulerConfig(max_waiting=2))
    verdicts = [dispatcher.submit(make_request(str(number)), 0).admission for number in range(3)]
    assert verdicts == [Admission.OK, Admission.OK, Admission.LATER]


def test_requests_that_run_do_not_count_as_waiting() -> None:
    service = OneWorker(SchedulerConfig(max_waiting=1))
    service.submit("a")
    assert service.dispatcher.submit(make_request("b"), 0).admission is Admission.LATER
    service.plan()
    assert service.dispatcher.submit(make_request("b"), 0).admission is Admission.OK


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (make_request("a", [1] * 65), "the prompt of 65 tokens needs 17 blocks of 4 tokens for 1 sequence(s)"),
        (make_request("a", [1] * 57, n=3), "the prompt of 57 tokens needs 17 blocks of 4 tokens for 3 sequence(s)"),
        (make_request("a", n=9), "n is 9, but at most 8 sequences run at once"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(request_: object, reason: str) -> None:
    answer = OneWorker().dispatcher.submit(request_, 0)  # type: ignore[arg-type]
    assert answer.admission is Admission.NEVER
    assert answer.reason.startswith(reason)


def test_a_prompt_that_fills_the_whole_pool_runs_if_only_one_token_is_wanted() -> None:
    service = OneWorker()
    group = service.submit("a", [1] * 64, max_tokens=1)
    service.run_until_idle()
    assert len(group.sequences[0].output) == 1


@pytest.mark.parametrize("fields", [{"prompt": []}, {"n": 0}, {"max_tokens": 0}])
def test_a_request_without_sense_raises(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a request needs"):
        Dispatcher(SchedulerConfig()).submit(replace(make_request("a"), **fields), 0)


def test_without_a_worker_requests_wait_and_the_first_worker_gets_them_in_order_of_rank() -> None:
    dispatcher = Dispatcher(SchedulerConfig())
    dispatcher.submit(make_request("a"), 0)
    dispatcher.submit(make_request("urgent", priority=1), 0)
    assert dispatcher.loads().unassigned == 2
    dispatcher.add_worker("w", CAPACITY, TransferRates(), 1, 0)
    plan = dispatcher.schedule("w", 1)
    assert plan is not None
    assert [new.request.request_id for new in plan.new_sequences] == ["urgent", "a"]
    dispatcher.check_integrity()


def test_a_request_that_no_worker_can_hold_fails_when_the_worker_joins() -> None:
    dispatcher = Dispatcher(SchedulerConfig())
    group = dispatcher.submit(make_request("a", [1] * 100), 0).group
    dispatcher.add_worker("w", CAPACITY, TransferRates(), 1, 5)
    (failed,) = dispatcher.take_events()
    assert isinstance(failed, Failed)
    assert (failed.group, failed.code) == (group, StatusCode.RESOURCE_EXHAUSTED)
    assert group is not None
    assert group.sequences[0].finish is not None
    assert group.sequences[0].finish.reason is FinishReason.ERROR
    dispatcher.check_integrity()


def test_requests_go_to_the_least_loaded_worker() -> None:
    dispatcher = two_workers()
    for number, n in enumerate((3, 1, 1, 1, 1)):
        dispatcher.submit(make_request(str(number), n=n), 0)
    assert [worker_of(dispatcher, str(number)) for number in range(5)] == [
        "first",
        "second",
        "second",
        "second",
        "first",
    ]


def test_a_worker_that_joins_later_takes_its_share_of_those_who_wait() -> None:
    dispatcher = Dispatcher(SchedulerConfig())
    dispatcher.add_worker("first", CAPACITY, TransferRates(), 1, 0)
    for number in range(4):
        dispatcher.submit(make_request(str(number)), 0)
    dispatcher.add_worker("second", CAPACITY, TransferRates(), 2, 0)
    assert [worker_of(dispatcher, str(number)) for number in range(4)] == ["first", "second"] * 2
    dispatcher.check_integrity()


def test_a_worker_whose_line_was_shortened_is_asked_for_a_plan_because_another_may_be_first_in_it_now() -> None:
    dispatcher = Dispatcher(SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False))
    dispatcher.add_worker("first", CAPACITY, TransferRates(), 1, 0)
    dispatcher.submit(make_request("running", [1] * 36, max_tokens=1), 0)
    assert dispatcher.schedule("first", 0) is not None
    for name, length in (("too long for now", 40), ("short", 5), ("last", 5)):
        dispatcher.submit(make_request(name, [1] * length), 0)
    dispatcher.take_woken()
    assert dispatcher.schedule("first", 1) is None
    dispatcher.add_worker("second", CAPACITY, TransferRates(), 2, 2)
    assert worker_of(dispatcher, "too long for now") == "second"
    assert "first" in dispatcher.take_woken()
    plan = dispatcher.schedule("first", 2)
    assert plan is not None
    assert [new.request.request_id for new in plan.new_sequences] == ["short"]


def test_an_epoch_must_grow() -> None:
    dispatcher = two_workers()
    with pytest.raises(ValueError, match="epoch 2 is not above 2"):
        dispatcher.add_worker("third", CAPACITY, TransferRates(), 2, 0)


def test_a_lost_workers_requests_go_on_elsewhere_with_the_tokens_known_so_far() -> None:
    dispatcher = two_workers()
    group = dispatcher.submit(make_request("a", max_tokens=6), 0).group
    assert group is not None
    worker = SimulatedWorker(CAPACITY, 1)
    for now in range(3):
        plan = dispatcher.schedule("first", now)
        assert plan is not None
        dispatcher.apply("first", worker.execute(plan), now)
    under_way = dispatcher.schedule("first", 3)
    assert under_way is not None
    dispatcher.remove_worker("first", 4)
    assert not dispatcher.apply("first", worker.execute(under_way), 4).accepted
    assert dispatcher.schedule("first", 4) is None
    plan = dispatcher.schedule("second", 5)
    assert plan is not None
    (new,) = plan.new_sequences
    tokens, _ = undisturbed_output(group.request, 0)
    assert list(new.token_ids) == [1, 2, 3, 4, 5, *tokens[:3]]
    assert (new.prompt_tokens, new.computed_tokens, plan.epoch) == (5, 0, 2)
    other = SimulatedWorker(CAPACITY, 2)
    while plan is not None:
        dispatcher.apply("second", other.execute(plan), 6)
        plan = dispatcher.schedule("second", 6)
    assert group.sequences[0].output == tokens
    assert [type(event) for event in dispatcher.take_events()] == [Admitted, Finished]
    assert group.preemptions == 0
    assert group.recomputed_tokens == 8
    dispatcher.check_integrity()


def test_a_result_of_the_epoch_before_is_stale_after_the_same_worker_has_joined_again() -> None:
    service = OneWorker()
    group = service.submit("a", max_tokens=5)
    service.step()
    service.plan()
    old = service.execute()
    service.join(epoch=2)
    assert not service.apply(old).accepted
    service.run_until_idle()
    assert service.dispatcher.loads().stale_results_total == 1
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_what_waits_for_a_worker_can_be_cancelled_stopped_and_failed() -> None:
    service = OneWorker()
    for request_id in ("a", "b", "c"):
        service.submit(request_id, max_tokens=9)
    service.step()
    service.step()
    service.dispatcher.remove_worker("w", service.tick())
    service.dispatcher.take_events()
    assert service.dispatcher.abort("a", FinishReason.CANCELLED, 9)
    assert service.dispatcher.stop_sequence("b", 0, 1, "END", 9)
    assert service.dispatcher.fail("c", StatusCode.UNAVAILABLE, "WORKER_LOST", "no worker is left", 9, 5)
    assert not service.dispatcher.fail("c", StatusCode.UNAVAILABLE, "WORKER_LOST", "no worker is left", 9)
    cancelled, stopped, failed = service.dispatcher.take_events()
    assert isinstance(cancelled, Finished)
    assert isinstance(stopped, Finished)
    assert cancelled.sequence.finish is not None
    assert cancelled.sequence.finish.reason is FinishReason.CANCELLED
    assert len(stopped.sequence.output) == 1
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.retry_after_ns) == ("WORKER_LOST", 5)
    service.dispatcher.check_integrity()


def serve_through_deaths(service: OneWorker, limit: int = 200) -> int:
    """Runs everything to its end, with a new worker in place of each that dies; returns how many died."""
    deaths = 0
    for _ in range(limit):
        try:
            service.run_until_idle()
            return deaths
        except WorkerDiedError:
            deaths += 1
            service.dispatcher.remove_worker("w", service.tick())
            service.dispatcher.check_integrity()
            service.join(epoch=deaths + 1)
    raise AssertionError(f"workers still die after {limit} steps")


@pytest.mark.parametrize("deadly_at", [5, 6, 9])
def test_a_request_that_brings_its_worker_down_three_times_fails_and_the_others_go_on(deadly_at: int) -> None:
    service = OneWorker()
    others = [service.submit(f"before-{number}", max_tokens=20) for number in range(2)]
    poison = service.submit("poison", payload=Behaviour(deadly_at=deadly_at), max_tokens=20)
    others += [service.submit(f"after-{number}", max_tokens=20) for number in range(2)]
    assert serve_through_deaths(service) == 3
    assert isinstance(poison.failure, Failed)
    assert (poison.failure.code, poison.failure.reason) == (StatusCode.INTERNAL, "WORKER_LOST_REPEATEDLY")
    assert poison.failure.message == "the worker that ran this request was lost 3 times"
    assert [group.sequences[0].output for group in others] == [
        undisturbed_output(group.request, 0)[0] for group in others
    ]
    assert service.free_blocks == 16


def test_worker_losses_between_which_a_request_made_progress_do_not_add_up() -> None:
    service = OneWorker(num_blocks=64)
    group = service.submit("a", max_tokens=100)
    for epoch in range(2, 7):
        for _ in range(17):
            service.step()
        service.plan()
        service.dispatcher.remove_worker("w", service.tick())
        service.join(epoch)
    service.run_until_idle()
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_a_worker_loss_does_not_count_against_who_only_waited() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1, watermark=0.0, headroom=0.0))
    poison = service.submit("poison", payload=Behaviour(deadly_at=5))
    waiting = service.submit("waiting")
    for epoch in (2, 3):
        service.plan()
        service.dispatcher.remove_worker("w", service.tick())
        service.join(epoch)
    assert (poison.losses, waiting.losses) == (2, 0)


def test_a_running_request_can_be_failed_by_the_edge() -> None:
    service = OneWorker()
    service.submit("a", n=2)
    service.step()
    assert service.dispatcher.fail("a", StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER", "nobody reads", 9)
    service.dispatcher.check_integrity()
    assert service.free_blocks == 16


def test_deadlines_end_requests_in_any_state() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    running = service.submit("running", deadline=50)
    waiting = service.submit("waiting", deadline=60)
    service.submit("patient", max_tokens=2)
    service.plan()
    assert service.dispatcher.next_expiry() == 50
    service.dispatcher.expire(49)
    assert not running.is_finished
    service.dispatcher.expire(60)
    for group in (running, waiting):
        assert group.sequences[0].finish is not None
        assert group.sequences[0].finish.reason is FinishReason.DEADLINE
    service.run_until_idle()
    patient = service.dispatcher.find("patient")
    assert patient is not None
    assert len(patient.sequences[0].output) == 2


def test_a_deadline_of_an_earlier_request_does_not_end_a_later_one_of_the_same_name() -> None:
    service = OneWorker()
    service.submit("a", deadline=50, max_tokens=1)
    service.run_until_idle()
    again = service.submit("a")
    service.dispatcher.expire(50)
    assert not again.is_finished


def test_outdated_deadlines_do_not_pile_up() -> None:
    service = OneWorker()
    for number in range(300):
        service.submit(str(number), deadline=10**9, max_tokens=1)
        service.dispatcher.abort(str(number), FinishReason.CANCELLED, service.tick())
    assert len(service.dispatcher._deadlines) <= 66


def test_finished_requests_are_found_until_their_retention_is_over() -> None:
    service = OneWorker(SchedulerConfig(retention_ns=100))
    group = service.submit("a", max_tokens=1)
    service.run_until_idle()
    ended = group.finished_at
    assert ended is not None
    assert service.dispatcher.next_expiry() == ended + 100
    service.dispatcher.expire(ended + 99)
    assert service.dispatcher.find("a") is group
    service.dispatcher.expire(ended + 100)
    assert service.dispatcher.find("a") is None
    assert service.dispatcher.next_expiry() is None


def test_the_number_of_retained_requests_is_bounded() -> None:
    service = OneWorker(SchedulerConfig(max_retained=2))
    for request_id in ("a", "b", "c"):
        service.submit(request_id, max_tokens=1)
    service.run_until_idle()
    assert [service.dispatcher.find(request_id) is None for request_id in ("a", "b", "c")] == [True, False, False]


def test_events_are_taken_once_and_in_order() -> None:
    service = OneWorker()
    group = service.submit("a", max_tokens=1)
    service.run_until_idle()
    assert service.dispatcher.take_events() == [Admitted(group), Finished(group.sequences[0])]
    assert service.dispatcher.take_events() == []


def test_loads_count_what_they_say() -> None:
    service = OneWorker(SchedulerConfig(max_num_seqs=1))
    service.submit("a", [1] * 9)
    service.submit("b")
    service.step()
    loads = service.dispatcher.loads()
    (worker,) = loads.workers
    assert (loads.running, loads.waiting, loads.unassigned, loads.retained) == (1, 1, 0, 0)
    assert (worker.running_groups, worker.running_sequences, worker.waiting_groups) == (1, 1, 1)
    assert (worker.kv_blocks_used, worker.kv_blocks_free) == (3, 13)
    assert (worker.prompt_tokens_total, worker.generation_tokens_total) == (9, 1)
    assert (worker.epoch, worker.step, worker.plans_in_flight) == (1, 1, 0)
