"""The dispatcher: the one object the edges talk to. It owns the registry of requests and one scheduler per worker.

Pure: no clock, no sockets, no threads. Every time is `now`, nanoseconds of a monotonic clock. Not thread-safe.
"""

from __future__ import annotations

import enum
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import chain
from math import ceil
from typing import NamedTuple

from scheduler.deadlines import Deadlines
from scheduler.draft import ResultError, StepOutput
from scheduler.events import Admitted, Event, Failed, Finished, StatusCode
from scheduler.inspection import check_scheduler, worker_loads
from scheduler.loads import Loads, WorkerLoads
from scheduler.parking import Parking
from scheduler.pins import Pins
from scheduler.placement import Placement
from scheduler.policy import SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.scheduler import Scheduler
from scheduler.sequence import FinishReason, Request, Sequence, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult

__all__ = [
    "Admission",
    "Admitted",
    "Continuation",
    "Dispatcher",
    "Event",
    "Failed",
    "FinishReason",
    "Finished",
    "Loads",
    "ParkingVerdict",
    "ResultError",
    "Resumed",
    "SchedulerConfig",
    "StatusCode",
    "StepOutput",
    "Submitted",
    "TransferRates",
    "WorkerCapacity",
    "WorkerLoads",
]


class Admission(enum.Enum):
    """The verdict of submit()."""

    OK = "ok"
    LATER = "later"  # the waiting queue is full
    NEVER = "never"  # it cannot fit, ever
    TOO_LATE = "too late"  # its deadline cannot be met
    DUPLICATE = "duplicate"  # a live request has this id


class Submitted(NamedTuple):
    """Answer of submit()."""

    admission: Admission
    reason: str = ""  # one clear line for LATER, NEVER and TOO_LATE
    group: SequenceGroup | None = None  # for OK


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a parked or held request goes on with."""

    tokens: list[int] = field(default_factory=list)  # appended behind its last output token
    max_tokens: int = 0  # further output tokens at most; 0: as many as were left, or as before if it begins a turn
    max_model_len: int = 1 << 62  # prompt and output together
    deadline: int | None = None  # as of a request
    detached: bool = False  # from now on
    hold_ns: int = 0  # as of a request


class ParkingVerdict(enum.Enum):
    """The verdict of park() and resume()."""

    OK = "ok"
    UNKNOWN = "unknown"  # no live, parked or recently finished request has this id
    NOT_LIVE = "not live"  # park: it has ended, or is parked already
    NOT_PARKED = "not parked"  # resume: it runs, or has ended and is not held
    SEARCHES = "searches"  # park: a beam search has no answer yet that could be kept
    FULL = "full"  # park: the tenant, or everybody together, has parked as many as may be
    ONE_SEQUENCE = "one sequence"  # resume: input, a limit or a hold for a request of several sequences
    CONTEXT_FULL = "context full"  # resume: no room for one more token
    NEVER = "never"  # resume: as of submit()
    LATER = "later"  # resume: as of submit()


@dataclass(frozen=True, slots=True)
class Resumed:
    """Answer of resume()."""

    verdict: ParkingVerdict
    reason: str = ""  # one clear line for NEVER and LATER
    group: SequenceGroup | None = None  # for OK


class Dispatcher:
    """Requests in, step plans out, step results in, tokens out."""

    def __init__(self, config: SchedulerConfig, make_scheduler: Callable[..., Scheduler] = Scheduler) -> None:
        """`make_scheduler` takes the arguments of Scheduler: another policy for experiments, or a look at each one."""
        self._config = config
        self._make_scheduler = make_scheduler
        self._schedulers: dict[str, Scheduler] = {}  # by worker id, in order of joining
        self._placement = Placement()  # the same workers, by load
        self._groups: dict[str, SequenceGroup] = {}  # live, by request id
        self._num_waiting = 0  # of those, how many have not started
        self._retained: OrderedDict[str, SequenceGroup] = OrderedDict()  # finished, oldest first
        self._unassigned: dict[SequenceGroup, None] = {}  # live without a worker
        self._parking = Parking(config)
        self._deadlines = Deadlines()
        self.pins = Pins()
        self._arrivals = 0
        self._last_epoch = 0
        self._stale_results = 0
        self._events: list[Event] = []
        self._held: list[tuple[int, int, str]] = []  # heap of plans held back: time, epoch, worker id; some outdated
        self._woken: dict[str, None] = {}  # workers that may have something to plan; an ordered set

    # ------------------------------------------------------------------ workers

    def add_worker(self, worker_id: str, capacity: WorkerCapacity, rates: TransferRates, epoch: int, now: int) -> None:
        """Makes a worker ready. A worker of the same id is removed first. Raises ValueError unless `epoch` is larger
        than every epoch before it."""
        if epoch <= self._last_epoch:
            raise ValueError(f"epoch {epoch} is not above {self._last_epoch}")
        self.remove_worker(worker_id, now)
        self._last_epoch = epoch
        scheduler = self._make_scheduler(worker_id, self._config, capacity, rates, epoch, self._record)
        self._schedulers[worker_id] = scheduler
        self.pins.add_worker(scheduler)
        self._placement.add(scheduler)
        self._relieve_the_others()
        self._distribute(now)

    def remove_worker(self, worker_id: str, now: int) -> None:
        """Takes a lost worker's groups back: they go on elsewhere by recompute, or wait for a worker. One whose workers
        are lost again and again fails, so that it does not bring down every worker there is."""
        scheduler = self._schedulers.pop(worker_id, None)
        if scheduler is None:
            return
        self._placement.remove(scheduler)
        self._woken.pop(worker_id, None)
        for group in scheduler.give_up_all():
            if group.losses < self._config.max_worker_losses:
                self._unassigned[group] = None
                continue
            message = f"the worker that ran this request was lost {group.losses} times"
            self._fail_unassigned(group, Failed(group, StatusCode.INTERNAL, "WORKER_LOST_REPEATEDLY", message), now)
        self._distribute(now)

    def computing(self, worker_id: str) -> Iterator[Sequence]:
        """Sequences that the newest plan of a worker computes."""
        scheduler = self._schedulers.get(worker_id)
        if scheduler is not None and scheduler.in_flight:
            newest = scheduler.in_flight[-1]
            yield from chain(newest.decoding, newest.chunks.values(), newest.forked)

    def workers(self) -> list[str]:
        """Ids of the ready workers, in order of joining."""
        return list(self._schedulers)

    # ------------------------------------------------------------------ requests

    def submit(self, request: Request, now: int) -> Submitted:
        """Accepts a request, or says why not. Raises ValueError for a request that makes no sense at all."""
        if not request.prompt or request.n < 1 or request.max_tokens < 1:
            raise ValueError("a request needs a prompt, n >= 1 and max_tokens >= 1")
        if request.n > request.beam_width > 1:
            raise ValueError("a beam search has no more answers than beams")
        if request.request_id in self._groups or self._parking.get(request.request_id) is not None:
            return Submitted(Admission.DUPLICATE, f"request {request.request_id!r} is live")
        group = SequenceGroup(request, self._arrivals, now)
        worker = self._placement.choose(group)
        if worker is None and self._schedulers:
            return Submitted(Admission.NEVER, self._why_never(group))
        if self._num_waiting >= self._config.max_waiting:
            return Submitted(Admission.LATER, f"{self._config.max_waiting} requests are waiting already")
        deadline = request.deadline
        if deadline is not None and worker is not None:
            needed = worker.least_ns(group, deadline - now)
            if now + needed > deadline:
                return Submitted(Admission.TOO_LATE, too_late(needed, deadline - now))
            deadline -= needed  # look at it when it could start for the last time
        self._arrivals += 1
        self._retained.pop(request.request_id, None)
        self._groups[request.request_id] = group
        if deadline is not None:
            self._deadlines.note(deadline, group, self._groups)
        self._num_waiting += 1
        self._assign(group, worker)
        return Submitted(Admission.OK, group=group)

    def abort(self, request_id: str, reason: FinishReason, now: int) -> bool:
        """Ends a request in whatever state it is. False: no live request has that name."""
        group = self._groups.get(request_id)
        if group is None:
            parked = self._parking.get(request_id)
            if parked is not None:
                self._let_go(parked, reason)
            return parked is not None
        scheduler = self._wake(group.worker_id)
        if scheduler is not None:
            scheduler.end_group(group, reason, now)
        else:
            del self._unassigned[group]
            for sequence in group.last_ones_first:
                sequence.end(reason, now)
                if sequence.is_answer:
                    self._record(Finished(sequence))
        return True

    def fail(
        self, request_id: str, code: StatusCode, reason: str, message: str, now: int, retry_after_ns: int = 0
    ) -> bool:
        """Ends a request with an error. False: no live request has that name."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        scheduler = self._wake(group.worker_id)
        if scheduler is not None:
            scheduler.fail(group, code, reason, message, now, retry_after_ns)
        else:
            del self._unassigned[group]
            self._fail_unassigned(group, Failed(group, code, reason, message, retry_after_ns), now)
        return True

    def stop_sequence(self, request_id: str, index: int, num_tokens: int, matched_stop: str, now: int) -> bool:
        """Ends one sequence at a stop string, keeping num_tokens of its output. False: it is not live, or has fewer, or
        is of a beam search, which tells no text before its end."""
        group = self._groups.get(request_id)
        if group is None or group.search is not None or not 0 <= index < len(group.sequences):
            return False
        sequence = group.sequences[index]
        if sequence.is_finished or not 0 <= num_tokens <= len(sequence.output):
            return False
        scheduler = self._wake(group.worker_id)
        if scheduler is not None:
            scheduler.stop(sequence, num_tokens, matched_stop, now)
        else:
            sequence.keep_output(num_tokens)
            sequence.end(FinishReason.STOP, now, matched_stop=matched_stop)
            if group.is_finished:
                del self._unassigned[group]
            self._record(Finished(sequence))
        return True

    # ------------------------------------------------------------------ parking

    def park(self, request_id: str, ttl_ns: int, now: int) -> ParkingVerdict:
        """Takes a live request off its worker for now. Its blocks are free with the next plan, its KV goes to the arena
        if there is room, and it ends as PARKED until it is continued, but after `ttl_ns` (0: the ceiling) for good."""
        group = self._groups.get(request_id)
        if group is None:
            return ParkingVerdict.UNKNOWN if self.find(request_id) is None else ParkingVerdict.NOT_LIVE
        if group.search is not None:
            return ParkingVerdict.SEARCHES
        if not self._parking.has_room(group.request.tenant):
            return ParkingVerdict.FULL
        ceiling = self._config.park_ceiling_ns
        group.keep_until = now + min(ttl_ns or ceiling, ceiling)
        scheduler = self._wake(group.worker_id)
        if scheduler is not None:
            scheduler.park(group, now)
        else:
            del self._unassigned[group]
            for sequence in group.live:
                sequence.end(FinishReason.PARKED, now)
                self._record(Finished(sequence))
        return ParkingVerdict.OK

    def resume(self, request_id: str, what: Continuation, now: int) -> Resumed:
        """Takes a parked or held request up again, behind appended tokens if any: with those, a new limit, or after a
        finish, its output so far becomes prompt, as if one request had it all from the beginning."""
        group = self._parking.get(request_id)
        if group is None:
            known = self.find(request_id) is not None
            return Resumed(ParkingVerdict.NOT_PARKED if known else ParkingVerdict.UNKNOWN)
        before = group.request
        request = replace(
            before, deadline=what.deadline, detached=before.detached or what.detached, hold_ns=what.hold_ns
        )
        begins_turn = bool(what.tokens) or what.max_tokens > 0 or not group.is_parked
        if len(group.sequences) > 1 and (begins_turn or what.hold_ns):
            return Resumed(ParkingVerdict.ONE_SEQUENCE)
        if begins_turn:
            prompt = group.sequences[0].token_ids + array("I", what.tokens)
            room = what.max_model_len - len(prompt)
            if room < 1:
                return Resumed(ParkingVerdict.CONTEXT_FULL)
            max_tokens = min(what.max_tokens or before.max_tokens, room)
            request = replace(
                request,
                prompt=prompt,
                max_tokens=max_tokens,
                min_tokens=min(before.min_tokens, max_tokens),
                prompt_logprobs=None,
            )
        if self._num_waiting >= self._config.max_waiting:
            return Resumed(ParkingVerdict.LATER, f"{self._config.max_waiting} requests are waiting already")
        keeper = self._wake(group.parked_on)
        group.request = request  # as who looks for a place
        never = None if keeper is None else keeper.why_never(group)
        worker = keeper if never is None and keeper is not None else self._placement.choose(group)
        if worker is None and self._schedulers:
            never = self._why_never(group)
        group.request = before
        if worker is None and never is not None:
            return Resumed(ParkingVerdict.NEVER, never)
        self._parking.remove(group)
        if keeper is not None:
            if keeper is worker:
                keeper.parked.claim(group)
            else:
                keeper.parked.let_go(group)
        if begins_turn:
            group.begin_turn(request, len(what.tokens), self._arrivals, now)
        else:
            group.go_on(request, self._arrivals)
        self._arrivals += 1
        self._groups[request_id] = group
        self._num_waiting += group.started_at is None
        if request.deadline is not None:
            self._deadlines.note(request.deadline, group, self._groups)
        self._assign(group, worker)
        return Resumed(ParkingVerdict.OK, group=group)

    def cut(self, request_id: str, index: int, num_tokens: int, matched_stop: str) -> bool:
        """A held request turns out to have met a stop string before it ended otherwise: it keeps `num_tokens` of its
        output. False: no held request has that name, or it has fewer."""
        group = self._parking.get(request_id)
        if group is None or index or group.is_parked:
            return False
        sequence = group.sequences[0]
        kept = num_tokens - len(sequence.earlier)
        if not 1 <= kept <= len(sequence.output) or sequence.finish is None:
            return False
        sequence.keep_output(kept)
        usage = replace(sequence.finish.usage, completion_tokens=num_tokens)
        sequence.finish = replace(
            sequence.finish, reason=FinishReason.STOP, matched_stop=matched_stop, matched_token_id=None, usage=usage
        )
        keeper = self._wake(group.parked_on)
        if keeper is not None:
            keeper.parked.cut(sequence)
        return True

    def _let_go(self, group: SequenceGroup, reason: FinishReason) -> None:
        """A parked or held group will not be continued: frees its KV. A parked one has ended after all."""
        self._parking.remove(group)
        group.keep_until = None
        keeper = self._wake(group.parked_on)
        if keeper is not None:
            keeper.parked.let_go(group)
        for sequence in group.sequences:
            if sequence.finish is not None and sequence.finish.reason is FinishReason.PARKED:
                sequence.finish = replace(sequence.finish, reason=reason)
        self._retain(group)

    def _keeps(self, group: SequenceGroup) -> bool:
        """Whether a group that has just ended is kept to be continued, and until when."""
        if group.keep_until is not None:
            return group.is_parked  # it may have ended otherwise meanwhile
        request, finish = group.request, group.sequences[0].finish
        if not request.hold_ns or finish is None or finish.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return False
        if not self._parking.has_room(request.tenant):
            longest = self._parking.held_for_longest(request.tenant)
            if longest is not None:
                self._let_go(longest, FinishReason.CANCELLED)
        assert group.finished_at is not None
        group.keep_until = group.finished_at + min(request.hold_ns, self._config.park_ceiling_ns)
        return self._parking.has_room(request.tenant)

    # ------------------------------------------------------------------ time

    def expire(self, now: int) -> None:
        """Ends requests whose deadline has passed, or cannot be met because they still wait, and those that have been
        parked for long enough; forgets finished ones whose retention is over; wakes workers whose next plan was held
        back until now."""
        while self._held and self._held[0][0] <= now:
            due, epoch, worker_id = heappop(self._held)
            if self._is_held(due, epoch, worker_id):
                self._woken[worker_id] = None
        for group in self._parking.expired(now):
            self._let_go(group, FinishReason.CANCELLED)
        for group in self._deadlines.take(now, self._groups):
            self._look_at_deadline(group, now)
        horizon = now - self._config.retention_ns
        while self._retained:
            request_id, group = next(iter(self._retained.items()))
            if (group.finished_at or 0) > horizon and len(self._retained) <= self._config.max_retained:
                return
            del self._retained[request_id]

    def next_expiry(self) -> int | None:
        """When expire() has something to do at the earliest; None: nothing is pending."""
        times = [time for time in (self._deadlines.next, self._parking.next_expiry) if time is not None]
        while self._held and not self._is_held(*self._held[0]):
            heappop(self._held)
        if self._held:
            times.append(self._held[0][0])
        if self._retained:
            times.append((next(iter(self._retained.values())).finished_at or 0) + self._config.retention_ns)
        return min(times, default=None)

    def find(self, request_id: str) -> SequenceGroup | None:
        """A live, parked or recently finished request."""
        return self._groups.get(request_id) or self._parking.get(request_id) or self._retained.get(request_id)

    def pin_prefix(self, tenant: str, tokens: list[int]) -> str | None:
        """Keeps a prefix in the pool of every worker, present and future. Why not, in one line, or None."""
        return self.pins.add(tenant, tokens, self._schedulers.values())

    def unpin_prefix(self, tenant: str, tokens: list[int]) -> bool:
        """Takes pin_prefix back. False: that prefix is not pinned."""
        self._woken.update(dict.fromkeys(self._schedulers))
        return self.pins.remove(tenant, tokens, self._schedulers.values())

    # ------------------------------------------------------------------ steps

    @property
    def has_woken(self) -> bool:
        """Whether take_woken() would name a worker."""
        return bool(self._woken)

    def take_woken(self) -> list[str]:
        """Workers that may have something to plan for another reason than a result of theirs: a request has come to
        them, ended or left, or expire() has found that a plan was held back until now. Any other worker whose last
        schedule() gave None would give None again, so nobody has to ask a whole pool. They are named once."""
        if not self._woken:
            return []
        woken, self._woken = self._woken, {}
        return list(woken)

    def schedule(self, worker_id: str, now: int) -> StepPlan | None:
        """The next plan for a worker. None: nothing to do now, too many plans in flight, or no such worker."""
        scheduler = self._schedulers.get(worker_id)
        if scheduler is None:
            return None
        started = scheduler.groups_started_total
        plan = scheduler.schedule(now)
        self._num_waiting -= scheduler.groups_started_total - started
        if scheduler.held_until is not None:
            heappush(self._held, (scheduler.held_until, scheduler.epoch, worker_id))
        return plan

    def apply(self, worker_id: str, result: StepResult, now: int) -> StepOutput:
        """Accepts a result once. Raises ResultError when it contradicts its plan: remove the worker then."""
        scheduler = self._schedulers.get(worker_id)
        output = scheduler.apply(result, now) if scheduler is not None else None
        if output is None:
            self._stale_results += 1
            return StepOutput(accepted=False)
        return output

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order; deliver it after the tokens of the same step."""
        if not self._events:
            return []
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------ figures and checks

    def loads(self) -> Loads:
        """Figures over all workers; takes time linear in the workers, not in the sequences that run."""
        workers = [worker_loads(scheduler) for scheduler in self._schedulers.values()]
        return Loads(
            workers=workers,
            waiting=self._num_waiting,
            unassigned=len(self._unassigned),
            running=sum(worker.running_groups for worker in workers),
            swapped=sum(worker.swapped_groups for worker in workers),
            preempted=sum(worker.preempted_groups for worker in workers),
            retained=len(self._retained),
            parked=len(self._parking),
            stale_results_total=self._stale_results,
        )

    def loads_of(self, worker_id: str) -> WorkerLoads | None:
        """Figures of one worker; None: it is not ready."""
        scheduler = self._schedulers.get(worker_id)
        return None if scheduler is None else worker_loads(scheduler)

    def live_groups(self) -> Iterator[SequenceGroup]:
        """Live groups: those on a worker, preempted ones, waiting ones in the order of the queue, those without a
        worker. One whose last token is planned is in none of these places any more."""
        schedulers = self._schedulers.values()
        queues = ([*(one.running for one in schedulers)], [*(one.preempted for one in schedulers)])
        waiting = [*(one.waiting for one in schedulers), self._unassigned]
        return chain.from_iterable(chain.from_iterable((*queues, waiting)))

    @property
    def schedulers(self) -> list[Scheduler]:
        """One per worker, in order of joining; to look at."""
        return list(self._schedulers.values())

    def check_integrity(self) -> None:
        """Raises AssertionError when the books of any worker or the registry do not balance."""
        waiting = sum(1 for group in self._groups.values() if group.started_at is None)
        assert self._num_waiting == waiting, f"{waiting} groups wait, {self._num_waiting} were counted"
        self._placement.check_integrity(self._schedulers)
        assigned: set[SequenceGroup] = set()
        for scheduler in self._schedulers.values():
            check_scheduler(scheduler)
            assert not assigned & scheduler.groups.keys(), "a group has two workers"
            assigned |= scheduler.groups.keys()
        assert not assigned & set(self._unassigned), "an unassigned group has a worker"
        assert assigned | set(self._unassigned) == set(self._groups.values()), "a live group is nowhere"
        self._parking.check_integrity()
        for scheduler in self._schedulers.values():
            for group in scheduler.parked.groups:
                assert group.parked_on == scheduler.worker_id, f"the KV of {group} is elsewhere"
        parked = [group for scheduler in self._schedulers.values() for group in scheduler.parked.groups]
        assert len(parked) == len(set(parked)), "a group's KV is kept by two workers"
        assert set(parked) <= set(self._parking), "KV is kept for a group that is not parked"
        for group in set(self._parking) - set(parked):
            assert not any(sequence.table.blocks for sequence in group.sequences), f"the KV of {group} is nobody's"
        assert not self._groups.keys() & {group.request.request_id for group in self._parking}, "a live group is parked"
        for group in self._groups.values():
            assert not group.is_finished, f"{group} has finished and is registered as live"
        for group in self._retained.values():
            assert group.is_finished, f"{group} is live and registered as finished"
            assert all(not s.table.blocks and not s.has_row for s in group.sequences), f"{group} still holds something"

    # ------------------------------------------------------------------ inside

    def _relieve_the_others(self) -> None:
        """Takes as many waiting groups from the workers as they have more than their share, for one that has come."""
        workers = self._schedulers.values()
        queueing = [worker for worker in workers if worker.waiting]
        if not queueing:
            return
        share = sum(worker.assigned_sequences for worker in workers) / sum(worker.max_rows for worker in workers)
        for worker in queueing:
            surplus = worker.assigned_sequences - ceil(share * worker.max_rows)
            if surplus > 0:
                self._woken[worker.worker_id] = None  # whoever was first in its line may have left
                self._unassigned.update(dict.fromkeys(worker.give_up_waiting(surplus)))
                self._placement.note_lighter(worker)

    def _distribute(self, now: int) -> None:
        """Gives every group without a worker to the least loaded worker that could run it."""
        if not self._schedulers:
            return
        groups, self._unassigned = sorted(self._unassigned, key=lambda group: group.rank), {}
        for group in groups:
            worker = self._placement.choose(group)
            if worker is not None:
                self._assign(group, worker)
            else:
                why = self._why_never(group)
                failed = Failed(group, StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_EXHAUSTED", why)
                self._fail_unassigned(group, failed, now)

    def _why_never(self, group: SequenceGroup) -> str:
        """Why the first worker could not run a group."""
        return next(iter(self._schedulers.values())).why_never(group) or ""

    def _fail_unassigned(self, group: SequenceGroup, failed: Failed, now: int) -> None:
        for sequence in group.live:
            sequence.end(FinishReason.ERROR, now)
        group.failure = failed
        self._record(failed)

    def _record(self, event: Event) -> None:
        """Notes an event; a group that has ended moves from the live to the retained ones."""
        self._events.append(event)
        if isinstance(event, Admitted):
            return
        group = event.sequence.group if isinstance(event, Finished) else event.group
        scheduler = self._scheduler_of(group)
        if scheduler is not None:
            self._placement.note_lighter(scheduler)
        if group.is_finished:
            self._num_waiting -= group.started_at is None
            del self._groups[group.request.request_id]
            if self._keeps(group):
                self._parking.add(group)
            else:
                group.keep_until = None
                self._retain(group)

    def _retain(self, group: SequenceGroup) -> None:
        """A group that has ended can be found for a while."""
        self._retained[group.request.request_id] = group
        if len(self._retained) > self._config.max_retained:
            self._retained.popitem(last=False)

    def _look_at_deadline(self, group: SequenceGroup, now: int) -> None:
        """Ends a group whose deadline has passed, and one that has not started and can no longer meet it."""
        request_id, deadline = group.request.request_id, group.request.deadline
        assert deadline is not None
        if now >= deadline:
            self.abort(request_id, FinishReason.DEADLINE, now)
            return
        scheduler = self._scheduler_of(group)
        needed = scheduler.least_ns(group, deadline - now) if scheduler is not None and group.started_at is None else 0
        if now + needed > deadline:
            message = too_late(needed, deadline - now)
            self.fail(request_id, StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", message, now)
        else:
            self._deadlines.note(max(now + 1, deadline - needed), group, self._groups)

    def _scheduler_of(self, group: SequenceGroup) -> Scheduler | None:
        return None if group.worker_id is None else self._schedulers[group.worker_id]

    def _wake(self, worker_id: str | None) -> Scheduler | None:
        """A worker's scheduler, which is about to be changed from outside its steps; None: there is no worker."""
        if worker_id is None:
            return None
        self._woken[worker_id] = None
        return self._schedulers[worker_id]

    def _is_held(self, due: int, epoch: int, worker_id: str) -> bool:
        """Whether a worker's next plan is still held back until `due`."""
        scheduler = self._schedulers.get(worker_id)
        return scheduler is not None and scheduler.epoch == epoch and scheduler.held_until == due

    def _assign(self, group: SequenceGroup, worker: Scheduler | None) -> None:
        """Gives a group to a worker, if there is one."""
        if worker is None:
            self._unassigned[group] = None
        else:
            self._woken[worker.worker_id] = None
            worker.add(group)


def too_late(needed_ns: int, left_ns: int) -> str:
    """Why a deadline cannot be met, in one line."""
    return f"the deadline is in {max(0, left_ns) / 1e6:.0f} ms, but the request needs {needed_ns / 1e6:.0f} ms at least"
