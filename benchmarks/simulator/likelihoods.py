"""A synthetic language model for beam searches: what a beam finds likeliest next is a function of what it has said.

The likeliest token has the probability p = 1 - u ** (certainty / (1 - certainty)) with u uniform in (0, 1) by a hash of
all that was said, so p is `certainty` on average and most often near 1 or well below it, as in text that beam search
finds likely (Holtzman et al., ICLR 2020, figure 2). Each further token takes 30 to 70 % of what is left,
but no more than the one before it.

    certainty     mean p     p > 0.95     p < 0.3
    0.5           0.5         5 %         30 %
    0.7           0.7        28 %         14 %
    0.85          0.85       59 %          6 %
    0.97          0.97       91 %          1 %

Why it matters: the surer a model, the rarer a child of another beam overtakes, the longer the beams differ, and the
less they share. Beams that differ in one token draw independently here. It hardly matters: with draws by the last 2 to
16 tokens alone, so that two such beams soon go on alike, savings change by less than a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.step_plan import TokenLogprobs

MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """The distribution after every possible output."""

    certainty: float = 0.8
    """Mean probability of the likeliest next token, between 0 and 1, both excluded. At 0.8 beams are as far apart as
    those of a small real model, on average over widths and lengths (benchmarks/paper/real_beams.py)."""

    def history(self, request_id: str, tokens: Iterable[int] = ()) -> int:
        """What decides about everything after these output tokens of a request."""
        history = int.from_bytes(request_id.encode()[-8:], "little")
        for token in tokens:
            history = extend(history, token)
        return history

    def offer(self, history: int, token_ids: range) -> TokenLogprobs:
        """The likeliest next tokens, likeliest first; they are always the same ids in the same order."""
        drawn = mix(history)
        left = ((drawn >> 11) + 0.5) * 2.0**-53
        left = max(left ** (self.certainty / (1 - self.certainty)), 1e-30)
        probabilities = [1.0 - left]
        drawn = mix(drawn)
        for _ in token_ids[1:]:
            drawn = (drawn >> 8) | ((drawn & 255) << 56)
            taken = min(probabilities[-1], left * (0.3 + 0.4 * (drawn & 255) / 256))
            left -= taken
            probabilities.append(taken)
        return TokenLogprobs(0.0, 1, list(token_ids), [math.log(each) for each in probabilities])


def extend(history: int, token: int) -> int:
    """The history with a token behind it."""
    return mix(history ^ (token * 0x9E3779B97F4A7C15 & MASK))


def mix(value: int) -> int:
    """A hash of 64 bits (splitmix64's)."""
    value = value + 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
