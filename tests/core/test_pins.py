"""Pinned prefixes stay in the pool until a request fits in no other way."""

from __future__ import annotations

from scheduler.dispatcher import SchedulerConfig
from scheduler.pins import MOST
from tests.core.factories import OneWorker
from tests.core.simulated_worker import undisturbed_output

PREFIX = [7] * 12
POOL_ALONE = SchedulerConfig(watermark=0.0, headroom=0.0, host_prefix_cache=False)


def with_pin() -> OneWorker:
    """A pool of 16 blocks in which a pinned prefix of 3 has been computed."""
    service = OneWorker(POOL_ALONE)
    assert service.dispatcher.pin_prefix("", PREFIX) is None
    service.submit("first", [*PREFIX, 1], max_tokens=1)
    service.run_until_idle()
    return service


def flood(service: OneWorker, num_tokens: int) -> None:
    service.submit("flood", [9] * num_tokens, max_tokens=1)
    service.run_until_idle()


def cached_tokens(service: OneWorker) -> int:
    group = service.submit("again", [*PREFIX, 2], max_tokens=2)
    service.run_until_idle()
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]
    return group.cached_tokens


def test_a_pinned_prefix_outlives_a_flood() -> None:
    service = with_pin()
    flood(service, 52)  # all 13 blocks that are not pinned
    assert cached_tokens(service) == 12


def test_what_is_not_pinned_does_not() -> None:
    service = with_pin()
    assert service.dispatcher.unpin_prefix("", PREFIX)
    flood(service, 64)
    assert cached_tokens(service) < 12


def test_pinning_takes_effect_on_blocks_that_are_there_already() -> None:
    service = OneWorker(POOL_ALONE)
    service.submit("first", [*PREFIX, 1], max_tokens=1)
    service.run_until_idle()
    assert service.dispatcher.pin_prefix("", PREFIX) is None
    service.dispatcher.check_integrity()
    flood(service, 52)
    assert cached_tokens(service) == 12


def test_a_request_that_fits_in_no_other_way_takes_pinned_blocks() -> None:
    service = with_pin()
    group = service.submit("large", [9] * 60, max_tokens=4)
    service.run_until_idle()
    assert group.sequences[0].output == undisturbed_output(group.request, 0)[0]


def test_a_request_that_grows_over_the_rest_of_the_pool_takes_them_too() -> None:
    service = with_pin()
    group = service.submit("grows", [9] * 20, max_tokens=40)
    service.run_until_idle()
    assert group.failure is None
    assert len(group.sequences[0].output) == 40


def test_a_tenant_does_not_find_what_is_pinned_for_another() -> None:
    service = with_pin()
    group = service.submit("other", [*PREFIX, 2], max_tokens=1, tenant="other")
    service.run_until_idle()
    assert group.cached_tokens == 0


def test_a_worker_that_joins_later_pins_it_too() -> None:
    service = with_pin()
    service.join(epoch=2)
    service.submit("first", [*PREFIX, 1], max_tokens=1)
    service.run_until_idle()
    flood(service, 52)
    assert cached_tokens(service) == 12


def test_a_prefix_that_shares_blocks_with_an_unpinned_one_stays_pinned() -> None:
    service = with_pin()
    assert service.dispatcher.pin_prefix("", PREFIX[:8]) is None
    assert service.dispatcher.unpin_prefix("", PREFIX)
    flood(service, 56)
    assert cached_tokens(service) == 8


def test_pins_are_bounded_by_half_of_the_pool_and_by_number() -> None:
    service = OneWorker()
    why = service.dispatcher.pin_prefix("", [1] * 36)
    assert why == "pinned prefixes would need 9 blocks, but at most 8 of a pool may be pinned"
    for number in range(MOST):
        assert service.dispatcher.pin_prefix(str(number), [1]) is None
    assert service.dispatcher.pin_prefix("another", [1]) == "256 prefixes are pinned, which is the limit; unpin one"
    assert not service.dispatcher.unpin_prefix("never", [1])
