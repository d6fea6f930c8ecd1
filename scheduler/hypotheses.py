"""The bookkeeping of one beam search: which continuations live on, which have finished, and when it is over.

Each step, every live beam offers its likeliest next tokens; a continuation's log-probability is its beam's plus the
token's. With a width of 2 and the end-of-sequence token E:

    beams      continuations, best first       rank 1: d E   finishes: among the `width` best overall
    a b   ──▶  a b c, a b E, a b d        ──▶  rank 2: a b c lives on
    d     ──▶  d E, d f, d c                   rank 3: a b E is lost: ended, but not among the best
                                               rank 4: d f   lives on, and that makes `width`

A finished hypothesis scores log-probability / length ** length_penalty, its last token counted; the `width` best are
kept. The search ends at `max_tokens`, where the best continuations finish as they are, or when `width` have finished
and the best beam, scored at its present length, would not beat the worst of them.

These are the rules of transformers' `generate(num_beams=...)` with `early_stopping=False`, whose first step also has
only one beam. Equal scores go by beam, then by the order in which the beam's tokens were offered, and to what finished
earlier; sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.step_plan import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beginning of an answer. Nobody changes its lists."""

    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0  # sum over the tokens
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, if they were asked for


@dataclass(frozen=True, slots=True)
class FinishedHypothesis:
    """A whole answer."""

    hypothesis: Hypothesis
    score: float
    stop_token: int | None  # the stop token that is its last one; None: it reached max_tokens


class BeamSearch:
    """One request's search. `beams` are the live hypotheses, best first: an empty one at first, then `width`."""

    __slots__ = (
        "_length_penalty",
        "_max_tokens",
        "_min_tokens",
        "_stop_ids",
        "_top_logprobs",
        "_width",
        "beams",
        "finished",
    )

    def __init__(
        self,
        *,
        width: int,
        max_tokens: int,
        min_tokens: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        length_penalty: float = 1.0,
        top_logprobs: int | None = None,
    ) -> None:
        """
        Args:
            width: live beams, and hypotheses returned at most.
            max_tokens: output tokens of a hypothesis at most.
            min_tokens: output tokens that a hypothesis has at least before a stop token.
            stop_ids: tokens that finish a hypothesis.
            length_penalty: exponent on the length by which a finished hypothesis' log-probability is divided.
            top_logprobs: how many likeliest tokens to remember per token; None: no log-probabilities at all.
        """
        self._width = width
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._stop_ids = stop_ids
        self._length_penalty = length_penalty
        self._top_logprobs = top_logprobs
        self.beams = [Hypothesis()]
        self.finished: list[FinishedHypothesis] = []  # best first, `width` at most

    @property
    def is_done(self) -> bool:
        return not self.beams

    @property
    def num_candidates(self) -> int:
        """Likeliest tokens that each beam has to offer, so that `width` of them are not stop tokens: no continuation
        that the rules could choose is left out."""
        return max(self._width + len(self._stop_ids), self._top_logprobs or 0)

    def advance(self, offers: Sequence[TokenLogprobs]) -> list[int]:
        """Moves every beam on by a token.

        Args:
            offers: per beam its `num_candidates` likeliest tokens with their log-probabilities, likeliest first, in
                top_ids and top_logprobs.

        Returns:
            Per new beam the position of the one it continues; empty when the search is over.
        """
        length = len(self.beams[0].tokens) + 1
        is_last = length == self._max_tokens
        ending: list[FinishedHypothesis] = []
        living: list[tuple[int, Hypothesis]] = []
        for order, (negative, parent, place) in enumerate(self._continuations(offers, length)):
            token = offers[parent].top_ids[place]
            stops = token in self._stop_ids
            if (stops or is_last) and order < self._width:
                ending.append(self._finish(self._continue(offers, parent, place, -negative), token if stops else None))
            elif not (stops or is_last) and len(living) < self._width:
                living.append((parent, self._continue(offers, parent, place, -negative)))
            elif order >= self._width and (is_last or len(living) == self._width):
                break
        self.finished = sorted(self.finished + ending, key=lambda one: -one.score)[: self._width]
        if living and self._can_improve(living[0][1]):
            self.beams = [beam for _, beam in living]
            return [parent for parent, _ in living]
        self.beams = []
        return []

    def _continuations(self, offers: Sequence[TokenLogprobs], length: int) -> list[tuple[float, int, int]]:
        """(negative log-probability, beam, place among its offers) of all continuations, best first."""
        forbidden = self._stop_ids if length <= self._min_tokens else ()
        return sorted(
            (-(beam.logprob + logprob), parent, place)
            for parent, (beam, offer) in enumerate(zip(self.beams, offers, strict=True))
            for place, (token, logprob) in enumerate(zip(offer.top_ids, offer.top_logprobs, strict=True))
            if token not in forbidden
        )

    def _continue(self, offers: Sequence[TokenLogprobs], parent: int, place: int, logprob: float) -> Hypothesis:
        beam, offer, top = self.beams[parent], offers[parent], self._top_logprobs
        logprobs = beam.logprobs
        if top is not None:
            own = TokenLogprobs(offer.top_logprobs[place], place + 1, offer.top_ids[:top], offer.top_logprobs[:top])
            logprobs = [*logprobs, own]
        return Hypothesis([*beam.tokens, offer.top_ids[place]], logprob, logprobs)

    def _finish(self, hypothesis: Hypothesis, stop_token: int | None) -> FinishedHypothesis:
        return FinishedHypothesis(hypothesis, self._score(hypothesis), stop_token)

    def _score(self, hypothesis: Hypothesis) -> float:
        divisor: float = len(hypothesis.tokens) ** self._length_penalty
        return hypothesis.logprob / divisor

    def _can_improve(self, best: Hypothesis) -> bool:
        """Whether the best beam could still come among the finished ones, as if it ended at its present length."""
        return len(self.finished) < self._width or self._score(best) > self.finished[-1].score
