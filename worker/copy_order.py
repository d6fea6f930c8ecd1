"""Which copies between pool and arena must wait for which: the order of three queues over the same blocks.

Plans are to be understood as if each had finished before the next. In truth three queues of the device run side by
side: computation (forward passes and copies within the pool, in plan order), copies out, copies in. Between two queues
these orders matter, and no others:

    earlier                                later                              who waits
    computation writes a block             a copy out reads it                the copy out, for all computation before
    computation reads a block              a copy in writes it                the copy in, for all computation before
    a copy out reads a block               computation writes it              computation: the block was freed
    a copy in writes a block               computation uses it                computation, in the step that uses it
    a copy out reads a block               a copy in writes it                the copy in: the block was freed
    a copy in writes a block               a copy out reads it                the copy out: swapped out again
    a copy out writes a host block         a copy in reads it                 the copy in
    a copy in reads a host block           a copy out writes it               the copy out: the host block was freed

Copies of one queue run in their order. So each copy gets a ticket, counted by queue, and each block remembers the last
ticket that touched it: to wait for a ticket is to wait for all before it in its queue.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.int64]


class CopyOrder:
    """Tickets of copies by block. Nothing here knows of streams; `worker.swapper` turns tickets into waits."""

    def __init__(self, num_blocks: int, num_host_blocks: int) -> None:
        self.outs = 0
        """Copies out so far: the last one's ticket."""
        self.ins = 0
        """Copies in so far."""
        self._read_by_out = np.zeros(num_blocks, dtype=np.int64)
        self._written_by_in = np.zeros(num_blocks, dtype=np.int64)
        self._written_by_out = np.zeros(num_host_blocks, dtype=np.int64)
        self._read_by_in = np.zeros(num_host_blocks, dtype=np.int64)
        self._compute_saw_out = self._compute_saw_in = self._out_saw_in = self._in_saw_out = 0

    @property
    def is_settled(self) -> bool:
        """Computation has waited for every copy: none of its steps has to ask."""
        return self._compute_saw_out == self.outs and self._compute_saw_in == self.ins

    def copy_out(self, sources: Blocks, destinations: Blocks) -> int:
        """Enqueues a copy of pool blocks to host blocks. Returns the copy in it must wait for; 0: none."""
        self.outs += 1
        wait = max(_last(self._written_by_in, sources), _last(self._read_by_in, destinations))
        self._read_by_out[sources] = self.outs
        self._written_by_out[destinations] = self.outs
        wait, self._out_saw_in = (wait, wait) if wait > self._out_saw_in else (0, self._out_saw_in)
        return wait

    def copy_in(self, sources: Blocks, destinations: Blocks) -> int:
        """Enqueues a copy of host blocks to pool blocks. Returns the copy out it must wait for; 0: none."""
        self.ins += 1
        wait = max(_last(self._written_by_out, sources), _last(self._read_by_out, destinations))
        self._read_by_in[sources] = self.ins
        self._written_by_in[destinations] = self.ins
        wait, self._in_saw_out = (wait, wait) if wait > self._in_saw_out else (0, self._in_saw_out)
        return wait

    def compute(self, held: Blocks, written: Blocks) -> tuple[int, int]:
        """Enqueues computation that uses the blocks `held` and writes to `written`.

        Returns the copy out and the copy in it must wait for; 0: none.
        """
        wait_out = _last(self._read_by_out, written)
        wait_in = max(_last(self._written_by_in, held), _last(self._written_by_in, written))
        wait_out, self._compute_saw_out = (
            (wait_out, wait_out) if wait_out > self._compute_saw_out else (0, self._compute_saw_out)
        )
        wait_in, self._compute_saw_in = (
            (wait_in, wait_in) if wait_in > self._compute_saw_in else (0, self._compute_saw_in)
        )
        return wait_out, wait_in

    def finished(self, outs: int, ins: int) -> None:
        """Copies up to these tickets are known to be over: nobody has to wait for them."""
        self._compute_saw_out = max(self._compute_saw_out, outs)
        self._in_saw_out = max(self._in_saw_out, outs)
        self._compute_saw_in = max(self._compute_saw_in, ins)
        self._out_saw_in = max(self._out_saw_in, ins)


def _last(tickets: Blocks, blocks: Blocks) -> int:
    """The latest ticket of any of the blocks."""
    return int(tickets[blocks].max()) if blocks.size else 0
