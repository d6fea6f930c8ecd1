"""Steps with chunks of workers that pad them to a few sizes: what each size takes, measured by the worker at its start.

A padded step takes what its size takes, so a chunk may as well fill it; a line through steps of all sizes would put
the choice between two of them wrong. What contexts and sampling add is learned from results.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from scheduler.policy import ChunkStep

MEMORY = 0.95
"""How much of the past each observation leaves: about 20 steps."""
STRETCH = 1.25
"""A chunk that makes a step this much longer than the smallest one does is always taken: cutting it further would give
more such steps and hardly shorter ones."""


class ChunkSizes:
    """The sizes and their times, in nanoseconds."""

    __slots__ = ("_beside", "_ns", "_rows")

    def __init__(self, steps: Sequence[ChunkStep]) -> None:
        self._rows = sorted(step.rows for step in steps)
        # A size that takes longer than a larger one is not used: that one is.
        self._ns = [min(step.ns for step in steps if step.rows >= rows) for rows in self._rows]
        self._beside = 0.0  # what contexts and sampling add to a step

    def observe(self, decode_tokens: int, chunk_tokens: int, ns: int) -> None:
        """A step with chunks has taken that long."""
        at = bisect_left(self._rows, decode_tokens + chunk_tokens)
        if at < len(self._rows):
            beside = min(ns, 2 * self._ns[at]) - self._ns[at]  # a stall is no part of it
            self._beside = MEMORY * self._beside + (1 - MEMORY) * beside

    def budget(self, target_ns: int, decode_tokens: int) -> int | None:
        """Chunk tokens of the largest size that keeps to the target beside that many decodes, or hardly stretches the
        step; None: no size has room for a chunk."""
        smallest = bisect_right(self._rows, decode_tokens)
        if smallest == len(self._rows):
            return None
        most = max(target_ns, STRETCH * (self._ns[smallest] + self._beside)) - self._beside
        return self._rows[max(smallest, bisect_right(self._ns, most) - 1)] - decode_tokens
