"""The decode calendar: which decoding sequences need something in a given step.

Every member of the decode set advances by one position per step: in step s a sequence writes the KV of position
s - base_step. So what depends on its position is known in advance and kept by step:

    due(s)      sequences whose position in step s is the first of a block, so that they need one
    ending(s)   sequences that sample their last token by length in step s

A steady step looks at those few and at nobody else, which is what makes planning cheap.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduler.sequence import Sequence


class DecodeCalendar:
    """Sequences of the decode set by the steps that concern them. Dicts serve as ordered sets."""

    __slots__ = ("_by_phase", "_ends_at", "block_size")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._by_phase: list[dict[Sequence, None]] = [{} for _ in range(block_size)]
        self._ends_at: dict[int, dict[Sequence, None]] = {}

    def enter(self, sequence: Sequence, step: int) -> None:
        """From `step` on the sequence decodes; it has `computed` tokens then."""
        request = sequence.group.request
        base = sequence.base_step = step - sequence.computed
        # Step s samples output token s - base - len(prompt) + 1 (0-based).
        end = sequence.end_step = base + len(request.prompt) + request.max_tokens - 2
        self._by_phase[base % self.block_size][sequence] = None
        self._ends_at.setdefault(end, {})[sequence] = None

    def leave(self, sequence: Sequence, last_step: int) -> bool:
        """The sequence decodes no further; `last_step` is the last planned step. Sets how many tokens it has computed
        by then. False: it was not here."""
        if sequence.end_step == 0:
            return False
        base = sequence.base_step
        sequence.computed = last_step + 1 - base
        del self._by_phase[base % self.block_size][sequence]
        ends = self._ends_at.get(sequence.end_step)
        if ends is not None:
            del ends[sequence]
            if not ends:
                del self._ends_at[sequence.end_step]
        sequence.end_step = 0
        return True

    def due(self, step: int) -> Collection[Sequence]:
        """Sequences that need a block in `step`. A view: it follows enter and leave."""
        return self._by_phase[step % self.block_size].keys()

    def ending(self, step: int) -> list[Sequence]:
        """Sequences that sample their last token in `step`."""
        return list(self._ends_at.get(step, ()))

    def empty_slots(self, last_step: int) -> int:
        """Slots of the last blocks that hold no token, over the whole decode set, after the last planned step."""
        size = self.block_size
        return sum(len(those) * ((phase - last_step - 1) % size) for phase, those in enumerate(self._by_phase))

    def check_integrity(self, members: set[Sequence]) -> None:
        """Raises AssertionError unless exactly the members are in both indexes."""
        due = [sequence for phase in self._by_phase for sequence in phase]
        ends = [sequence for sequences in self._ends_at.values() for sequence in sequences]
        assert len(due) == len(ends) == len(members), "the calendar differs from the decode set"
        assert set(due) == set(ends) == members, "the calendar differs from the decode set"
