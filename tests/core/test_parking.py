"""Parked and held requests: what the arena keeps of them, with or without an arena, and until when."""

from __future__ import annotations

import pytest

from scheduler.dispatcher import Continuation, ParkingVerdict, SchedulerConfig
from scheduler.sequence import FinishReason
from tests.core.factories import OneWorker
from tests.core.simulated_worker import undisturbed_output


def test_a_parked_request_whose_time_is_over_gives_the_arena_back_without_a_step() -> None:
    service = OneWorker()
    parked = service.submit("parked", max_tokens=20, deadline=10**12)
    for _ in range(4):
        service.step()
    assert service.dispatcher.park("parked", 500, service.tick()) is ParkingVerdict.OK
    over = service.now + 500
    held = service.submit("held", max_tokens=3, hold_ns=600)
    service.run_until_idle()
    assert held.is_finished
    assert service.free_blocks == 16
    (load,) = service.dispatcher.loads().workers
    assert load.host_blocks_used == 4  # 8 and 7 tokens, in blocks of 4
    assert service.dispatcher.next_expiry() == over
    service.dispatcher.expire(over)
    assert service.dispatcher.loads().workers[0].host_blocks_used == 2
    assert parked.sequences[0].finish is not None
    assert parked.sequences[0].finish.reason is FinishReason.CANCELLED
    assert held.keep_until is not None
    service.dispatcher.expire(held.keep_until)
    assert service.dispatcher.loads().workers[0].host_blocks_used == 0
    assert service.maybe_plan() is None
    for name in ("parked", "held"):
        verdict = service.dispatcher.resume(name, Continuation(), service.tick()).verdict
        assert verdict is ParkingVerdict.NOT_PARKED


@pytest.mark.parametrize("host_blocks", [0, 2, 16])
@pytest.mark.parametrize("tokens", [[], [7, 8, 9]], ids=["as it was", "behind input"])
def test_a_parked_request_goes_on_with_the_right_tokens_whatever_the_arena_could_keep(
    host_blocks: int, tokens: list[int]
) -> None:
    service = OneWorker(SchedulerConfig(watermark=0.0, headroom=0.0, prefix_cache=False), host_blocks=host_blocks)
    group = service.submit("a", max_tokens=20)
    for _ in range(8):
        service.step()
    assert service.dispatcher.park("a", 0, service.tick()) is ParkingVerdict.OK
    said = group.sequences[0].output.copy()
    service.run_until_idle()
    assert service.free_blocks == 16
    kept = service.dispatcher.loads().workers[0].host_blocks_used
    assert kept == (3 if host_blocks == 16 else 0)  # 12 tokens: those but the last one said
    resumed = service.dispatcher.resume("a", Continuation(tokens=tokens), service.tick())
    assert resumed.verdict is ParkingVerdict.OK
    service.run_until_idle()
    expected = undisturbed_output(group.request, 0)[0]
    assert group.sequences[0].output == expected
    if tokens:
        assert list(group.request.prompt) == [1, 2, 3, 4, 5, *said, *tokens]
    assert (group.recomputed_tokens == 0) == (kept > 0)
    (load,) = service.dispatcher.loads().workers
    assert (load.kv_blocks_used, load.host_blocks_used) == (0, 0)
    found = (load.prefix_cache_hit_tokens_total, load.prefix_cache_host_hit_tokens_total)
    assert found == (0, 0), "a request's own KV is no hit of the prefix cache"


@pytest.mark.parametrize("what", [Continuation(tokens=[7]), Continuation(max_tokens=4), Continuation(hold_ns=600)])
def test_a_parked_request_of_several_sequences_goes_on_as_it_was_or_not_at_all(what: Continuation) -> None:
    service = OneWorker()
    group = service.submit("a", n=2, max_tokens=8)
    for _ in range(4):
        service.step()
    assert service.dispatcher.park("a", 0, service.tick()) is ParkingVerdict.OK
    assert service.dispatcher.resume("a", what, service.tick()).verdict is ParkingVerdict.ONE_SEQUENCE
    assert service.dispatcher.resume("a", Continuation(), service.tick()).verdict is ParkingVerdict.OK
    service.run_until_idle()
    assert [len(sequence.output) for sequence in group.sequences] == [8, 8]
