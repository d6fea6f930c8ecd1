"""The second tier of the prefix cache: full blocks that the KV pool gives up, kept in the host arena.

    KV pool:  used ──▶ parked (findable) ──soon the next to go──▶ clean (findable) ──evicted──▶ reused
                                             │ copy out, beside the step
    host arena:                              ▼
                          kept (findable) ──hit──▶ copied in, and gone from here
                                └──▶ given up, the one kept for longest first, when a swap or a newer block needs room

A step that writes to a block must wait for its copy out, which can begin only when the step before is over. So blocks
are copied a plan or more before they are reused, and are in both tiers until then. One that is needed sooner may be
copied by the plan that reuses it, as long as such waits are paid for by what comes back; else it is simply gone.

A plan copies out before it copies in. So a host block that a plan reads must not be written by the same plan: what was
read is on hold until the plan has been made.
"""

from __future__ import annotations

from collections import OrderedDict

from scheduler.block_pool import BlockPool
from scheduler.step_plan import NO_MOVES, BlockMoves

MOST_CREDIT = 256
"""Copies that steps may wait for before a kept block has come back: at 2 MiB each and 50 GB/s they take 10 ms."""
CREDIT_PER_HIT = 4
"""Such copies that a block which comes back pays for. On an H100 computing its 16 tokens takes nine times as long."""


class HostTier:
    """Keys of kept blocks, and the copies of the plan that is being made."""

    __slots__ = (
        "_block_of",
        "_credit",
        "_destinations",
        "_new",
        "_on_hold",
        "_sources",
        "host",
        "is_on",
        "is_worth_it",
    )

    def __init__(self, host: BlockPool, *, is_on: bool) -> None:
        self.host = host
        self.is_on = is_on
        self.is_worth_it = True  # said anew for every plan: keeping a block is cheaper than computing it again
        self._block_of: OrderedDict[bytes, int] = OrderedDict()  # kept for longest first
        self._credit = MOST_CREDIT
        self._sources: list[int] = []  # KV blocks that the plan copies out
        self._destinations: list[int] = []  # host blocks that it copies them to
        self._new: set[bytes] = set()  # keys of those, and of those kept once more; the last ones in _block_of
        self._on_hold: list[int] = []  # host blocks that it reads: free once it has been made

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def num_available(self) -> int:
        """Host blocks that make_room could free for a swap."""
        return self.host.num_free + len(self._block_of) - len(self._new)

    def keep(self, block: int, key: bytes) -> bool:
        """A block of the KV pool is copied out, if it has not been and there is room. False: it is not kept."""
        if key in self._block_of:
            self._block_of.move_to_end(key)
            self._new.add(key)
            return True
        if not self.is_worth_it:
            return False
        if not self.host.num_free:
            self._give_up_oldest()
        if not self.host.num_free:
            return False
        kept = self._block_of[key] = self.host.take()
        self._sources.append(block)
        self._destinations.append(kept)
        self._new.add(key)
        return True

    def evicted(self, block: int, key: bytes) -> None:
        """The plan that is being made reuses a block of the KV pool. If it is not kept yet, the step has to wait for
        its copy."""
        is_kept = key in self._block_of
        if (is_kept or self._credit) and self.keep(block, key) and not is_kept:
            self._credit -= 1

    @property
    def num_copies(self) -> int:
        """Blocks that the plan which is being made copies out for the cache."""
        return len(self._sources)

    def find(self, keys: list[bytes]) -> list[bytes]:
        """The longest beginning of `keys` that is kept here. Nothing changes; `take` takes them."""
        count = 0
        for key in keys:
            if key not in self._block_of:
                break
            count += 1
        return keys[:count]

    def take(self, keys: list[bytes]) -> list[int]:
        """Host blocks of found keys, to be copied in by the plan that is being made; they are no longer kept."""
        blocks = [self._block_of.pop(key) for key in keys]
        self._credit = min(MOST_CREDIT, self._credit + CREDIT_PER_HIT * len(blocks))
        self._new.difference_update(keys)
        for block in blocks:
            self.release(block)
        return blocks

    def release(self, block: int) -> None:
        """One reference less to a host block that the plan being made reads."""
        if self.host.drop(block):
            if self.is_on:
                self._on_hold.append(block)
            else:
                self.host.put_back(block)

    def make_room(self, count: int) -> None:
        """Gives up kept blocks until `count` are free, or no more can be."""
        while self.host.num_free < count and self._give_up_oldest():
            pass

    def forget(self, key: bytes) -> None:
        """Gives up a block whose contents are not what its key says."""
        block = self._block_of.pop(key, None)
        if block is not None and self.host.drop(block):
            self.host.put_back(block)

    def flush(self) -> BlockMoves:
        """The plan is being handed out: its copies out, after which what it reads is free."""
        self._new.clear()
        if not (self._sources or self._on_hold):
            return NO_MOVES
        moves = BlockMoves(self._sources, self._destinations)
        self._sources, self._destinations = [], []
        for block in self._on_hold:
            self.host.put_back(block)
        self._on_hold.clear()
        return moves

    def _give_up_oldest(self) -> bool:
        """Frees the block kept for longest. False: there is none but those that the plan keeps."""
        if len(self._block_of) <= len(self._new):
            return False
        _, block = self._block_of.popitem(last=False)
        self.host.drop(block)
        self.host.put_back(block)
        return True

    @property
    def blocks(self) -> list[int]:
        """Host blocks that are kept."""
        return list(self._block_of.values())
