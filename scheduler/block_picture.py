"""A picture of every block, and what has changed between two pictures. For watchers; the core does not need it.

A picture is a value, taken in one go between two events of the core. Taking it costs time linear in the blocks (50,000
of them: some milliseconds) and nothing at all while nobody asks, because the core keeps no books for it.

Changes are runs of equal neighbours:

    before   . . a a a a . . b b        skip  length  owner  references
    after    . . a a c c . . . b          4      2      c        1
                     ~~~     ~            2      1      .        0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from scheduler.block_pool import BlockPool
from scheduler.sequence import Sequence

if TYPE_CHECKING:
    from scheduler.block_manager import BlockManager
    from scheduler.scheduler import Scheduler

FREE, CACHED, PINNED = 0, 1, 2
FIRST_OWNER = 16
STRETCH = 512
"""Blocks that are compared at once: mostly they are equal."""


class PoolKey(NamedTuple):
    """One memory in one life of a worker."""

    worker_id: str
    epoch: int
    on_host: bool


@dataclass(frozen=True, slots=True)
class Owner:
    """The sequence that a number stands for."""

    request_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Cells:
    """One memory's blocks. Both lists are indexed by block id."""

    owners: list[int]  # FREE, CACHED, PINNED, or a sequence's number
    references: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """All blocks of all workers at one moment."""

    pools: dict[PoolKey, Cells] = field(default_factory=dict)
    owners: dict[int, Owner] = field(default_factory=dict)  # sequences that have blocks


@dataclass(slots=True)
class Runs:
    """Parallel lists: run i begins skips[i] blocks behind the end of run i-1 and has lengths[i] equal blocks."""

    skips: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PoolChange:
    """What has changed in one memory."""

    key: PoolKey
    total_blocks: int | None  # None: the pool was there before; a number: it is new, all its blocks were free
    runs: Runs


@dataclass(frozen=True, slots=True)
class Changes:
    """What leads from one picture to a later one."""

    gone_workers: list[str]
    owners: list[tuple[int, Owner]]
    pools: list[PoolChange]
    ended_owners: list[int]


class Painter:
    """Takes pictures. A sequence keeps its number from picture to picture, and no number is used twice."""

    def __init__(self) -> None:
        self._numbers: dict[Sequence, int] = {}
        self._next = FIRST_OWNER

    def paint(self, schedulers: Iterable[Scheduler]) -> Picture:
        """All blocks as they are now."""
        picture = Picture()
        numbers: dict[Sequence, int] = {}
        for scheduler in schedulers:
            here, there = _blank(scheduler.blocks)
            # Oldest requests last: of a shared block the oldest is the owner.
            for group in sorted([*scheduler.groups, *scheduler.parked.groups], key=lambda group: -group.arrival):
                for sequence in reversed(group.sequences):
                    table = sequence.table
                    if not table.blocks:
                        continue
                    number = self._numbers.get(sequence)
                    if number is None:
                        number, self._next = self._next, self._next + 1
                    numbers[sequence] = number
                    picture.owners[number] = Owner(group.request.request_id, sequence.index)
                    cells = there if table.on_host else here
                    for block in table.blocks:
                        cells[block] = number
            blocks = scheduler.blocks
            key = PoolKey(scheduler.worker_id, scheduler.epoch, False)
            picture.pools[key] = Cells(here, _references(blocks.pool))
            host_references = _references(blocks.host)
            for block in blocks.tier.blocks:
                host_references[block] = 0  # the cache's own reference: no sequence's
            picture.pools[key._replace(on_host=True)] = Cells(there, host_references)
        self._numbers = numbers
        return picture


def _references(pool: BlockPool) -> list[int]:
    """Reference counts of all blocks."""
    return pool.references + [0] * (pool.num_blocks - len(pool.references))


def _blank(blocks: BlockManager) -> tuple[list[int], list[int]]:
    """Owners of both memories before any sequence is looked at."""
    here, there = [FREE] * blocks.pool.num_blocks, [FREE] * blocks.host.num_blocks
    parked = blocks.cache.parked
    for block in parked:
        here[block] = CACHED
    for block in parked[len(parked) - blocks.cache.num_set_aside :]:
        here[block] = PINNED
    for block in blocks.tier.blocks:
        there[block] = CACHED
    return here, there


def changes(before: Picture, after: Picture) -> Changes:
    """What leads from one picture to a later one of the same painter."""
    workers = {key.worker_id for key in after.pools}
    pools: list[PoolChange] = []
    for key, cells in after.pools.items():
        known = before.pools.get(key)
        if known is None:
            total = len(cells.owners)
            runs = _runs(Cells([FREE] * total, [0] * total), cells)
            pools.append(PoolChange(key, total, runs))
        elif known is not cells:
            runs = _runs(known, cells)
            if runs.lengths:
                pools.append(PoolChange(key, None, runs))
    return Changes(
        gone_workers=sorted({key.worker_id for key in before.pools} - workers),
        owners=[(number, owner) for number, owner in after.owners.items() if number not in before.owners],
        pools=pools,
        ended_owners=[number for number in before.owners if number not in after.owners],
    )


def _runs(before: Cells, after: Cells) -> Runs:
    runs = Runs()
    end = 0  # of the last run
    for first in range(0, len(after.owners), STRETCH):
        last = first + STRETCH
        owners, references = after.owners[first:last], after.references[first:last]
        old_owners, old_references = before.owners[first:last], before.references[first:last]
        if owners == old_owners and references == old_references:
            continue
        rows = zip(owners, references, old_owners, old_references, strict=True)
        for block, (owner, count, old_owner, old_count) in enumerate(rows, first):
            if owner == old_owner and count == old_count:
                continue
            if block == end and runs.lengths and runs.owners[-1] == owner and runs.references[-1] == count:
                runs.lengths[-1] += 1
            else:
                runs.skips.append(block - end)
                runs.lengths.append(1)
                runs.owners.append(owner)
                runs.references.append(count)
            end = block + 1
    return runs
