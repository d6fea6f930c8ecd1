"""Steps with chunks of workers that pad them to a few sizes: what each size takes, measured by the worker at its start.

A padded step takes what its size takes, so a chunk may as well fill it; a line through steps of all sizes would put
the choice between two of them wrong. What contexts and sampling add is learned from results.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.policy import ChunkStep

MEMORY = 0.95
"""How much of the past each observation leaves: about 20 steps."""
STRETCH = 1.25
"""A chunk that makes a step this much longer than the smallest one does is always taken: cutting it further would give
more such steps and hardly shorter ones."""


class ChunkSizes:
    """The sizes and their times, in nanoseconds."""

    __slots__ = ("_beside", "_held", "_sizes")

    def __init__(self, steps: Sequence[ChunkStep]) -> None:
        # A measurement that some hiccup made longer than that of a larger size counts as that one.
        self._sizes = sorted(
            (
                step.rows,
                step.decode_rows,
                min(other.ns for other in steps if other.rows >= step.rows and other.decode_rows >= step.decode_rows),
            )
            for step in steps
        )
        self._held: dict[int, list[tuple[int, int]]] = {}  # by decode rows, as far as anybody asked
        self._beside = 0.0  # what contexts and sampling add to a step

    def observe(self, decode_tokens: int, chunk_tokens: int, ns: int) -> None:
        """A step with chunks has taken that long."""
        rows = decode_tokens + chunk_tokens
        size_ns = next((ns for size, ns in self._holding(decode_tokens) if size >= rows), 0)
        if size_ns:
            beside = min(ns, 2 * size_ns) - size_ns  # a stall is no part of it
            self._beside = MEMORY * self._beside + (1 - MEMORY) * beside

    def budget(self, target_ns: int, decode_tokens: int) -> int | None:
        """Chunk tokens of the largest size that keeps to the target beside that many decodes, or hardly stretches the
        step; None: no size holds so many."""
        sizes = self._holding(decode_tokens)
        if not sizes:
            return None
        most = max(target_ns, STRETCH * (sizes[0][1] + self._beside))
        fitting = [rows for rows, ns in sizes if ns + self._beside <= most]
        return max(fitting, default=sizes[0][0]) - decode_tokens

    def _holding(self, decode_tokens: int) -> list[tuple[int, int]]:
        """(rows, nanoseconds) of the sizes for that many decodes and a chunk, ascending; none: there are no such."""
        if decode_tokens not in self._held:
            found: dict[int, int] = {}
            for rows, decode_rows, ns in self._sizes:
                if rows > decode_tokens and decode_rows >= decode_tokens and (decode_rows == 0) == (decode_tokens == 0):
                    found.setdefault(rows, ns)
            self._held[decode_tokens] = list(found.items())
        return self._held[decode_tokens]
