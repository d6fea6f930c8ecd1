"""Moves whole blocks: pool to host arena, arena to pool, and within the pool.

On a GPU the copies between pool and arena run on streams of their own, beside the forward passes; `worker.copy_order`
says who waits for whom. On the CPU they are done at once, in the order of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kernels.backend import PagedKernels
from pagewire.runtime.fault_points import fault_point
from worker.copy_order import Blocks, CopyOrder
from worker.device import DeviceRuntime
from worker.kv_pool import KvPool
from worker.step import BlockMoves, PlanError
from worker.upload import Placed, Upload

_MEASURED_BYTES = 32 << 20
"""Bytes that a bandwidth measurement copies on the CPU: milliseconds, yet larger than the caches."""
_MEASURED_BYTES_CUDA = 1 << 30
"""On a GPU: some twenty milliseconds of the bus."""


@dataclass(frozen=True)
class Moves:
    """One plan's copies, checked, on their way to the device."""

    swap_out: BlockMoves
    swap_in: BlockMoves
    copies: BlockMoves
    copy_runs: Sequence[tuple[Placed, Placed]]
    """Sources and destinations of copies that may run at once, run after run."""


@dataclass(frozen=True)
class SwapTimes:
    """Nanoseconds that each kind of copy took."""

    swap_out_ns: int = 0
    swap_in_ns: int = 0
    copy_ns: int = 0


@dataclass(frozen=True)
class SwapMarks:
    """Between which marks each kind of copy ran, and how many bytes it moved; None: there was none."""

    swap_out: tuple[Any, Any] | None = None
    swap_in: tuple[Any, Any] | None = None
    copies: tuple[Any, Any] | None = None


@dataclass
class _Lane:
    """A stream for copies in one direction, and the ends of its copies by ticket."""

    stream: torch.cuda.Stream
    ends: dict[int, torch.cuda.Event] = field(default_factory=dict)

    def passed(self) -> int:
        """The last ticket whose copy is over. Forgets those before it, so that few are kept."""
        last = 0
        for ticket in list(self.ends):
            if not self.ends[ticket].query():
                break
            last = ticket
            del self.ends[ticket]
        return last

    def let_wait(self, stream: torch.cuda.Stream, ticket: int) -> None:
        """Makes `stream` wait for the copy with this ticket, unless it is over."""
        if ticket in self.ends:
            stream.wait_event(self.ends[ticket])


class Swapper:
    """Executes the block copies of step plans."""

    def __init__(self, pool: KvPool, kernels: PagedKernels, runtime: DeviceRuntime) -> None:
        self.pool = pool
        self.kernels = kernels
        self.runtime = runtime
        self.order = CopyOrder(pool.num_blocks, pool.num_host_blocks)
        device = pool.device_blocks.device
        self._lanes = (
            (_Lane(torch.cuda.Stream(device)), _Lane(torch.cuda.Stream(device))) if device.type == "cuda" else None
        )
        """Out and in."""

    def stage(self, swap_out: BlockMoves, swap_in: BlockMoves, copies: BlockMoves, upload: Upload) -> Moves:
        """Checks a plan's copies; PlanError if any id is wrong."""
        num_blocks, num_host_blocks = self.pool.num_blocks, self.pool.num_host_blocks
        _check(swap_out, num_blocks, num_host_blocks, "swap_out")
        _check(swap_in, num_host_blocks, num_blocks, "swap_in")
        _check(copies, num_blocks, num_blocks, "copies")
        runs = [(upload.put(run.sources), upload.put(run.destinations)) for run in independent_runs(copies)]
        return Moves(swap_out, swap_in, copies, runs)

    def may_follow(self, moves: Moves, written: Blocks) -> bool:
        """Whether a step that writes to these blocks may be enqueued before its copies: they only read, and other
        blocks. Then the device need not wait while the host enqueues them."""
        if self._lanes is None or not moves.swap_out.sources or moves.swap_in.sources or moves.copies.sources:
            return False
        return not np.isin(_ids(moves.swap_out.sources), written).any()

    def move(self, moves: Moves, behind: Any = None) -> SwapMarks:
        """Swaps out, swaps in, copies: as if in that order, and as if the step before were over. `behind`: the mark
        after that step, where something has been enqueued since that the copies need not wait for."""
        if not (moves.swap_out.sources or moves.swap_in.sources or moves.copies.sources):
            return SwapMarks()
        pool = self.pool
        out_marks = in_marks = copy_marks = None
        if moves.swap_out.sources:
            out_marks = self._swap(pool.device_blocks, pool.host_blocks, moves.swap_out, lane=0, behind=behind)
        fault_point("worker.step.mid_swap")
        if moves.swap_in.sources:
            in_marks = self._swap(pool.host_blocks, pool.device_blocks, moves.swap_in, lane=1)
        if moves.copies.sources:
            self.before_compute(_ids(moves.copies.sources), _ids(moves.copies.destinations))
            start = self.runtime.mark()
            for sources, destinations in moves.copy_runs:
                self.kernels.copy_blocks(pool.device_blocks, sources.tensor, destinations.tensor)
            copy_marks = (start, self.runtime.mark())
        return SwapMarks(out_marks, in_marks, copy_marks)

    @property
    def is_settled(self) -> bool:
        """No computation has to ask `before_compute`."""
        if self._lanes is None:
            return True
        if not self.order.is_settled:
            self.order.finished(self._lanes[0].passed(), self._lanes[1].passed())
        return self.order.is_settled

    def before_compute(self, held: Blocks, written: Blocks) -> None:
        """Makes what is enqueued next on the current stream wait for the copies that it depends on.

        It uses the blocks `held` and writes to `written`.
        """
        if self._lanes is None:
            return
        stream = torch.cuda.current_stream(self.pool.device_blocks.device)
        for lane, ticket in zip(self._lanes, self.order.compute(held, written), strict=True):
            lane.let_wait(stream, ticket)

    def times(self, marks: SwapMarks, moves: Moves, rates: tuple[int, int]) -> SwapTimes:
        """How long the copies took; for one that still runs, how long it takes at the measured rate (bytes/s)."""

        def took(pair: tuple[Any, Any] | None, count: int, rate: int) -> int:
            if pair is None:
                return 0
            if self._lanes is not None and not pair[1].query():
                return count * self.pool.layout.block_bytes * 1_000_000_000 // max(1, rate)
            return self.runtime.elapsed_ns(*pair)

        return SwapTimes(
            took(marks.swap_out, len(moves.swap_out.sources), rates[0]),
            took(marks.swap_in, len(moves.swap_in.sources), rates[1]),
            took(marks.copies, len(moves.copies.sources), 1),
        )

    def measure(self) -> tuple[int, int]:
        """Bytes per second of swapping out and of swapping in; (0, 0) without an arena.

        Overwrites blocks of pool and arena, so it runs before the first plan.
        """
        pool, block_bytes = self.pool, self.pool.layout.block_bytes
        wanted = _MEASURED_BYTES if self._lanes is None else _MEASURED_BYTES_CUDA
        count = min(pool.num_blocks, pool.num_host_blocks, max(1, wanted // block_bytes))
        if not count:
            return 0, 0
        ids = BlockMoves(list(range(count)), list(range(count)))
        rates = []
        for source, destination in (
            (pool.device_blocks, pool.host_blocks),
            (pool.host_blocks, pool.device_blocks),
        ):
            self._copy(source, destination, ids)  # the first touch of fresh memory is not what is measured
            self._synchronize()
            start = time.perf_counter_ns()
            self._copy(source, destination, ids)
            self._synchronize()
            elapsed = max(1, time.perf_counter_ns() - start)
            rates.append(count * block_bytes * 1_000_000_000 // elapsed)
        return rates[0], rates[1]

    def _swap(
        self, source: torch.Tensor, destination: torch.Tensor, moves: BlockMoves, lane: int, behind: Any = None
    ) -> tuple[Any, Any]:
        """Copies between pool and arena; on a GPU on the stream of its direction (0: out, 1: in)."""
        if self._lanes is None:
            start = self.runtime.mark()
            self._copy(source, destination, moves)
            return start, self.runtime.mark()
        own, other = self._lanes[lane], self._lanes[1 - lane]
        self.order.finished(self._lanes[0].passed(), self._lanes[1].passed())
        sources, destinations = _ids(moves.sources), _ids(moves.destinations)
        enqueue = self.order.copy_in if lane else self.order.copy_out
        ticket = enqueue(sources, destinations)
        # Behind all computation enqueued so far: it may still write what is copied out, or read what is overwritten.
        if behind is None:
            own.stream.wait_stream(torch.cuda.current_stream(self.pool.device_blocks.device))
        else:
            own.stream.wait_event(behind)
        other.let_wait(own.stream, ticket)
        with torch.cuda.stream(own.stream):
            start = self.runtime.mark()
            self._copy(source, destination, moves)
            end = self.runtime.mark()
        own.ends[self.order.ins if lane else self.order.outs] = end
        return start, end

    def _copy(self, source: torch.Tensor, destination: torch.Tensor, moves: BlockMoves) -> None:
        """Ids stay on the host where copies are made one run of neighbours at a time."""
        self.kernels.swap_blocks(source, destination, torch.tensor(moves.sources), torch.tensor(moves.destinations))

    def _synchronize(self) -> None:
        self.runtime.wait(self.runtime.mark())


def independent_runs(moves: BlockMoves) -> Iterator[BlockMoves]:
    """Cuts a list of copies within one pool so that no run reads a block that it writes, or writes one that it reads.

    In a run the copies may happen in any order or at once; run after run the result is that of copying one by one.
    """
    sources: list[int] = []
    destinations: list[int] = []
    touched: tuple[set[int], set[int]] = (set(), set())
    for source, destination in zip(moves.sources, moves.destinations, strict=True):
        read, written = touched
        if source in written or destination in read:
            yield BlockMoves(sources, destinations)
            sources, destinations = [], []
            touched = read, written = (set(), set())
        sources.append(source)
        destinations.append(destination)
        read.add(source)
        written.add(destination)
    if sources:
        yield BlockMoves(sources, destinations)


def _check(moves: BlockMoves, num_sources: int, num_destinations: int, where: str) -> None:
    if len(moves.sources) != len(moves.destinations):
        raise PlanError(f"{where}: {len(moves.sources)} sources, {len(moves.destinations)} destinations")
    if _outside(moves.sources, num_sources) or _outside(moves.destinations, num_destinations):
        raise PlanError(f"{where}: a block id beyond {num_sources} sources or {num_destinations} destinations")
    if len(set(moves.destinations)) != len(moves.destinations):
        raise PlanError(f"{where}: a destination appears twice")


def _outside(ids: Sequence[int], count: int) -> bool:
    return bool(ids) and not (min(ids) >= 0 and max(ids) < count)


def _ids(blocks: Sequence[int]) -> Blocks:
    return np.asarray(blocks, dtype=np.int64)
