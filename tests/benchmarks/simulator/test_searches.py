"""Beam searches in the simulator: real searches of the real core over a synthetic model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.simulator.likelihoods import Likelihoods, extend
from benchmarks.simulator.memory import sharing_saved
from benchmarks.simulator.simulation import Arrival, Simulation
from benchmarks.simulator.worker import STOP, TOKEN
from pagewire.simulation.batch import StepLoad
from scheduler.dispatcher import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.sequence import Request
from scheduler.step_plan import TokenLogprobs
from tests.benchmarks.simulator.factories import burst, in_order, machine


def undisturbed(likelihoods: Likelihoods, request: Request) -> list[list[int]]:
    """The answers of a search whose beams never leave the worker, best first."""
    search, wanted = request.start_beam_search(), request.payload
    assert isinstance(wanted, int)
    while len(search.beams[0].tokens) + 1 < wanted:
        candidates = range(TOKEN, TOKEN + search.num_candidates)
        histories = [likelihoods.history(request.request_id, beam.tokens) for beam in search.beams]
        search.advance([likelihoods.offer(history, candidates) for history in histories])
    return [[*beam.tokens, STOP] for beam in search.beams]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_searches_give_the_answers_of_undisturbed_ones(mode: Any) -> None:
    searches = [replace(arrival, n=3, beam_width=3) for arrival in burst(25) if arrival.output_tokens > 1]
    arrivals = in_order(searches + burst(25, seed=1))
    config = SchedulerConfig(max_num_seqs=16, token_budget=64, preemption_mode=mode, max_waiting=100)
    simulation = Simulation([machine(num_blocks=48)], arrivals, config=config)
    outcome = simulation.run()
    simulation.dispatcher.check_integrity()
    assert outcome.failures == []
    assert len(outcome.completions) == len(arrivals)
    preempted = 0
    for number, arrival in enumerate(arrivals):
        if arrival.beam_width > 1:
            group = simulation.dispatcher.find(str(number))
            assert group is not None
            preempted += group.preemptions > 0
            assert [sequence.output for sequence in group.sequences] == undisturbed(Likelihoods(), group.request)
    assert preempted > 5
    (scheduler,) = simulation.schedulers.values()
    assert scheduler.blocks.num_used == 0


def test_beams_save_the_blocks_that_they_share_but_not_the_one_that_is_copied() -> None:
    saved: list[tuple[int, int]] = []
    loads: list[StepLoad] = []

    def observe(scheduler: Scheduler, load: StepLoad, duration: int) -> None:
        saved.append(sharing_saved(scheduler))
        loads.append(load)

    # A prompt of 10 tokens has 2 full blocks of 4 and a partial one, which one of the two beams copies.
    Simulation([machine()], [Arrival(0, [0] * 10, 6, n=2, beam_width=2)], observer=observe).run()
    assert saved[0] == (2, 6)
    assert [(load.decode_tokens, load.decode_context) for load in loads[1:3]] == [(2, 22), (2, 24)]
    assert loads[1].copied_blocks == 1


def test_the_likeliest_token_is_as_likely_as_the_model_is_certain() -> None:
    for certainty in (0.5, 0.7, 0.85):
        likelihoods = Likelihoods(certainty)
        offers: list[TokenLogprobs] = []
        history = likelihoods.history("a")
        for token in range(4000):
            history = extend(history, token)
            offers.append(likelihoods.offer(history, range(5, 9)))
        assert all(offer.top_logprobs == sorted(offer.top_logprobs, reverse=True) for offer in offers)
        assert all(sum(math.exp(each) for each in offer.top_logprobs) <= 1 + 1e-9 for offer in offers)
        mean = sum(math.exp(offer.top_logprobs[0]) for offer in offers) / len(offers)
        assert mean == pytest.approx(certainty, abs=0.02)
