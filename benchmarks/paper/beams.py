"""What the samples and beams of a request share, observed as a simulation runs (figure 15)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.paper.policies import PAGEWIRE, simulate
from benchmarks.simulator.likelihoods import Likelihoods
from benchmarks.simulator.memory import sharing_saved
from benchmarks.simulator.profiles import A100_OPT_13B
from benchmarks.simulator.simulation import Arrival, Outcome
from benchmarks.simulator.traces import ALPACA_LIKE, SHAREGPT_LIKE, Load
from pagewire.simulation.batch import StepLoad
from scheduler.scheduler import Scheduler
from scheduler.sequence import SequenceGroup

LOADS: tuple[tuple[Load, float, float], ...] = ((ALPACA_LIKE, 5.0, 120.0), (SHAREGPT_LIKE, 0.3, 900.0))
"""With requests per second and seconds."""
WIDTHS = (2, 4, 6)
CERTAINTY = Likelihoods().certainty
"""Mean probability of the likeliest token in the synthetic model that beam searches ask."""
EVERY = 4
"""Steps between two looks."""


@dataclass(frozen=True, slots=True)
class Apart:
    """Over how many last tokens a search's beams differ, at one moment."""

    request_id: str
    length: int  # output tokens of each beam
    any_two: int  # from the first token on in which any two beams differ
    pairs: float  # the same for two beams, the mean over all pairs


@dataclass(slots=True)
class Sharing:
    """Blocks saved by sharing, weighted by time, and how far beams are apart. `observe` is for a simulation."""

    saved: float = 0.0
    total: float = 0.0
    apart: list[Apart] = field(default_factory=list)

    def observe(self, scheduler: Scheduler, step: StepLoad, duration: int) -> None:
        if scheduler.last_step % EVERY == 0:
            saved, total = sharing_saved(scheduler)
            self.saved += saved * duration
            self.total += total * duration
            self.apart.extend(tokens_apart(group) for group in scheduler.moved_beams)

    def figures(self, outcome: Outcome) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "percent": self.percent,
            "preemptions": outcome.preemptions,
        }
        if self.apart:
            figures["tokens_apart_mean"] = float(f"{np.mean([each.any_two for each in self.apart]):.3g}")
        return figures

    @property
    def percent(self) -> float:
        return round(100 * self.saved / self.total, 1)

    @property
    def pairs_apart(self) -> float:
        """Mean over searches, moments and pairs of beams."""
        return float(f"{np.mean([each.pairs for each in self.apart]):.3g}")


def tokens_apart(group: SequenceGroup) -> Apart:
    outputs = np.array([beam.output for beam in group.beams])
    length = outputs.shape[1]
    # Two beams are never equal, so there is a first token in which they differ.
    pairs = [length - int((one != other).argmax()) for one, other in combinations(outputs, 2)]
    return Apart(group.request.request_id, length, max(pairs), sum(pairs) / len(pairs))


def saved_blocks(arrivals: list[Arrival], certainty: float = CERTAINTY) -> dict[str, Any]:
    """Percent of blocks saved by sharing, weighted by time; of searches also over how many last tokens beams differ."""
    sharing = Sharing()
    likelihoods = Likelihoods(certainty=certainty)
    outcome = simulate(PAGEWIRE, A100_OPT_13B, arrivals, observer=sharing.observe, likelihoods=likelihoods)
    return sharing.figures(outcome)
