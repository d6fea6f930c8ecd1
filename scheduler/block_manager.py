"""The block manager: fork, append, free, swap out, swap in and prefix lookup over block tables.

It owns the logical side of both memories of one worker and moves no bytes: verbs that need a copy return it, for the
step plan. A block is free for reuse as soon as the verb that freed it returns, because a plan is executed as if all
plans before it had completed.

A write may only go to a block with one reference. Full blocks are never written again, so they are shared freely
(prefix cache, forks); the partial last block of a fork is copied first (`make_private`: copy-on-write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.block_pool import BlockPool
from scheduler.block_table import BlockTable, blocks_for
from scheduler.host_tier import HostTier
from scheduler.prefix_cache import PrefixCache
from scheduler.step_plan import BlockMoves

LEAST_CLEAN = 256
"""Blocks, free or copied out, that the next plans find: as many as two steps of 2048 tokens take."""
PEAK_MEMORY = 0.99
"""How much of the most blocks that a plan took is remembered at the next. Where 512 sequences began together, every
sixteenth plan takes 512 blocks."""


class BlockManager:
    """Block tables over a KV pool, a host arena and a prefix cache. Callers check `num_free` before they take."""

    __slots__ = ("_peak", "_taken", "block_size", "cache", "host", "most_clean", "pool", "tier")

    def __init__(self, *, num_blocks: int, host_blocks: int, block_size: int, host_cache: bool = False) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host = BlockPool(host_blocks)
        self.cache = PrefixCache()
        self.tier = HostTier(self.host, is_on=host_cache and host_blocks > 0)
        self.most_clean = host_blocks // 4  # the arena holds them although the pool does
        self._taken = 0  # blocks that the plan being made has taken
        self._peak = 0.0  # the most that one took lately

    @property
    def num_free(self) -> int:
        """KV blocks that can be taken: free ones, and cached ones that nobody refers to."""
        return self.pool.num_free + self.cache.num_unreferenced

    @property
    def num_used(self) -> int:
        """KV blocks that some table refers to."""
        return self.pool.num_blocks - self.num_free - self.cache.num_set_aside

    def append(self, table: BlockTable) -> int:
        """Appends a block to a table and returns its id. Raises OutOfBlocksError."""
        block = self._take()
        table.blocks.append(block)
        return block

    def append_to_each(self, tables: list[BlockTable]) -> list[int]:
        """Appends a block to every table and returns their ids. Raises OutOfBlocksError."""
        blocks = self._take_many(len(tables))
        for table, block in zip(tables, blocks, strict=True):
            table.blocks.append(block)
        return blocks

    def extend(self, table: BlockTable, num_tokens: int) -> None:
        """Appends blocks until the table holds `num_tokens` tokens."""
        count = blocks_for(num_tokens, self.block_size) - len(table.blocks)
        if count > 0:
            table.blocks.extend(self._take_many(count))

    def fork(self, parent: BlockTable, num_blocks: int | None = None) -> BlockTable:
        """A new table that shares the parent's blocks, or its first `num_blocks`, in the memory where they are."""
        child = BlockTable(parent.blocks[:num_blocks])
        child.on_host = parent.on_host
        pool = self.host if parent.on_host else self.pool
        for block in child.blocks:
            pool.share(block)
        return child

    def is_shared(self, table: BlockTable, index: int) -> bool:
        """Whether another table refers to the block as well."""
        return self.pool.references[table.blocks[index]] > 1

    def make_private(self, table: BlockTable, index: int) -> tuple[int, int] | None:
        """Copy-on-write: replaces a shared block by a fresh one. Returns (source, destination) of the copy, or None."""
        source = table.blocks[index]
        if self.pool.references[source] == 1:
            return None
        destination = self._take()
        self.pool.drop(source)
        table.blocks[index] = destination
        return source, destination

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Gives up the blocks behind the first `num_tokens` tokens, wherever the table is. It goes through the arena
        before it is written again: in the pool its last block, now partial, may be findable by what it held."""
        count = blocks_for(num_tokens, self.block_size)
        rest = BlockTable(table.blocks[count:])
        rest.on_host = table.on_host
        del table.blocks[count:]
        self.free(rest)

    def free(self, table: BlockTable) -> None:
        """Empties a table. Its registered blocks stay findable until they are needed, the last ones go first."""
        if table.on_host:
            self.host.put_back_many(self.host.drop_many(table.blocks))
        else:
            self._drop(reversed(table.blocks))
        table.blocks = []
        table.on_host = False

    # ---- swapping: tables of one group, all or nothing, shared blocks moved once

    def swap_out_need(self, tables: Iterable[BlockTable]) -> int:
        """Host blocks that swap_out would take."""
        return len({block for table in tables for block in table.blocks})

    def swap_out(self, tables: list[BlockTable]) -> BlockMoves:
        """Moves tables to the host arena; sharing among them is kept. Raises OutOfBlocksError."""
        self.tier.make_room(self.swap_out_need(tables))
        moved: dict[int, int] = {}
        for table in tables:
            for position, block in enumerate(table.blocks):
                host_block = moved.get(block)
                if host_block is None:
                    host_block = moved[block] = self.host.take()
                else:
                    self.host.share(host_block)
                table.blocks[position] = host_block
                self._drop((block,))
            table.on_host = True
        return BlockMoves(list(moved), list(moved.values()))

    def swap_in_need(self, tables: Iterable[BlockTable], num_full: list[int]) -> int:
        """KV blocks that swap_in would take."""
        tables = list(tables)
        shared = {block for table, full in zip(tables, num_full, strict=True) for block in table.blocks[:full]}
        return len(shared) + sum(len(table) - full for table, full in zip(tables, num_full, strict=True))

    def swap_in(self, tables: list[BlockTable], num_full: list[int]) -> BlockMoves:
        """Moves tables back to the KV pool. The first `num_full[i]` blocks of table i stay shared as they were; the
        others will be written, so each table gets its own (a host block may then be the source of several copies)."""
        moves = BlockMoves()
        moved: dict[int, int] = {}
        emptied = []
        for table, full in zip(tables, num_full, strict=True):
            for position, host_block in enumerate(table.blocks):
                block = moved.get(host_block) if position < full else None
                if block is None:
                    block = self._take()
                    moves.sources.append(host_block)
                    moves.destinations.append(block)
                    if position < full:
                        moved[host_block] = block
                else:
                    self.pool.share(block)
                table.blocks[position] = block
                emptied.append(host_block)
            table.on_host = False
        for host_block in emptied:
            self.tier.release(host_block)
        return moves

    # ---- prefix cache

    def find_prefix(self, keys: list[bytes]) -> list[int]:
        """Blocks of the longest cached beginning of a chain. Nothing changes; share_prefix takes them."""
        return self.cache.find(keys)

    def num_parked(self, blocks: Iterable[int]) -> int:
        """How many of found blocks count as free now: sharing them takes that many."""
        return sum(map(self.cache.is_parked, blocks))

    def share_prefix(self, table: BlockTable, blocks: list[int]) -> None:
        """Appends found blocks to an empty table."""
        for block in blocks:
            self.pool.share(block)
            self.cache.revive(block)
        table.blocks.extend(blocks)

    def fill_from_host(self, table: BlockTable, first: int, host_blocks: list[int], keys: list[bytes]) -> BlockMoves:
        """Copies blocks taken from the host tier into a table's blocks from index `first` on, and makes them findable
        there. The plan that is being made copies before it computes, so it may already share them."""
        destinations = table.blocks[first : first + len(keys)]
        self.cache.register(zip(destinations, keys, strict=True))
        return BlockMoves(host_blocks, destinations)

    def register(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Makes used, full blocks findable by their keys."""
        self.cache.register(blocks)

    def clean(self) -> None:
        """Copies out, by the plan that is being made, what the next two plans will take if they take as many as the
        largest lately, so that their steps need not wait for copies: many at a time, because a step with copies beside
        it costs a little more than one without. Nothing is taken or freed in the pool."""
        taken, self._taken = self._taken, 0
        self._peak = max(taken, self._peak * PEAK_MEMORY)
        wanted = min(self.most_clean, max(LEAST_CLEAN, 2 * int(self._peak)))
        missing = wanted - self.pool.num_free - self.cache.num_clean
        if 2 * missing < wanted:
            return
        # A step that computes as much as so many blocks hold takes longer than their copies.
        count = min(missing, max(LEAST_CLEAN, taken) - self.tier.num_copies)
        while count > 0 and (dirty := self.cache.next_to_clean()) and self.tier.keep(*dirty):
            self.cache.cleaned(dirty[0])
            count -= 1

    def forget(self, keys: Iterable[bytes]) -> None:
        """Makes blocks unfindable, because their contents are not what their keys say."""
        for key in keys:
            self.tier.forget(key)
            block = self.cache.forget(key)
            if block is not None:
                self.pool.put_back(block)

    # ---- with extend and forget, all that touches the free list of the KV pool

    def _take(self) -> int:
        self._taken += 1
        if not self.pool.num_free and self.cache.num_unreferenced:
            self._evict()
        return self.pool.take()

    def _take_many(self, count: int) -> list[int]:
        self._taken += count
        missing = count - self.pool.num_free
        if missing > 0:
            for _ in range(min(missing, self.cache.num_unreferenced)):
                self._evict()
        return self.pool.take_many(count)

    def _evict(self) -> None:
        block, key = self.cache.evict()
        if self.tier.is_on:
            self.tier.evicted(block, key)
        self.pool.put_back(block)

    def _drop(self, blocks: Iterable[int]) -> None:
        self.pool.put_back_many(self.cache.park_many(self.pool.drop_many(blocks)))

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises AssertionError unless both memories' books agree with all live tables."""
        here: Counter[int] = Counter()
        on_host: Counter[int] = Counter()
        for table in tables:
            assert len(set(table.blocks)) == len(table.blocks), f"a block is twice in {table}"
            (on_host if table.on_host else here).update(table.blocks)
        on_host.update(self.tier.blocks)
        self.pool.check_integrity(dict(here), self.cache.parked)
        self.host.check_integrity(dict(on_host), ())
        self.cache.check_integrity()
