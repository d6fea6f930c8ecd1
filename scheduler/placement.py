"""Placement: which worker gets a request. The least loaded of those that could run it; of equals, who joined first.

A pool has a thousand workers but few kinds of them, so whether a worker could run a request is asked once per kind,
and each kind has a heap of its workers by load. Loads grow without notice: an entry that promises too little is put
right when it comes to the top. Loads that shrink are noted, so no entry promises too much.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from scheduler.scheduler import Scheduler
from scheduler.sequence import SequenceGroup

Kind = tuple[object, ...]
Entry = tuple[float, int, str]  # load, epoch, worker id; later workers have later epochs


class Placement:
    """The ready workers, by kind and by load."""

    __slots__ = ("_heaps", "_workers")

    def __init__(self) -> None:
        self._workers: dict[Kind, dict[str, Scheduler]] = {}  # in order of joining
        self._heaps: dict[Kind, list[Entry]] = {}  # every worker is there with its load or less; some entries are old

    def add(self, worker: Scheduler) -> None:
        kind = kind_of(worker)
        self._workers.setdefault(kind, {})[worker.worker_id] = worker
        heappush(self._heaps.setdefault(kind, []), entry_of(worker))

    def remove(self, worker: Scheduler) -> None:
        kind = kind_of(worker)
        workers = self._workers[kind]
        del workers[worker.worker_id]
        if not workers:
            del self._workers[kind], self._heaps[kind]

    def choose(self, group: SequenceGroup) -> Scheduler | None:
        """Who should get a group; None: nobody could run it."""
        able = [
            least_loaded(workers, heap)  # looked up without hashing a kind, which would cost more than all the rest
            for workers, heap in zip(self._workers.values(), self._heaps.values(), strict=True)
            if next(iter(workers.values())).why_never(group) is None
        ]
        return able[0] if len(able) == 1 else min(able, key=entry_of, default=None)

    def note_lighter(self, worker: Scheduler) -> None:
        """A worker has less to do than before."""
        kind = kind_of(worker)
        heap = self._heaps[kind]
        if len(heap) > 4 * len(self._workers[kind]) + 64:  # mostly old entries
            self._rebuild(kind)
        else:
            heappush(heap, entry_of(worker))

    def note_all_lighter(self) -> None:
        """Any worker may have less to do than before."""
        for kind in self._workers:
            self._rebuild(kind)

    def _rebuild(self, kind: Kind) -> None:
        heap = self._heaps[kind] = [entry_of(worker) for worker in self._workers[kind].values()]
        heapify(heap)

    def check_integrity(self, ready: dict[str, Scheduler]) -> None:
        """Raises AssertionError unless it knows exactly the ready workers, each with its load or less."""
        known = {worker_id: worker for workers in self._workers.values() for worker_id, worker in workers.items()}
        assert known == ready, "the placement differs from the ready workers"
        for kind, workers in self._workers.items():
            for worker in workers.values():
                least = min((e for e in self._heaps[kind] if e[1:] == (worker.epoch, worker.worker_id)), default=None)
                assert least is not None, f"worker {worker.worker_id} cannot be chosen"
                assert least <= entry_of(worker), f"worker {worker.worker_id} is lighter than it is taken for"


def least_loaded(workers: dict[str, Scheduler], heap: list[Entry]) -> Scheduler:
    """The top of a kind's heap, after what is old at the top has been put right."""
    while True:
        top = heap[0]
        worker = workers.get(top[2])
        if worker is None or worker.epoch != top[1]:
            heappop(heap)
            continue
        entry = entry_of(worker)
        if entry == top:
            return worker
        heapreplace(heap, entry)


def kind_of(worker: Scheduler) -> Kind:
    """Workers of one kind can run the same requests."""
    return worker.capacity, worker.max_rows


def entry_of(worker: Scheduler) -> Entry:
    return worker.assigned_sequences / worker.max_rows, worker.epoch, worker.worker_id
