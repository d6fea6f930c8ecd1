"""Placement: which worker gets a request. The least loaded of those that could run it; of equals, who joined first.

A pool has a thousand workers but few kinds of them: of one block size, of one number of rows, and with pools of one
order of magnitude. Each kind has a heap of its workers by load. Loads grow without notice: an entry that promises too
little is put right when it comes to the top. Loads that shrink are noted, so no entry promises too much.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from scheduler.scheduler import Scheduler
from scheduler.sequence import SequenceGroup

Entry = tuple[float, int, str]  # load, epoch, worker id; later workers have later epochs


class Placement:
    """The ready workers, by kind and by load."""

    __slots__ = ("_kind_of", "_kinds")

    def __init__(self) -> None:
        self._kinds: dict[tuple[int, int, int], WorkersOfOneKind] = {}
        self._kind_of: dict[str, WorkersOfOneKind] = {}  # by worker id

    def add(self, worker: Scheduler) -> None:
        name = (worker.capacity.block_size, worker.max_rows, worker.capacity.num_blocks.bit_length())
        kind = self._kinds.get(name)
        if kind is None:
            kind = self._kinds[name] = WorkersOfOneKind(name)
        kind.add(worker)
        self._kind_of[worker.worker_id] = kind

    def remove(self, worker: Scheduler) -> None:
        kind = self._kind_of.pop(worker.worker_id)
        kind.remove(worker)
        if not kind.workers:
            del self._kinds[kind.name]

    def choose(self, group: SequenceGroup) -> Scheduler | None:
        """Who should get a group; None: nobody could run it."""
        best: Entry | None = None
        for kind in self._kinds.values():
            entry = kind.least_loaded(group)
            if entry is not None and (best is None or entry < best):
                best = entry
        return None if best is None else self._kind_of[best[2]].workers[best[2]]

    def note_lighter(self, worker: Scheduler) -> None:
        """A worker has less to do than before."""
        self._kind_of[worker.worker_id].note_lighter(worker)

    def check_integrity(self, ready: dict[str, Scheduler]) -> None:
        """Raises AssertionError unless it knows exactly the ready workers, each with its load or less."""
        known = {name: worker for kind in self._kinds.values() for name, worker in kind.workers.items()}
        assert known == ready, "the placement differs from the ready workers"
        assert self._kind_of.keys() == ready.keys(), "a worker has no kind, or the reverse"
        for kind in self._kinds.values():
            kind.check_integrity()


class WorkersOfOneKind:
    """Workers that can run the same requests, but for those that need more than half of a pool."""

    __slots__ = ("_heap", "_promised", "largest", "name", "workers")

    def __init__(self, name: tuple[int, int, int]) -> None:
        self.name = name
        self.workers: dict[str, Scheduler] = {}  # in order of joining
        self.largest: Scheduler | None = None  # who has the most blocks
        self._heap: list[Entry] = []  # every worker is there with its load or less; some entries are old
        self._promised: dict[str, float] = {}  # the load in a worker's entry that counts

    def add(self, worker: Scheduler) -> None:
        self.workers[worker.worker_id] = worker
        if self.largest is None or worker.capacity.num_blocks > self.largest.capacity.num_blocks:
            self.largest = worker
        self._push(worker)

    def remove(self, worker: Scheduler) -> None:
        del self.workers[worker.worker_id], self._promised[worker.worker_id]
        if self.largest is worker:
            self.largest = max(self.workers.values(), key=lambda other: other.capacity.num_blocks, default=None)

    def note_lighter(self, worker: Scheduler) -> None:
        """A worker has less to do than before."""
        if worker.load >= self._promised[worker.worker_id]:
            return
        if len(self._heap) > 4 * len(self.workers) + 64:  # mostly old entries
            self._heap = [entry_of(other) for other in self.workers.values()]
            self._promised = {worker_id: load for load, _, worker_id in self._heap}
            heapify(self._heap)
        else:
            self._push(worker)

    def least_loaded(self, group: SequenceGroup) -> Entry | None:
        """The entry of the least loaded worker that could run a group; None: nobody could."""
        if self.largest is None or self.largest.why_never(group) is not None:
            return None
        if len(self.workers) == 1:
            return entry_of(self.largest)
        too_small = []
        while True:
            entry = self._top()
            worker = self.workers[entry[2]]
            if worker.capacity.num_blocks == self.largest.capacity.num_blocks or worker.why_never(group) is None:
                break
            too_small.append(heappop(self._heap))
        for other in too_small:
            heappush(self._heap, other)
        return entry

    def _top(self) -> Entry:
        """The first entry, after what is old before it has been put right."""
        heap = self._heap
        while True:
            top = heap[0]
            load, epoch, worker_id = top
            worker = self.workers.get(worker_id)
            if worker is None or worker.epoch != epoch or load != self._promised[worker_id]:
                heappop(heap)
                continue
            now = worker.load
            if now == load:
                return top
            self._promised[worker_id] = now
            heapreplace(heap, (now, epoch, worker_id))

    def _push(self, worker: Scheduler) -> None:
        entry = entry_of(worker)
        self._promised[worker.worker_id] = entry[0]
        heappush(self._heap, entry)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every worker has an entry that counts, with its load or less."""
        blocks = {worker.capacity.num_blocks for worker in self.workers.values()}
        assert self.largest is not None, "a kind without workers is kept"
        assert self.largest.capacity.num_blocks == max(blocks), "another worker is the largest"
        assert self._promised.keys() == self.workers.keys(), "a worker has no entry, or the reverse"
        for worker_id, worker in self.workers.items():
            promised = self._promised[worker_id]
            assert (promised, worker.epoch, worker_id) in self._heap, f"worker {worker_id} cannot be chosen"
            assert promised <= worker.load, f"worker {worker_id} is lighter than it is taken for"


def entry_of(worker: Scheduler) -> Entry:
    return worker.load, worker.epoch, worker.worker_id
