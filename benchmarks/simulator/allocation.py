"""The memory policies that the PagedAttention paper compares with (section 6.1), as schedulers of the same engine.

All of them reserve one contiguous chunk per sequence when it starts and give it back when it ends. Chunks come from a
buddy allocator, as the paper assumes for Orca, so each is a power of two of token slots. They differ in how long they
take a sequence to become:

    max      the model's longest sequence
    pow2     prompt + the next power of two of the true output length
    oracle   prompt + the true output length

The chunk is only counted: the engine below goes on with its blocks, of which a chunk always covers more than are used,
so everything but the admission is the same. Nothing is shared and nobody is ever preempted.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from scheduler.draft import Draft
from scheduler.scheduler import Scheduler
from scheduler.sequence import FinishReason, Request, Sequence, SequenceGroup


class BuddyAllocator:
    """Contiguous chunks of powers of two out of `num_slots` token slots, which need not be a power of two."""

    def __init__(self, num_slots: int, smallest: int = 16) -> None:
        self.num_slots = num_slots
        self.smallest = smallest
        self.num_taken = 0
        self._free: dict[int, set[int]] = {}  # chunk size -> first slots
        start = 0
        for bit in reversed(range(num_slots.bit_length())):
            size = 1 << bit
            if num_slots & size and size >= smallest:
                self._free.setdefault(size, set()).add(start)
                start += size
        self._largest = max(self._free, default=0)

    def chunk_size(self, num_tokens: int) -> int:
        """The chunk that `num_tokens` slots are taken from."""
        return max(self.smallest, next_power_of_two(num_tokens))

    def could_ever(self, num_tokens: int) -> bool:
        return self.chunk_size(num_tokens) <= self._largest

    def take(self, num_tokens: int) -> tuple[int, int] | None:
        """First slot and size of a chunk; None: no free one is large enough."""
        wanted = size = self.chunk_size(num_tokens)
        while not self._free.get(size):
            size *= 2
            if size > self._largest:
                return None
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:  # split, and keep the lower half
            size //= 2
            self._free.setdefault(size, set()).add(start + size)
        self.num_taken += wanted
        return start, wanted

    def put_back(self, chunk: tuple[int, int]) -> None:
        """Frees a chunk and merges it with its buddy for as long as that is free too."""
        start, size = chunk
        self.num_taken -= size
        while start ^ size in self._free.get(size, ()):
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(start)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Reservation(Enum):
    """How long a policy takes a sequence to become."""

    MAX = "max"
    POW2 = "pow2"
    ORACLE = "oracle"

    def tokens(self, prompt: int, output: int, longest: int) -> int:
        """For a sequence of `prompt` tokens and `output` more, where none may become longer than `longest`."""
        if self is Reservation.MAX:
            return longest
        return min(longest, prompt + (next_power_of_two(output) if self is Reservation.POW2 else output))


class ReservingScheduler(Scheduler):
    """Admits a group when a chunk is free for each of its sequences (Orca's continuous batching, contiguous KV)."""

    reservation = Reservation.MAX

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.watermark_blocks = 0
        self.slots = BuddyAllocator(self.capacity.num_blocks * self.capacity.block_size, self.capacity.block_size)
        self.chunks: dict[Sequence, tuple[int, int]] = {}

    def reserved_tokens(self, request: Request) -> int:
        """What each of a request's sequences reserves."""
        prompt, output = len(request.prompt), request.payload
        assert isinstance(output, int)  # a simulated request carries how long it becomes
        return self.reservation.tokens(prompt, output, prompt + request.max_tokens)

    def why_never(self, group: SequenceGroup) -> str | None:
        tokens = self.reserved_tokens(group.request)
        if not self.slots.could_ever(tokens):
            return f"a chunk of {tokens} tokens is larger than the pool"
        return super().why_never(group)

    def _start(self, group: SequenceGroup, draft: Draft, now: int) -> bool:
        taken = []
        for sequence in group.live:
            chunk = self.slots.take(self.reserved_tokens(group.request))
            if chunk is None:
                break
            taken.append((sequence, chunk))
        if len(taken) == len(group.live) and super()._start(group, draft, now):
            self.chunks.update(taken)
            return True
        for _, chunk in taken:
            self.slots.put_back(chunk)
        return False

    def _end(self, sequence: Sequence, reason: FinishReason, now: int, **fields: Any) -> None:
        super()._end(sequence, reason, now, **fields)
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self.slots.put_back(chunk)


class OrcaMax(ReservingScheduler):
    reservation = Reservation.MAX


class OrcaPow2(ReservingScheduler):
    reservation = Reservation.POW2


class OrcaOracle(ReservingScheduler):
    reservation = Reservation.ORACLE


class StaticBatcher(ReservingScheduler):
    """As FasterTransformer under a dynamic batcher: when everybody is done, the earliest that fit into the memory form
    the next batch. Run it with `answers_whole_batches`. Rows that have ended cost nothing here, which favours it."""

    reservation = Reservation.MAX

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._batch: set[SequenceGroup] = set()

    def _admit_waiting(self, draft: Draft, now: int, before: SequenceGroup | None = None) -> None:
        if not self.chunks:
            self._batch = set(self.waiting[: self.max_rows])
        count = 0  # the batch is the head of the queue
        while count < len(self.waiting) and self.waiting[count] in self._batch:
            count += 1
        if count == 0:
            return
        later = self.waiting[count:]
        del self.waiting[count:]
        super()._admit_waiting(draft, now)
        if self.waiting and draft.left > 0:  # whoever did not fit is of the next batch
            self._batch.difference_update(self.waiting)
        self.waiting.extend(later)
