"""Finds stop strings in text that arrives in pieces, whatever the pieces are.

Rule: the match whose end comes first wins; of those that end together, the longest. It does not depend on how the text
is cut, and for a single stop string it is what `str.find` gives on the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop string has appeared in it. Holds back only what may become a stop string."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """
        Args:
            stops: not empty each; at most a few, so that a search over all of them per piece is cheap.
            include_stop: give the stop string out as part of the text.
        """
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that is certain. After a match, nothing more."""
        if self.matched is not None or not text:
            return ""
        if not self._stops:
            return text
        window = self._held + text
        match = self._first_match(window)
        if match is not None:
            start, self.matched = match
            self._held = ""
            return window[: start + len(self.matched)] if self._include else window[:start]
        hold = self._longest_beginning_of_a_stop(window)
        self._held = window[len(window) - hold :]
        return window[: len(window) - hold]

    def would_match(self, text: str) -> bool:
        """Whether `push(text)` would complete a stop string."""
        return self.matched is None and self._first_match(self._held + text) is not None

    def release(self) -> str:
        """The text held back, because the sequence has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str) -> tuple[int, str] | None:
        """(start, stop) of the match that ends first. Every match ends in the new piece: the held text has none."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                if best is None or candidate < best:
                    best = candidate
        return None if best is None else best[1:]

    def _longest_beginning_of_a_stop(self, window: str) -> int:
        """Length of the longest end of `window` with which some stop string begins."""
        longest = 0
        for stop in self._stops:
            start = max(0, len(window) - len(stop) + 1)
            position = window.find(stop[0], start)
            while position >= 0:
                if stop.startswith(window[position:]):
                    longest = max(longest, len(window) - position)
                    break
                position = window.find(stop[0], position + 1)
        return longest
