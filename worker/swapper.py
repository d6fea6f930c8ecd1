"""Moves whole blocks: pool to host arena, arena to pool, and within the pool."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels.backend import PagedKernels
from pagewire.runtime.fault_points import fault_point
from worker.kv_pool import KvPool
from worker.step import BlockMoves, PlanError

_MEASURED_BYTES = 32 << 20
"""Bytes that a bandwidth measurement copies: milliseconds, yet larger than the caches."""


@dataclass(frozen=True)
class SwapTimes:
    """Nanoseconds that each kind of copy took."""

    swap_out_ns: int = 0
    swap_in_ns: int = 0
    copy_ns: int = 0


class Swapper:
    """Executes the block copies of step plans."""

    def __init__(self, pool: KvPool, kernels: PagedKernels) -> None:
        self.pool = pool
        self.kernels = kernels

    def move(self, swap_out: BlockMoves, swap_in: BlockMoves, copies: BlockMoves) -> SwapTimes:
        """Swaps out, swaps in, copies, in that order. Raises PlanError before the first copy if any id is wrong."""
        if not (swap_out.sources or swap_in.sources or copies.sources):
            _check(swap_out, 0, 0, "swap_out")
            _check(swap_in, 0, 0, "swap_in")
            _check(copies, 0, 0, "copies")
            return SwapTimes()
        num_blocks, num_host_blocks = self.pool.num_blocks, self.pool.num_host_blocks
        _check(swap_out, num_blocks, num_host_blocks, "swap_out")
        _check(swap_in, num_host_blocks, num_blocks, "swap_in")
        _check(copies, num_blocks, num_blocks, "copies")
        times = [time.perf_counter_ns()]
        if swap_out.sources:
            self._swap(self.pool.device_blocks, self.pool.host_blocks, swap_out)
        times.append(time.perf_counter_ns())
        fault_point("worker.step.mid_swap")
        if swap_in.sources:
            self._swap(self.pool.host_blocks, self.pool.device_blocks, swap_in)
        times.append(time.perf_counter_ns())
        for run in independent_runs(copies):
            device = self.pool.device_blocks.device
            self.kernels.copy_blocks(
                self.pool.device_blocks,
                torch.tensor(run.sources, device=device),
                torch.tensor(run.destinations, device=device),
            )
        times.append(time.perf_counter_ns())
        return SwapTimes(*(end - start for start, end in pairwise(times)))

    def measure(self) -> tuple[int, int]:
        """Bytes per second of swapping out and of swapping in; (0, 0) without an arena.

        Overwrites blocks of pool and arena, so it runs before the first plan.
        """
        pool, block_bytes = self.pool, self.pool.layout.block_bytes
        count = min(pool.num_blocks, pool.num_host_blocks, max(1, _MEASURED_BYTES // block_bytes))
        if not count:
            return 0, 0
        ids = BlockMoves(list(range(count)), list(range(count)))
        rates = []
        for source, destination in (
            (pool.device_blocks, pool.host_blocks),
            (pool.host_blocks, pool.device_blocks),
        ):
            self._swap(source, destination, ids)  # the first touch of fresh memory is not what is measured
            start = time.perf_counter_ns()
            self._swap(source, destination, ids)
            if pool.device_blocks.is_cuda:
                torch.cuda.synchronize(pool.device_blocks.device)
            elapsed = max(1, time.perf_counter_ns() - start)
            rates.append(count * block_bytes * 1_000_000_000 // elapsed)
        return rates[0], rates[1]

    def _swap(self, source: torch.Tensor, destination: torch.Tensor, moves: BlockMoves) -> None:
        self.kernels.swap_blocks(
            source,
            destination,
            torch.tensor(moves.sources, device=source.device),
            torch.tensor(moves.destinations, device=destination.device),
        )


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
