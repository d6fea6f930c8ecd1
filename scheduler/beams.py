"""The beams of a search between two steps: who holds which, and which blocks they share.

A step's result chooses the next beams. One child of a parent stays where the parent is; its other children go to
sequences whose beams have died. All children share their parent's blocks, the last, partial one too; what a dead beam
held alone is free at once. With a width of 3, block size 4:

    before                    chosen             after
    row 0  a: [5, 9, 2]       a1, a2 from a      row 0  a1: [5, 9, 2]     2 is copied before it is written
    row 1  b: [5, 9, 7]       c1 from c          row 1  a2: [5, 9, 2]     7 is free
    row 2  c: [5, 4, 6]                          row 2  c1: [5, 4, 6]
"""

from __future__ import annotations

from array import array

from scheduler.block_manager import BlockManager
from scheduler.sequence import Sequence, SequenceGroup

BeamMove = tuple[Sequence, int]
"""A sequence with its new beam, and the slot of the row that it continues."""


def advance(group: SequenceGroup, blocks: BlockManager) -> list[BeamMove]:
    """Chooses the next beams from what all the present ones have offered; empty when the search is over.

    Works on tables in the pool, in the host arena, or without blocks, wherever the group is at present."""
    search, before = group.search, group.beams
    assert search is not None
    parents = [before[position] for position in search.advance([group.offers[sequence] for sequence in before])]
    group.offers.clear()
    if search.is_done:
        return []
    holders = _holders(group, parents)
    assert len(holders) == len(group.sequences), f"{group} has only {len(holders)} beams"
    moves = [(holder, parent.slot) for holder, parent in zip(holders, parents, strict=True)]
    tables = [
        None if holder is parent else blocks.fork(parent.table) for holder, parent in zip(holders, parents, strict=True)
    ]
    for holder, parent, table in zip(holders, parents, tables, strict=True):
        if table is not None:
            blocks.free(holder.table)
            holder.table = table
            holder.computed, holder.computed_before = parent.computed, parent.computed_before
            holder.status, holder.starts_at = parent.status, 0
    for holder, beam in zip(holders, search.beams, strict=True):
        holder.output = beam.tokens
    group.beams = tuple(holders)
    group.lookup_keys = None
    return moves


def _holders(group: SequenceGroup, parents: list[Sequence]) -> list[Sequence]:
    """Who holds the child of each parent: the first child stays."""
    spare = [sequence for sequence in reversed(group.sequences) if sequence not in set(parents)]
    staying: set[Sequence] = set()
    holders = []
    for parent in parents:
        if parent in staying:
            holders.append(spare.pop())
        else:
            staying.add(parent)
            holders.append(parent)
    return holders


def blocks_to_write(group: SequenceGroup, block_size: int) -> int:
    """Blocks that the next step of a group's beams takes: one each at the beginning of a block, else one per copy of a
    partial block, which the last of those that share it need not make."""
    beams = group.beams
    if beams[0].computed % block_size == 0:
        return len(beams)
    return len(beams) - len({sequence.table.blocks[-1] for sequence in beams})


def common_beginnings(live: list[Sequence], block_size: int) -> list[tuple[Sequence, int]]:
    """For every beam but the first one before it with the longest equal beginning in full blocks, and those blocks."""
    tokens = [sequence.token_ids for sequence in live]
    return [
        max(
            ((live[other], _equal_blocks(tokens[at], tokens[other], block_size)) for other in range(at)),
            key=lambda found: found[1],
        )
        for at in range(1, len(live))
    ]


def _equal_blocks(one: array[int], other: array[int], size: int) -> int:
    """Full blocks of equal tokens at the beginning of two different arrays of the same length."""
    first = 0
    while one[first : first + size] == other[first : first + size]:
        first += size
    return first // size
