"""What every token slot of a KV pool is used for at one moment, in the four states of the paper's figure 2."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulator.allocation import ReservingScheduler
from scheduler.beams import blocks_to_write
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class SlotStates:
    """Token slots of the whole pool by use; they add up to the pool."""

    tokens: int = 0  # hold, or are about to be given, the KV of a known token
    reserved: int = 0  # will hold a token of their sequence later
    internal: int = 0  # reserved for tokens that will never come; for blocks: empty slots of last blocks
    other: int = 0  # free, or lost between chunks and to their rounding

    def __add__(self, other: SlotStates) -> SlotStates:
        return SlotStates(
            self.tokens + other.tokens,
            self.reserved + other.reserved,
            self.internal + other.internal,
            self.other + other.other,
        )

    def shares(self) -> dict[str, float]:
        """Each state as a fraction of the pool."""
        total = self.tokens + self.reserved + self.internal + self.other
        return {
            "tokens": self.tokens / total,
            "reserved": self.reserved / total,
            "internal": self.internal / total,
            "other": self.other / total,
        }


def tokens_held(scheduler: Scheduler, sequence: Sequence) -> int:
    """Tokens that have a slot: a prompt as soon as it has its blocks, then one per step."""
    if sequence.status is SequenceStatus.PREFILLING:
        return sequence.num_tokens
    return scheduler.last_step + 1 - sequence.base_step if sequence.end_step else sequence.computed


def slot_states(scheduler: Scheduler) -> SlotStates:
    """The states of one worker's pool now. Time linear in the sequences that run."""
    size = scheduler.capacity.block_size
    total = scheduler.capacity.num_blocks * size
    if isinstance(scheduler, ReservingScheduler):
        return reserved_states(scheduler, total)
    empty: dict[int, int] = {}
    for group in scheduler.running:
        for sequence in group.live:
            blocks = sequence.table.blocks
            if blocks:
                empty[blocks[-1]] = len(blocks) * size - tokens_held(scheduler, sequence)
    used = scheduler.blocks.num_used * size
    internal = sum(empty.values())
    return SlotStates(tokens=used - internal, internal=internal, other=total - used)


def reserved_states(scheduler: ReservingScheduler, total: int) -> SlotStates:
    tokens = reserved = internal = 0
    for sequence in scheduler.chunks:
        request = sequence.request
        output = request.payload
        assert isinstance(output, int)
        final = len(request.prompt) + output
        held = min(final, tokens_held(scheduler, sequence))
        tokens += held
        reserved += final - held
        internal += scheduler.reserved_tokens(request) - final
    return SlotStates(tokens, reserved, internal, total - tokens - reserved - internal)


def sharing_saved(scheduler: Scheduler) -> tuple[int, int]:
    """Blocks saved by sharing, and blocks that the same sequences would have without (the paper's figure 15). Beams
    that are about to go on count with what their next step takes: a block that is about to be copied is not saved."""
    # Sequences that only wait for their last token still hold blocks, but are no longer among the running.
    tables = [s.table for group in scheduler.running for s in group.live if not s.table.on_host]
    logical = sum(len(table) for table in tables)
    physical = len({block for table in tables for block in table.blocks})
    size = scheduler.capacity.block_size
    for group in scheduler.moved_beams:
        if group.beams[0].computed % size == 0:
            logical += len(group.beams)
        physical += blocks_to_write(group, size)
    return logical - physical, logical
