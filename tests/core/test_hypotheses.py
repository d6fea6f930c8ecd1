"""Beam search by the core's bookkeeping, offered tokens by a plain torch loop, equals transformers' on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scheduler.hypotheses import BeamSearch
from scheduler.step_plan import TokenLogprobs
from tests import tiny_models

PROMPTS = [[5, 9, 200, 31], [17, 44, 90, 120, 7, 3, 250, 66, 12]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_tiny_model("llama", tmp_path_factory.mktemp("beams") / "model")


def search_by_torch(model: Path, prompt: list[int], search: BeamSearch) -> BeamSearch:
    """Runs a search to its end, all beams computed anew in every step."""
    while not search.is_done:
        offers = []
        for beam in search.beams:
            logprobs = tiny_models.reference_logits(model, prompt + beam.tokens)[-1].log_softmax(-1)
            values, ids = logprobs.topk(search.num_candidates)
            offers.append(TokenLogprobs(0.0, 1, ids.tolist(), values.tolist()))
        search.advance(offers)
    return search


def stop_tokens(model: Path, prompt: list[int], count: int) -> list[int]:
    """Tokens that likely beams run into after some steps."""
    found = tiny_models.reference_beams(model, prompt, width=4, n=4, max_new_tokens=8, stop_ids=[])
    return sorted({beam.token_ids[3 + at % 4] for at, beam in enumerate(found)})[:count]


@pytest.mark.parametrize(
    ("width", "length_penalty", "num_stops", "min_tokens"),
    [
        (2, 1.0, 0, 0),
        (2, 0.0, 1, 0),
        (2, 2.5, 3, 5),
        (3, -1.0, 1, 5),
        (3, 1.0, 3, 0),
        (4, 1.0, 1, 0),
        (4, 0.0, 3, 0),
        (8, 2.5, 1, 0),
        (8, 1.0, 3, 5),
    ],
)
def test_the_best_hypotheses_and_their_scores_are_those_of_transformers(
    model: Path, width: int, length_penalty: float, num_stops: int, min_tokens: int
) -> None:
    for prompt in PROMPTS:
        stops = stop_tokens(model, prompt, num_stops)
        expected = tiny_models.reference_beams(
            model,
            prompt,
            width=width,
            n=width,
            max_new_tokens=10,
            stop_ids=stops,
            length_penalty=length_penalty,
            min_new_tokens=min_tokens,
        )
        search = BeamSearch(
            width=width,
            max_tokens=10,
            min_tokens=min_tokens,
            stop_ids=frozenset(stops),
            length_penalty=length_penalty,
        )
        found = search_by_torch(model, prompt, search).finished
        assert [one.hypothesis.tokens for one in found] == [beam.token_ids for beam in expected]
        scores = torch.tensor([one.score for one in found])
        torch.testing.assert_close(scores, torch.tensor([beam.score for beam in expected]))
        for one in found:
            last = one.hypothesis.tokens[-1]
            assert one.stop_token == (last if last in stops else None)


def offer(*pairs: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(0.0, 1, [token for token, _ in pairs], [logprob for _, logprob in pairs])


def test_a_stop_token_behind_the_best_ones_neither_finishes_nor_lives_on() -> None:
    search = BeamSearch(width=2, max_tokens=9, stop_ids=frozenset({0}))
    assert search.num_candidates == 3
    assert search.advance([offer((7, -1.0), (8, -1.5), (0, -2.0))]) == [0, 0]
    assert search.finished == []
    assert search.advance([offer((5, -0.1), (0, -3.0), (6, -4.0)), offer((0, -0.2), (5, -0.3), (6, -9.0))]) == [0, 1]
    assert [(one.hypothesis.tokens, one.stop_token) for one in search.finished] == [([8, 0], 0)]
    assert [beam.tokens for beam in search.beams] == [[7, 5], [8, 5]]


def test_equal_scores_go_by_beam_then_by_the_order_of_the_offer() -> None:
    search = BeamSearch(width=2, max_tokens=2)
    search.advance([offer((4, -1.0), (3, -1.0))])
    assert [beam.tokens for beam in search.beams] == [[4], [3]]
    assert search.advance([offer((9, -1.0), (8, -1.0)), offer((7, -1.0), (6, -1.0))]) == []
    assert [one.hypothesis.tokens for one in search.finished] == [[4, 9], [4, 8]]


def test_the_search_goes_on_while_a_beam_could_beat_the_worst_finished_hypothesis() -> None:
    search = BeamSearch(width=2, max_tokens=100, stop_ids=frozenset({0, 1}), length_penalty=0.0)
    search.advance([offer((0, -1.0), (1, -2.0), (5, -2.0), (6, -2.5))])
    assert search.is_done, "no beam is better than -2"
    search = BeamSearch(width=2, max_tokens=100, stop_ids=frozenset({0, 1}), length_penalty=0.0)
    assert search.advance([offer((0, -1.0), (5, -1.5), (6, -2.5), (1, -3.0))]) == [0, 0]


def test_log_probabilities_of_a_hypothesis_are_those_of_its_own_tokens() -> None:
    search = BeamSearch(width=2, max_tokens=2, top_logprobs=1)
    search.advance([offer((4, -1.0), (3, -2.0))])
    search.advance([offer((9, -5.0), (8, -6.0)), offer((7, -0.5), (6, -0.75))])
    best = search.finished[0].hypothesis
    assert (best.tokens, best.logprob) == ([3, 7], -2.5)
    assert best.logprobs == [TokenLogprobs(-2.0, 2, [4], [-1.0]), TokenLogprobs(-0.5, 1, [7], [-0.5])]
