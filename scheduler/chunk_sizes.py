"""Steps with chunks of workers that pad them to a few sizes: what each size takes, measured by the worker at its start.

A padded step takes what its size takes, so a chunk may as well fill it; a line through steps of all sizes would put
the choice between two of them wrong. What contexts and sampling add is learned from results.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from scheduler.policy import ChunkStep

MEMORY = 0.95
"""How much of the past each observation leaves: about 20 steps."""
STRETCH = 1.25
"""A chunk that makes a step this much longer than the smallest one does is always taken: cutting it further would give
more such steps and hardly shorter ones."""


class ChunkSizes:
    """The sizes and their times, in nanoseconds."""

    __slots__ = ("_beside", "_rows", "_sizes")

    def __init__(self, steps: Sequence[ChunkStep]) -> None:
        self._rows = sorted({step.decode_rows for step in steps})
        # A measurement that some hiccup made longer than that of a larger size counts as that one.
        self._sizes = [
            sorted(
                (
                    step.chunk_tokens,
                    min(
                        other.ns
                        for other in steps
                        if other.chunk_tokens >= step.chunk_tokens and other.decode_rows >= rows
                    ),
                )
                for step in steps
                if step.decode_rows == rows
            )
            for rows in self._rows
        ]
        self._beside = 0.0  # what contexts and sampling add to a step

    def observe(self, decode_tokens: int, chunk_tokens: int, ns: int) -> None:
        """A step with chunks has taken that long."""
        sizes = self._holding(decode_tokens)
        at = bisect_left(sizes, (chunk_tokens, 0))
        if at < len(sizes):
            beside = min(ns, 2 * sizes[at][1]) - sizes[at][1]  # a stall is no part of it
            self._beside = MEMORY * self._beside + (1 - MEMORY) * beside

    def budget(self, target_ns: int, decode_tokens: int) -> int | None:
        """Chunk tokens of the largest size that keeps to the target beside that many decodes, or hardly stretches the
        step; None: no size holds so many."""
        sizes = self._holding(decode_tokens)
        if not sizes:
            return None
        most = max(target_ns, STRETCH * (sizes[0][1] + self._beside))
        return max((tokens for tokens, ns in sizes if ns + self._beside <= most), default=sizes[0][0])

    def _holding(self, decode_tokens: int) -> list[tuple[int, int]]:
        """(chunk tokens, nanoseconds) of the sizes for that many decodes, ascending; none: there are no such."""
        # Size 0 is for steps without decodes, the others for those with some.
        at = bisect_left(self._rows, decode_tokens)
        return self._sizes[at] if at < len(self._rows) else []
