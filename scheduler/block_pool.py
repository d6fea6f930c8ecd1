"""The block pool: which blocks of one memory are free, and how many block tables refer to each of the others.

One class serves both memories, the KV pool and the host arena. A block is in exactly one of three states:

    free     reference count 0, on the free list
    used     reference count at least 1
    parked   reference count 0, not on the free list: somebody (the prefix cache) keeps its contents for later

The pool chooses no victims and knows no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocksError(RuntimeError):
    """A block was taken from an empty pool. Callers check for room first, so this is always a bug."""


class BlockPool:
    """Reference counts and a free list over block ids 0..num_blocks-1. A fresh pool hands out 0, 1, 2, ..."""

    __slots__ = ("_free", "num_blocks", "references")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}, must not be negative")
        self.num_blocks = num_blocks
        # Both know only blocks that have been taken before: a pool of a thousand workers may have 50 million, and what
        # is kept of each costs memory and the time of a full garbage collection.
        self.references: list[int] = []  # by block id
        self._free: list[int] = []  # a stack: the block freed last is reused first, so the touched part stays small

    @property
    def num_free(self) -> int:
        """Free blocks; parked ones are not counted."""
        return len(self._free) + self.num_blocks - len(self.references)

    def take(self) -> int:
        """A free block, with one reference. Raises OutOfBlocksError when there is none."""
        if self._free:
            block = self._free.pop()
            self.references[block] = 1
            return block
        block = len(self.references)
        if block >= self.num_blocks:
            raise OutOfBlocksError(f"all {self.num_blocks} blocks are taken")
        self.references.append(1)
        return block

    def take_many(self, count: int) -> list[int]:
        """`count` free blocks, with one reference each. Raises OutOfBlocksError, and takes none, if there are fewer."""
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks are wanted, {self.num_free} of {self.num_blocks} are free")
        references = self.references
        first = max(0, len(self._free) - count)
        blocks = self._free[first:]
        del self._free[first:]
        blocks.reverse()
        for block in blocks:
            references[block] = 1
        fresh = count - len(blocks)
        if fresh:
            blocks.extend(range(len(references), len(references) + fresh))
            references.extend([1] * fresh)
        return blocks

    def share(self, block: int) -> None:
        """One more reference to a used or parked block."""
        self.references[block] += 1

    def drop(self, block: int) -> bool:
        """One reference less. True: it was the last one; the caller then puts the block back or parks it."""
        return bool(self.drop_many((block,)))

    def drop_many(self, blocks: Iterable[int]) -> list[int]:
        """One reference less to each. Returns those whose last one it was, in order, as `drop` tells of one."""
        references, dropped = self.references, []
        for block in blocks:
            left = references[block] - 1 if block < len(references) else -1
            if left < 0:
                raise AssertionError(f"block {block} has no reference to drop")
            references[block] = left
            if not left:
                dropped.append(block)
        return dropped

    def put_back(self, block: int) -> None:
        """An unreferenced block becomes free."""
        self._free.append(block)

    def put_back_many(self, blocks: Iterable[int]) -> None:
        """Unreferenced blocks become free; the last one is reused first."""
        self._free.extend(blocks)

    def check_integrity(self, expected_references: dict[int, int], parked: Iterable[int]) -> None:
        """Raises AssertionError unless free + used + parked == total and the counts are the expected ones."""
        free, parked = set(self._free), set(parked)
        used = {block for block, count in enumerate(self.references) if count}
        assert len(free) == len(self._free), "a block is twice on the free list"
        assert not free & used, f"blocks {sorted(free & used)} are free and used"
        assert not free & parked, f"blocks {sorted(free & parked)} are free and parked"
        assert not used & parked, f"blocks {sorted(used & parked)} are used and parked"
        assert len(free) + len(used) + len(parked) == len(self.references) <= self.num_blocks, "a block is lost"
        counted = {block: self.references[block] for block in used}
        assert counted == expected_references, f"references {counted} != table entries {expected_references}"
