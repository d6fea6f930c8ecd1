"""The prefix cache: full blocks found again by what is in them.

A block's key is the SHA-256 of its tokens and everything before them, salted per tenant:

    key(i) = SHA-256(SHA-256(tenant) + tokens of blocks 0..i, 4 bytes little-endian each)

so equal keys mean equal prefixes (and an equal tenant), and a KV block, which depends on exactly those, can be shared.
One hash runs over a prompt and is read at the end of each block, so a prompt is hashed once in all.
Blocks that nobody refers to stay findable until the pool needs them; the one unused for longest goes first.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash


@lru_cache(maxsize=1024)
def _salted(tenant: str) -> _Hash:
    return sha256(sha256(tenant.encode("utf-8", "surrogatepass")).digest())


def start_chain(tenant: str) -> _Hash:
    """The hash before the first block; extend_chain goes on from it."""
    return _salted(tenant).copy()


def extend_chain(chain: _Hash, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Keys of the full blocks of `tokens` (token ids below 2**32), which follow what is in `chain` already; then those
    blocks are in it too."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    raw, width = packed.tobytes(), 4 * block_size
    keys = []
    for end in range(width, len(raw) + 1, width):
        chain.update(raw[end - width : end])
        keys.append(chain.digest())
    return keys


class PrefixCache:
    """Key to block and back, and the unreferenced blocks in the order in which they will be given up: first those that
    are clean, which means that the host tier has a copy. Those with a pinned key are set aside and not given up."""

    __slots__ = ("_block_of", "_clean", "_key_of", "_pinned", "_set_aside", "_unreferenced")

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unreferenced: OrderedDict[int, None] = OrderedDict()  # but those that are clean
        self._clean: OrderedDict[int, None] = OrderedDict()  # unreferenced for longer than all others
        self._pinned: set[bytes] = set()  # whether there are blocks of them or not
        self._set_aside: dict[int, None] = {}  # unreferenced blocks with a pinned key

    @property
    def num_unreferenced(self) -> int:
        return len(self._unreferenced) + len(self._clean)

    @property
    def num_clean(self) -> int:
        return len(self._clean)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def find(self, keys: list[bytes]) -> list[int]:
        """Blocks of the longest known beginning of a chain. Nothing changes."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Makes used blocks findable. The first block of a key stays; a block has one key."""
        block_of, key_of = self._block_of, self._key_of
        for block, key in blocks:
            if block not in key_of and block_of.setdefault(key, block) == block:
                key_of[block] = key

    def park_many(self, blocks: Iterable[int]) -> list[int]:
        """Keeps blocks whose last references are gone, the first to be given up first. Returns those that are not
        registered, in order: they should become free."""
        key_of, pinned, others = self._key_of, self._pinned, []
        for block in blocks:
            key = key_of.get(block)
            if key is None:
                others.append(block)
            elif pinned and key in pinned:
                self._set_aside[block] = None
            else:
                self._unreferenced[block] = None
        return others

    def revive(self, block: int) -> bool:
        """Takes a block that is referenced again out of the unreferenced ones. False: it was referenced all along."""
        if block in self._set_aside:
            del self._set_aside[block]
            return True
        return self._clean.pop(block, self) is not self or self._unreferenced.pop(block, self) is not self

    def is_parked(self, block: int) -> bool:
        return block in self._unreferenced or block in self._clean

    def next_to_clean(self) -> tuple[int, bytes] | None:
        """The block, with its key, that will be given up first after those that are clean; None: all are."""
        block = next(iter(self._unreferenced), None)
        return None if block is None else (block, self._key_of[block])

    def cleaned(self, block: int) -> None:
        """The host tier has a copy of `next_to_clean`."""
        del self._unreferenced[block]
        self._clean[block] = None

    def evict(self) -> tuple[int, bytes]:
        """Gives up the block that has been unreferenced for longest, and its key; KeyError when there is none."""
        block, _ = (self._clean or self._unreferenced).popitem(last=False)
        key = self._key_of.pop(block)
        del self._block_of[key]
        return block, key

    @property
    def num_set_aside(self) -> int:
        return len(self._set_aside)

    def pin(self, keys: Iterable[bytes]) -> None:
        """Blocks of these keys are not given up, now or once they are registered."""
        self._pinned.update(keys)
        for key in keys:
            block = self._block_of.get(key)
            if block is not None and self.is_parked(block):
                self.revive(block)
                self._set_aside[block] = None

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Blocks of these keys are like all others again."""
        self._pinned.difference_update(keys)
        for key in keys:
            block = self._block_of.get(key)
            if block is not None and block in self._set_aside:
                del self._set_aside[block]
                self._unreferenced[block] = None

    def yield_pinned(self) -> bool:
        """Blocks that are set aside may be given up this once. False: there are none."""
        if not self._set_aside:
            return False
        self._unreferenced.update(self._set_aside)
        self._set_aside.clear()
        return True

    def forget(self, key: bytes) -> int | None:
        """Makes a key unfindable. Returns its block if that was unreferenced and should become free."""
        block = self._block_of.pop(key, None)
        if block is None:
            return None
        del self._key_of[block]
        return block if self.revive(block) else None

    @property
    def parked(self) -> list[int]:
        """The unreferenced blocks, next victim first, those that are set aside last."""
        return [*self._clean, *self._unreferenced, *self._set_aside]

    def check_integrity(self) -> None:
        """Raises AssertionError unless both indexes say the same."""
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "the two indexes differ"
        given_up = self._unreferenced.keys() | self._clean.keys()
        assert given_up <= self._key_of.keys(), "an unreferenced block is not registered"
        assert not given_up & self._set_aside.keys(), "a block is set aside and to be given up"
        assert not self._unreferenced.keys() & self._clean.keys(), "a block is clean and is not"
        assert all(self._key_of[block] in self._pinned for block in self._set_aside), "a block is set aside unpinned"
