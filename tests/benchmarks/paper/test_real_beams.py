"""Real beams in a simulation: they are the model's own; distances and certainties are what they are called."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.paper.beams import tokens_apart
from benchmarks.paper.model_worker import END, SHIFT, ModelWorker
from benchmarks.paper.real_beams import CONTEXT, DISTANCE, by_length, same, searches
from benchmarks.simulator.simulation import Arrival, Simulation
from benchmarks.simulator.worker import STOP
from scheduler.dispatcher import SchedulerConfig
from scheduler.hypotheses import BeamSearch
from scheduler.step_plan import TokenLogprobs
from tests.benchmarks.simulator.factories import machine
from tests.worker.toy import VOCAB, ToyModel


def dense_answers(model: ToyModel, prompt: list[int], width: int, count: int) -> list[list[int]]:
    """The beams after `count` tokens of a search over the dense computation, none of which is END."""
    search = BeamSearch(width=width, max_tokens=count + 1)
    for _ in range(count):
        offers = []
        for beam in search.beams:
            logprobs = model.dense_logits(prompt + beam.tokens)[-1].log_softmax(-1)
            logprobs[END] = float("-inf")
            values, ids = logprobs.topk(search.num_candidates)
            offers.append(TokenLogprobs(0.0, 1, ids.tolist(), values.tolist()))
        search.advance(offers)
    return [beam.tokens for beam in search.beams]


def test_beams_of_a_simulation_are_those_of_the_model_and_end_where_the_load_says() -> None:
    model = ToyModel()
    model.head[END] *= 3  # it is often among the likeliest
    prompts = [[(7 * number + 3 * place) % VOCAB for place in range(5 + number)] for number in range(6)]
    arrivals = [
        Arrival(number * 30_000_000, [token + SHIFT for token in prompt], 20 + number, n=3, beam_width=3)
        for number, prompt in enumerate(prompts)
    ]
    config = SchedulerConfig(max_num_seqs=16, token_budget=64, max_waiting=100)
    simulation = Simulation([machine()], arrivals, config=config, make_worker=partial(ModelWorker, model))
    outcome = simulation.run()
    simulation.dispatcher.check_integrity()
    assert outcome.failures == []
    for number, prompt in enumerate(prompts):
        group = simulation.dispatcher.find(str(number))
        assert group is not None
        expected = [[token + SHIFT for token in beam] for beam in dense_answers(model, prompt, 3, 19 + number)]
        assert [sequence.output for sequence in group.sequences] == [[*beam, STOP] for beam in expected]
    (worker,) = simulation.workers.values()
    assert isinstance(worker, ModelWorker)
    # A search has one beam before its first token and three from then on; the token that ends it is the load's.
    assert len(worker.likeliest) == sum(1 + 3 * (18 + number) for number in range(6))
    assert all(0 < probability <= 1 for _, probability in worker.likeliest)


def test_beams_are_apart_from_the_first_token_on_in_which_they_differ() -> None:
    outputs = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 9, 3, 4]]
    group: Any = SimpleNamespace(
        request=SimpleNamespace(request_id="a"), beams=[SimpleNamespace(output=output) for output in outputs]
    )
    apart = tokens_apart(group)
    assert (apart.request_id, apart.length, apart.any_two) == ("a", 4, 3)
    assert apart.pairs == pytest.approx((1 + 3 + 3) / 3)


def test_prompts_are_pieces_of_the_text_and_sequences_are_within_the_context() -> None:
    text = list(range(2000))
    arrivals = [Arrival(0, [0] * 9, 7), Arrival(1, [0] * 900, 1000)]
    short, long = searches(arrivals, text, seed=3)
    for each, length in ((short, 9), (long, CONTEXT // 2)):
        first = each.prompt[0]
        assert each.prompt == list(range(first, first + length))
    assert (short.output_tokens, long.output_tokens) == (7, CONTEXT // 2)
    assert searches(arrivals, text, seed=3) == [short, long]
    assert searches(arrivals, text, seed=4) != [short, long]


def test_the_certainty_of_the_same_distance_lies_between_those_that_were_tried() -> None:
    synthetic = {0.5: {DISTANCE: 2.0, "percent": 80.0}, 0.7: {DISTANCE: 4.0, "percent": 70.0}}
    assert same(3.0, synthetic, DISTANCE) == 0.6
    assert same(75.0, synthetic, "percent") == 0.6
    assert same(9.0, synthetic, DISTANCE) == 0.7


def test_means_by_length_are_given_for_lengths_that_occur() -> None:
    assert by_length([(0, 1.0), (31, 2.0), (32, 5.0), (600, 7.0)]) == {
        "0 to 31": 1.5,
        "32 to 63": 5.0,
        "512 to 1023": 7.0,
    }
