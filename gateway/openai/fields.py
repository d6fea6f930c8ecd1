"""Reads a JSON object field by field: right types, or a violation with the field's path; unknown fields do not matter.

Ranges are the validator's. What GenerateRequest cannot carry at all is settled here: a number below zero is a
violation, one beyond the wire's width becomes the widest, which the validator refuses by the same rule as ever. A list
is cut one entry behind its ceiling, so that nothing long is copied before the validator refuses its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import grpc
from pydantic_core import from_json

from gateway.ceilings import CEILINGS
from gateway.errors import Reason, RequestError, Violation, invalid

UINT32 = (1 << 32) - 1


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError if there is none; nesting and lengths of numbers are bounded."""
    try:
        value = from_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        message = "the body is not a JSON object"
        raise RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE, message)
    return value


def is_integer(value: Any) -> bool:
    """Whether JSON held a whole number; true and false are none."""
    return type(value) is int


class Fields:
    """One JSON object. Absent and null fields read as None or empty; wrong ones too, and are remembered."""

    def __init__(self, data: Mapping[str, Any], at: str = "") -> None:
        """
        Args:
            data: the object.
            at: its path with a dot behind, for the paths of violations; empty: the body itself.
        """
        self._data = data
        self._at = at
        self.violations: list[Violation] = []

    def wrong(self, name: str, description: str) -> None:
        """Remembers a violation."""
        self.violations.append(Violation(f"{self._at}{name}", description))

    def check(self) -> None:
        """Raises RequestError if anything read so far was wrong."""
        if self.violations:
            raise invalid(self.violations)

    def raw(self, name: str) -> Any:
        """The value as it is."""
        return self._data.get(name)

    def text(self, name: str) -> str:
        """A string; empty if absent."""
        value = self._typed(name, str, "a string")
        return value if isinstance(value, str) else ""

    def flag(self, name: str) -> bool:
        """true or false; False if absent."""
        return bool(self._typed(name, bool, "true or false"))

    def number(self, name: str) -> float | None:
        """A number, NaN and infinity included: they are for the validator to refuse."""
        value = self._data.get(name)
        if value is None:
            return None
        if is_integer(value) or isinstance(value, float):
            try:
                return float(value)
            except OverflowError:
                return float("inf")
        self.wrong(name, "must be a number")
        return None

    def integer(self, name: str, lowest: int = 0, highest: int = UINT32) -> int | None:
        """A whole number. Below `lowest` it is wrong, above `highest` it is `highest`."""
        value = self._data.get(name)
        if value is None:
            return None
        if not is_integer(value):
            self.wrong(name, "must be a whole number")
            return None
        if value < lowest:
            self.wrong(name, f"must be at least {lowest}")
            return None
        return min(int(value), highest)

    def object(self, name: str) -> Fields | None:
        """A nested object; its violations are added here by `take`."""
        value = self._typed(name, dict, "an object")
        return Fields(value, f"{self._at}{name}.") if isinstance(value, dict) else None

    def take(self, nested: Fields) -> None:
        """Takes over a nested object's violations."""
        self.violations += nested.violations

    def texts(self, name: str, ceiling: str) -> list[str]:
        """A string, or a list of strings."""
        value = self._data.get(name)
        if isinstance(value, str):
            return [value]
        entries = self._entries(name, ceiling, "must be a string or a list of strings")
        for position, entry in enumerate(entries):
            if not isinstance(entry, str):
                self.wrong(f"{name}[{position}]", "must be a string")
                return []
        return entries

    def integers(self, name: str, ceiling: str) -> list[int]:
        """A list of whole numbers."""
        entries = self._entries(name, ceiling, "must be a list of whole numbers")
        for position, entry in enumerate(entries):
            if not is_integer(entry) or entry < 0:
                self.wrong(f"{name}[{position}]", "must be a whole number from 0")
                return []
        return [min(entry, UINT32) for entry in entries]

    def biases(self, name: str) -> dict[int, float]:
        """An object from token ids, written as JSON's keys must be, to numbers."""
        value = self._typed(name, dict, "an object from token ids to numbers")
        result: dict[int, float] = {}
        for key, bias in islice((value or {}).items(), int(CEILINGS["sampling.logit_bias.entries"].highest) + 1):
            if not (key.isascii() and key.isdecimal() and len(key) <= 20):
                self.wrong(name, "must have token ids as its keys")
                return {}
            if not (is_integer(bias) or isinstance(bias, float)):
                self.wrong(f"{name}[{key}]", "must be a number")
                return {}
            # Far beyond any range already, and what float() takes.
            result[min(int(key), UINT32)] = float(max(min(bias, 10**9), -(10**9))) if is_integer(bias) else bias
        return result

    def entries(self, name: str, ceiling: str) -> list[Any]:
        """A list of anything."""
        return self._entries(name, ceiling, "must be a list")

    def _entries(self, name: str, ceiling: str, description: str) -> list[Any]:
        value = self._data.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.wrong(name, description)
            return []
        return value[: int(CEILINGS[ceiling].highest) + 1]

    def _typed(self, name: str, kind: type, what: str) -> Any:
        value = self._data.get(name)
        if value is None or type(value) is kind:
            return value
        self.wrong(name, f"must be {what}")
        return None
