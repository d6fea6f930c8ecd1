"""The executor under the real scheduler core, through the wire format: every output equals the dense computation.

The pool holds the largest group and little more, so groups are preempted again and again, by swap or by recompute.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest

from pagewire.v1 import scheduler_pb2, worker_pb2
from scheduler import codec as scheduler_codec
from scheduler.dispatcher import Admission, Dispatcher, SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.events import Failed
from scheduler.sequence import SequenceGroup
from scheduler.step_plan import TokenLogprobs
from tests.worker.toy import MAX_MODEL_LEN, VOCAB, ToyModel, make_executor
from worker.codec import plan_from_wire, result_to_wire
from worker.step import StepResult

NUM_BLOCKS = {1: 110, 4: 29, 16: 10}
"""By block size: just enough for the largest group alone, three samples of 36 + 20 tokens."""
LIMITS = scheduler_codec.ModelLimits(VOCAB, MAX_MODEL_LEN, frozenset())


def random_submit(generator: random.Random, number: int) -> scheduler_pb2.Submit:
    """Greedy requests, seeded ones of one to three samples, and searches of two or three beams; a third share a prefix
    of 16 tokens."""
    shared = list(range(2, 18)) if number % 3 == 0 else []
    own = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 20))]
    submit = scheduler_pb2.Submit(request_id=f"r{number}", token_ids=shared + own)
    submit.sampling.seed = generator.getrandbits(64)
    submit.sampling.temperature = generator.choice([0.0, 1.0])
    submit.sampling.top_p = 0.9
    submit.sampling.n = generator.randint(1, 3) if submit.sampling.temperature else 1
    submit.stop.max_tokens = generator.randint(1, 20)
    if not submit.sampling.temperature and generator.random() < 0.5:
        submit.sampling.beam_width = generator.randint(2, 3)
        submit.sampling.n = generator.randint(1, submit.sampling.beam_width)
        submit.sampling.length_penalty = generator.choice([0.0, 1.0, 2.0])
        submit.stop.stop_token_ids.extend(generator.sample(range(VOCAB), 3))
    return submit


def dense_answers(model: ToyModel, submit: scheduler_pb2.Submit) -> list[list[int]]:
    """The answers of a beam search over the dense computation."""
    request = scheduler_codec.decode_submit(submit, LIMITS, 0)
    search = request.start_beam_search()
    while not search.is_done:
        offers = []
        for beam in search.beams:
            logprobs = model.dense_logits([*request.prompt, *beam.tokens])[-1].log_softmax(-1)
            values, ids = logprobs.topk(search.num_candidates)
            offers.append(TokenLogprobs(0.0, 1, ids.tolist(), values.tolist()))
        search.advance(offers)
    return [one.hypothesis.tokens for one in search.finished[: request.n]]


def on_a_device_that_copies_fast(result: StepResult) -> StepResult:
    """The result with the times of a device on which copying a block is cheaper than computing it. The scheduler
    decides by them what to keep, and this machine's own times are not the same twice."""
    timings = result.timings
    computed = timings.chunk_tokens + timings.decode_tokens
    copied = {name: 1_000 if getattr(timings, name) else 0 for name in ("swap_out_ns", "swap_in_ns", "copy_ns")}
    forward_ns = 100_000 + 50_000 * computed
    return replace(result, timings=replace(timings, idle_ns=0, forward_ns=forward_ns, sample_ns=1_000, **copied))


def serve(
    submits: list[scheduler_pb2.Submit], model: ToyModel, *, block_size: int, budget: int, mode: str, num_blocks: int
) -> tuple[dict[str, SequenceGroup], int]:
    """Runs the requests to their ends, two plans in flight. Returns them by name, and the prompt tokens that came back
    from the host arena."""
    executor = make_executor(model, block_size=block_size, num_blocks=num_blocks, host_blocks=num_blocks)
    config = SchedulerConfig(token_budget=budget, preemption_mode=mode, host_prefix_cache=True)  # type: ignore[arg-type]
    dispatcher = Dispatcher(config)
    capacity = WorkerCapacity(
        block_size=block_size,
        num_blocks=num_blocks,
        host_blocks=num_blocks,
        block_bytes=executor.pool.layout.block_bytes,
        max_slots=8,
        max_step_tokens=64,
    )
    dispatcher.add_worker("w", capacity, TransferRates(), epoch=1, now=0)
    groups: dict[str, SequenceGroup] = {}
    for submit in submits:
        message = scheduler_pb2.Submit()
        message.CopyFrom(submit)
        submitted = dispatcher.submit(scheduler_codec.decode_submit(message, LIMITS, 0), 0)
        assert submitted.admission is Admission.OK, submitted
        assert submitted.group is not None
        groups[submit.request_id] = submitted.group
    in_flight: deque[bytes] = deque()
    now = 0
    while True:
        now += 1
        while (plan := dispatcher.schedule("w", now)) is not None:
            in_flight.append(scheduler_codec.encode_plan(plan))
        if not in_flight:
            break
        wire = worker_pb2.JoinResponse.FromString(in_flight.popleft()).step_plan
        result = result_to_wire(on_a_device_that_copies_fast(executor.execute(plan_from_wire(wire))))
        executor.batch.check_integrity()
        dispatcher.apply("w", scheduler_codec.decode_result(result), now)
        dispatcher.check_integrity()
        assert not [event for event in dispatcher.take_events() if isinstance(event, Failed)]
        assert now < 5000, "the requests do not end"
    return groups, dispatcher.loads().workers[0].prefix_cache_host_hit_tokens_total


def answers(group: SequenceGroup) -> list[list[int]]:
    """What the client gets: all samples, or the best of a search."""
    return [sequence.output for sequence in group.sequences if sequence.is_answer]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize(("block_size", "budget", "seed"), [(1, 7, 7), (4, 64, 256), (4, 9, 36), (16, 30, 3)])
def test_preempted_forked_searched_and_cached_sequences_equal_the_undisturbed_run(
    block_size: int, budget: int, seed: int, mode: str
) -> None:
    """The seeds are some with which everything happens that is asked for at the end."""
    model = ToyModel()
    generator = random.Random(seed)
    submits = [random_submit(generator, number) for number in range(30)]
    groups, host_hits = serve(
        submits, model, block_size=block_size, budget=budget, mode=mode, num_blocks=NUM_BLOCKS[block_size]
    )
    assert host_hits > 0 or mode == "recompute", "nothing came back from the second tier"
    preempted = [group for group in groups.values() if group.preemptions]
    assert {group.search is None for group in preempted} == {True, False}, "searches and others should be preempted"
    for submit in submits:
        found = answers(groups[submit.request_id])
        if submit.sampling.beam_width:
            assert found == dense_answers(model, submit)
        elif submit.sampling.temperature == 0:
            assert found == [model.greedy(list(submit.token_ids), submit.stop.max_tokens)]
        else:
            alone, _ = serve([submit], model, block_size=16, budget=64, mode=mode, num_blocks=40)
            assert found == answers(alone[submit.request_id])
