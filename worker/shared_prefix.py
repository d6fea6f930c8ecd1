"""What rows of the decode set have in common at their beginning: the same blocks, which attention then reads once.

Decode attention reads each row's whole context, a row at a time. Rows that begin with the same blocks (parallel
samples, beams, requests behind one system prompt) make it read those blocks once per row, from the L2 cache at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FEWEST_ROWS = 16
"""Rows below which reading a prefix once gains nothing."""
FEWEST_TOKENS = 32_768
"""Tokens of the prefix times rows that share it, from which on it gains more than a second kernel costs: about 40 us of
reading from L2 a layer against 15 us, on an H100."""

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prefix:
    """Blocks that rows have in common."""

    slots: Slots
    """The rows: their slots, ascending as they were given."""
    blocks: int
    """How many blocks, all of them full and written by nobody."""


def largest(tables: npt.NDArray[np.int32], known: Slots, slots: Slots, block_size: int) -> Prefix | None:
    """The prefix that saves most reading, if it is worth it.

    tables int32 [rows, columns], known int64 [rows]: tokens of each row, the one to compute included; slots int64 [D]:
    the decode set. Two rows that have the same block in the same column have the same blocks before it: blocks are
    shared from the beginning on, when sequences fork and when they find cached prefixes.
    """
    if slots.size < FEWEST_ROWS:
        return None
    full = (known[slots] - 1) // block_size  # the block behind is written to
    best: tuple[int, Slots] | None = None
    columns, depth = tables.shape[1], 1
    while depth <= columns:
        # Depths double: a prefix that ends between two of them is found at the lower one and then measured.
        long = slots[full >= depth]
        if long.size < FEWEST_ROWS:
            break
        column = np.sort(tables[long, depth - 1])
        if not (
            column[FEWEST_ROWS - 1 :] == column[: 1 - FEWEST_ROWS]
        ).any():  # no block that often, and deeper neither
            break
        found, counts = np.unique(column, return_counts=True)
        most = int(counts.argmax())
        score = depth * int(counts[most])
        if best is None or score > best[0]:
            best = score, long[tables[long, depth - 1] == found[most]]
        depth *= 2
    if best is None:
        return None
    rows = best[1]
    width = int((known[rows].min() - 1) // block_size)
    same = (tables[rows, :width] == tables[rows[0], :width]).all(axis=0)
    blocks = width if same.all() else int(same.argmin())
    return Prefix(rows, blocks) if blocks * block_size * rows.size >= FEWEST_TOKENS else None
