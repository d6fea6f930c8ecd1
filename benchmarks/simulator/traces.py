"""Loads for simulations: the lengths of our benchmark workloads, Poisson arrivals, one seed.

Where only lengths matter, prompts are zeros; where the prefix cache matters, token ids are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.simulator.simulation import Arrival
from pagewire.bench.workloads import ALPACA, GAP_SEED, ONLINE_SEED, SHAREGPT, Lengths


@dataclass(frozen=True, slots=True)
class Load:
    """Prompt and output lengths of a kind of traffic."""

    name: str
    prompt: Lengths
    output: Lengths

    def arrivals(self, rate: float, seconds: float, *, n: int = 1, beam_width: int = 1, seed: int = 0) -> list[Arrival]:
        """Poisson arrivals at `rate` per second for `seconds`, prompts of zeros."""
        times = poisson(rate, seconds, seed)
        generator = np.random.default_rng(ONLINE_SEED + 100 * seed)
        prompts = self.prompt.draw(generator, len(times))
        outputs = self.output.draw(generator, len(times))
        return [
            Arrival(at, [0] * i, o, n=n, beam_width=beam_width)
            for at, i, o in zip(times, prompts, outputs, strict=True)
        ]


SHAREGPT_LIKE = Load("sharegpt-like", *SHAREGPT)
ALPACA_LIKE = Load("alpaca-like", *ALPACA)


def poisson(rate: float, seconds: float, seed: int = 0) -> list[int]:
    """Arrival times in nanoseconds. The same seed gives the same arrivals at another rate, stretched."""
    count = max(1, round(rate * seconds))
    gaps = np.random.default_rng(GAP_SEED + 100 * seed).exponential(1 / rate, count)
    times: list[int] = (np.cumsum(gaps) * 1e9).astype(int).tolist()
    return times
