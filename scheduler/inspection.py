"""Looking at a scheduler from outside: its figures, and whether its books balance. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from scheduler.loads import WorkerLoads
from scheduler.sequence import Sequence, SequenceGroup, SequenceStatus

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler

WAITING = SequenceStatus.WAITING
PREFILLING = SequenceStatus.PREFILLING
RUNNING = SequenceStatus.RUNNING
ENDING = SequenceStatus.ENDING
SWAPPED = SequenceStatus.SWAPPED
PREEMPTED = SequenceStatus.PREEMPTED


def worker_loads(scheduler: Scheduler) -> WorkerLoads:
    """Figures of this worker. The decode set is not gone through: the calendar knows where it is."""
    size, blocks = scheduler.capacity.block_bytes, scheduler.blocks
    used, host_free = blocks.num_used, blocks.host.num_free + len(blocks.tier)
    swapped = sum(map(_is_swapped, scheduler.preempted))
    return WorkerLoads(
        worker_id=scheduler.worker_id,
        epoch=scheduler.epoch,
        step=scheduler.last_step,
        plans_in_flight=len(scheduler.in_flight),
        running_groups=len(scheduler.running),
        running_sequences=scheduler.rows.held - len(scheduler.rows.released),
        waiting_groups=len(scheduler.waiting),
        swapped_groups=swapped,
        preempted_groups=len(scheduler.preempted) - swapped,
        kv_blocks_free=scheduler.capacity.num_blocks - used,
        kv_blocks_used=used,
        kv_blocks_cached=blocks.cache.num_unreferenced + blocks.cache.num_set_aside,
        host_blocks_free=host_free,
        host_blocks_cached=len(blocks.tier),
        host_blocks_used=scheduler.capacity.host_blocks - host_free,
        kv_waste_ratio=kv_waste_ratio(scheduler),
        plan_lead_ns={"decodes": scheduler.ahead.lead_ns[False], "chunks": scheduler.ahead.lead_ns[True]},
        gathering_wait_ns=round(scheduler.gathering.wait_ns),
        preemptions_total=dict(scheduler.preemptions_total),
        preemption_cost_predicted_ns=dict(scheduler.predicted_ns),
        preemption_cost_actual_ns=dict(scheduler.actual_ns),
        swap_out_bytes_total=scheduler.swap_out_blocks_total * size,
        swap_in_bytes_total=scheduler.swap_in_blocks_total * size,
        prefix_cache_query_tokens_total=scheduler.query_tokens_total,
        prefix_cache_hit_tokens_total=scheduler.hit_tokens_total,
        prefix_cache_host_hit_tokens_total=scheduler.host_hit_tokens_total,
        prompt_tokens_total=scheduler.prompt_tokens_total,
        generation_tokens_total=scheduler.generation_tokens_total,
    )


def kv_waste_ratio(scheduler: Scheduler) -> float:
    """Slots of used blocks that hold no token, over all slots of used blocks. Blocks of prompt tokens that are
    still to be computed hold those tokens. Only last blocks can have empty slots."""
    size, used = scheduler.capacity.block_size, scheduler.blocks.num_used
    if not used:
        return 0.0
    beams = [sequence for group in scheduler.census.searches for sequence in group.live]
    others = empty_slots(chain(scheduler.prefilling, scheduler.joining, scheduler.ending, beams), scheduler)
    return (scheduler.calendar.empty_slots(scheduler.last_decode_step) + others) / (used * size)


def empty_slots(sequences: Iterable[Sequence], scheduler: Scheduler) -> int:
    """Slots without a token in the last blocks of sequences; several may end in one block."""
    size, following = scheduler.capacity.block_size, scheduler.last_decode_step + 1
    slots: dict[int, int] = {}  # by block
    for sequence in sequences:
        blocks = sequence.table.blocks
        if blocks and not sequence.table.on_host:
            if sequence.status is PREFILLING:
                tokens = sequence.num_tokens
            else:
                tokens = following - sequence.base_step if sequence.end_step else sequence.computed
            slots[blocks[-1]] = len(blocks) * size - tokens
    return sum(slots.values())


def check_scheduler(scheduler: Scheduler) -> None:
    """Raises AssertionError when the books do not balance."""
    sequences = [sequence for group in scheduler.groups for sequence in group.live]
    kept = [sequence.table for group in scheduler.parked.groups for sequence in group.sequences]
    scheduler.blocks.check_integrity([*(sequence.table for sequence in sequences), *kept])
    assert not scheduler.parked.groups.keys() & scheduler.groups.keys(), "a parked group is in line"
    for group in scheduler.groups:
        assert group.worker_id == scheduler.worker_id, f"{group} belongs to {group.worker_id}"
        assert group.live, f"{group} has finished and is still here"
        places = (group in scheduler.waiting) + (group in scheduler.preempted) + (group in scheduler.running)
        only_ending = all(sequence.status is ENDING for sequence in group.live)
        assert places == (0 if only_ending else 1), f"{group} is in {places} places"
    scheduler.waiting.check_integrity()
    scheduler.preempted.check_integrity()
    assert not {*scheduler.waiting, *scheduler.preempted, *scheduler.running} - scheduler.groups.keys(), (
        "a finished group is queued"
    )
    scheduler.census.check_integrity(scheduler.groups)
    joining = {sequence for sequence in scheduler.joining if sequence.status is RUNNING}
    decoding = {sequence for sequence in scheduler.decoding if sequence.end_step}
    for sequence in sequences:
        tokens_in_place = sequence.status in (PREFILLING, RUNNING)
        assert not sequence.has_row or tokens_in_place, f"{sequence} has a row"
        decodes = sequence.status is RUNNING and sequence.group.search is None
        assert (sequence in decoding) + (sequence in joining) == decodes, f"{sequence} is lost"
        if sequence.status is WAITING:  # nothing, or what was kept for it while it was parked
            assert sequence.table.on_host or not sequence.table.blocks, f"{sequence} has {sequence.table}"
        else:
            assert sequence.table.on_host == (sequence.status is SWAPPED), f"{sequence} has {sequence.table}"
        if sequence.status is PREEMPTED:
            assert not sequence.table.blocks, f"{sequence} has {sequence.table}"
    scheduler.calendar.check_integrity(decoding)
    used = scheduler.blocks.num_used * scheduler.capacity.block_size
    empty = empty_slots(sequences, scheduler)
    assert kv_waste_ratio(scheduler) == (empty / used if used else 0.0), "slots without a token are miscounted"
    assert scheduler.moved_beams.keys() <= scheduler.running.keys(), "beams that do not run are to decode"
    for group in scheduler.groups:
        if group.search is not None:
            check_beams(group)
    rows = [sequence.slot for sequence in sequences if sequence.has_row]
    promised = sum(1 for s in sequences if s.status in (PREFILLING, RUNNING) and not s.has_row)
    assert scheduler.rows.held == len(rows) + len(scheduler.rows.released) + promised, "rows are miscounted"
    rows_by: dict[tuple[str, int], int] = {}
    for sequence in sequences:
        if sequence.status in (PREFILLING, RUNNING):
            key = (sequence.request.tenant, sequence.request.priority)
            rows_by[key] = rows_by.get(key, 0) + 1
    assert rows_by == scheduler.rows.by, "rows of tenants are miscounted"
    every_slot = sorted(rows + scheduler.rows.released + scheduler.rows.free)
    assert every_slot == list(range(scheduler.capacity.max_slots)), "a slot is lost or held twice"
    assert scheduler.assigned_sequences == len(sequences), "assigned sequences are miscounted"
    scheduler.tenants.check_integrity(scheduler.groups)
    for group in scheduler.groups:
        assert group.preemptions <= scheduler.config.max_preemptions, f"{group} was preempted {group.preemptions} times"


def check_beams(group: SequenceGroup) -> None:
    """Raises AssertionError unless every live beam of a search is where the search thinks it is."""
    assert group.search is not None
    assert not group.search.is_done, f"{group} is searched through and still here"
    assert len(set(group.beams)) == len(group.search.beams), f"{group} has {len(group.beams)} beams"
    for sequence, beam in zip(group.beams, group.search.beams, strict=True):
        assert sequence.output == beam.tokens, f"{sequence} holds another beam"
        assert not sequence.table.blocks or sequence.computed <= sequence.num_tokens, f"{sequence} is too far"
    assert set(group.offers) <= set(group.beams), f"{group} has offers of nobody's"
    assert len(group.offers) < len(group.beams), f"{group} could go on"


def _is_swapped(group: SequenceGroup) -> bool:
    return any(sequence.status is SWAPPED for sequence in group.live)
