"""The block table: where a sequence's tokens live, in order, like a process's page table.

With a block size of 4, a sequence of 10 tokens whose first 7 are computed:

    position      0 1 2 3 | 4 5 6 7 | 8 9 . .
    block table      5    |    2    |    9
    KV            # # # #   # # # .   . . . .

Blocks [0, n // block_size) of n tokens are full; block n // block_size is the partial one, if n is no multiple.
"""

from __future__ import annotations


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockTable:
    """Block ids of one sequence: of the KV pool, or of the host arena while the sequence is swapped out."""

    __slots__ = ("blocks", "on_host")

    def __init__(self, blocks: list[int] | None = None) -> None:
        self.blocks: list[int] = [] if blocks is None else blocks
        self.on_host = False

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return f"<BlockTable {'host ' if self.on_host else ''}{self.blocks}>"
