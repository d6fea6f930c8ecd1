"""The workloads, exactly: every engine that is compared gets the same requests.

Lengths are lognormal with the given mean, drawn by numpy's default generator, first all inputs, then all outputs;
prompt ids come from one generator of seed 7, request after request. A scale takes the first requests of the same set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PROMPT_SEED = 7
LOWEST_ID, HIGHEST_ID = 10, 31_000
"""Prompt ids lie in this half-open range: special tokens are below it, every vocabulary of today reaches beyond it."""
GAP_SEED = 5
ONLINE_SEED = 3


@dataclass(frozen=True)
class Job:
    """One request: greedy, to its length whatever is sampled."""

    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths in tokens."""

    mean: float
    sigma: float
    high: int
    """Clipped to 4..high."""

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        lengths: list[int] = np.clip(np.rint(drawn), 4, self.high).astype(int).tolist()
        return lengths


SHAREGPT = (Lengths(161, 1.0, 1024), Lengths(338, 0.8, 1024))
"""Prompts and answers of conversations: the means that the PagedAttention paper gives (section 6.1)."""
ALPACA = (Lengths(19, 0.6, 128), Lengths(58, 0.8, 512))
"""Instructions and their answers, likewise."""

DECODE_BATCHES = (1, 8, 32, 128, 256, 512)
OFFLINE = (
    *(f"decode-b{batch}" for batch in DECODE_BATCHES),
    "sharegpt-like-1000",
    "alpaca-like-2000",
    "prefill-64x4096",
    "shared-prefix-2048",
)
"""Names of the offline workloads: the whole set is submitted at once."""


@dataclass(frozen=True)
class Scale:
    """How much smaller than the real thing; 1 and 1: the real thing."""

    requests: float = 1.0
    """Share of the requests. A decode row keeps its requests, which are its batch size."""
    lengths: float = 1.0
    """Share of all lengths."""

    def count(self, full: int) -> int:
        """Requests left of `full`."""
        return max(1, round(full * self.requests))

    def length(self, full: int) -> int:
        """Tokens left of `full`."""
        return max(1, round(full * self.lengths))

    @property
    def is_full(self) -> bool:
        """Nothing is scaled, so rows can be compared with recorded ones."""
        return self == Scale()


FULL = Scale()


def offline(name: str, scale: Scale = FULL, vocab_size: int = HIGHEST_ID) -> list[Job]:
    """The requests of an offline workload.

    Args:
        name: one of OFFLINE.
        scale: shrinks it.
        vocab_size: of the model; ids of a smaller vocabulary are folded into it.

    Raises:
        KeyError: there is no workload of that name.
    """
    return _fold(_MAKERS[name](scale), vocab_size)


def online(rate: float, count: int, scale: Scale = FULL, vocab_size: int = HIGHEST_ID) -> tuple[list[Job], list[float]]:
    """ShareGPT-like requests, and the second at which each arrives: Poisson arrivals at `rate` per second."""
    count = scale.count(count)
    jobs = _conversation(ONLINE_SEED, count, SHAREGPT, scale, count)
    gaps = np.random.default_rng(GAP_SEED).exponential(1 / rate, count)
    arrivals: list[float] = np.cumsum(gaps).tolist()
    return _fold(jobs, vocab_size), arrivals


def longest(jobs: Sequence[Job]) -> int:
    """Tokens of the longest sequence, prompt and output together."""
    return max(len(job.prompt) + job.max_tokens for job in jobs)


def totals(jobs: Sequence[Job]) -> tuple[int, int]:
    """Tokens in and out."""
    return sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)


def _conversation(seed: int, full: int, lengths: tuple[Lengths, Lengths], scale: Scale, count: int) -> list[Job]:
    rng = np.random.default_rng(seed)
    ins, outs = (distribution.draw(rng, full) for distribution in lengths)
    prompts = _prompts([scale.length(length) for length in ins[:count]])
    return [Job(prompt, scale.length(out)) for prompt, out in zip(prompts, outs, strict=False)]


def _sharegpt_like(scale: Scale) -> list[Job]:
    return _conversation(0, 1000, SHAREGPT, scale, scale.count(1000))


def _alpaca_like(scale: Scale) -> list[Job]:
    return _conversation(1, 2000, ALPACA, scale, scale.count(2000))


def _decode(batch: int) -> Callable[[Scale], list[Job]]:
    def make(scale: Scale) -> list[Job]:
        prompts = _prompts([scale.length(128)] * batch)
        return [Job(prompt, scale.length(256)) for prompt in prompts]

    return make


def _prefill(scale: Scale) -> list[Job]:
    return [Job(prompt, 1) for prompt in _prompts([scale.length(4096)] * scale.count(64))]


def _shared_prefix(scale: Scale) -> list[Job]:
    prefix, *own = _prompts([scale.length(2048)] + [scale.length(32)] * scale.count(256))
    return [Job(prefix + prompt, scale.length(64)) for prompt in own]


_MAKERS: dict[str, Callable[[Scale], list[Job]]] = {
    **{f"decode-b{batch}": _decode(batch) for batch in DECODE_BATCHES},
    "sharegpt-like-1000": _sharegpt_like,
    "alpaca-like-2000": _alpaca_like,
    "prefill-64x4096": _prefill,
    "shared-prefix-2048": _shared_prefix,
}


def _prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(PROMPT_SEED)
    return [rng.integers(LOWEST_ID, HIGHEST_ID, length).tolist() for length in lengths]


def _fold(jobs: list[Job], vocab_size: int) -> list[Job]:
    """Ids below the vocabulary's size."""
    if vocab_size >= HIGHEST_ID:
        return jobs
    low = min(LOWEST_ID, vocab_size - 1)
    span = vocab_size - low
    return [Job([low + (token - LOWEST_ID) % span for token in job.prompt], job.max_tokens) for job in jobs]
