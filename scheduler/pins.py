"""Pinned prefixes: what an operator wants kept in the prefix cache of every worker, such as a system prompt.

Pinning computes nothing: a worker keeps the blocks once a request has computed them. All pinned prefixes together may
take half of a worker's pool, so that requests always have room; a worker that joins with a smaller pool keeps the first
of them. A request that fits in no other way takes pinned blocks nevertheless.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from scheduler.scheduler import Scheduler

MOST = 256
"""Prefixes that can be pinned."""
SHARE = 2
"""One part in so many of a pool may be pinned."""


class Pins:
    """The pinned prefixes, in the order in which they were pinned."""

    __slots__ = ("_prefixes",)

    def __init__(self) -> None:
        self._prefixes: dict[tuple[str, tuple[int, ...]], None] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def add(self, tenant: str, tokens: list[int], workers: Collection[Scheduler]) -> str | None:
        """Pins a prefix on all workers. Why it cannot be, in one line; None: it is pinned."""
        prefix = (tenant, tuple(tokens))
        if prefix in self._prefixes:
            return None
        if len(self._prefixes) >= MOST:
            return f"{MOST} prefixes are pinned, which is the limit; unpin one"
        for worker in workers:
            need, room = num_blocks([*self._prefixes, prefix], worker), worker.capacity.num_blocks // SHARE
            if need > room:
                return f"pinned prefixes would need {need} blocks, but at most {room} of a pool may be pinned"
        self._prefixes[prefix] = None
        for worker in workers:
            worker.pin(tenant, tokens)
        return None

    def remove(self, tenant: str, tokens: list[int], workers: Iterable[Scheduler]) -> bool:
        """Takes a pin back on all workers. False: there is none. Prefixes that share blocks with it stay pinned."""
        prefix = (tenant, tuple(tokens))
        if prefix not in self._prefixes:
            return False
        del self._prefixes[prefix]
        for worker in workers:
            worker.unpin(tenant, tokens)
            self.add_worker(worker)
        return True

    def add_worker(self, worker: Scheduler) -> None:
        """Pins on a worker what fits there."""
        fitting: list[tuple[str, tuple[int, ...]]] = []
        for prefix in self._prefixes:
            if num_blocks([*fitting, prefix], worker) <= worker.capacity.num_blocks // SHARE:
                fitting.append(prefix)
                worker.pin(prefix[0], list(prefix[1]))


def num_blocks(prefixes: Iterable[tuple[str, tuple[int, ...]]], worker: Scheduler) -> int:
    """Blocks of a worker that prefixes need, if they share none."""
    return sum(len(tokens) // worker.capacity.block_size for _, tokens in prefixes)
