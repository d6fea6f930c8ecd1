"""The event loop: arrivals and results in order of virtual time, plans whenever the scheduler will give one.

A worker executes its plans one after the other; the next is already there when one ends, unless the scheduler had
nothing to plan. Every result reaches the scheduler one link delay after the step's end, every plan the worker one link
delay after it was made. The loop looks only at the worker that an event concerns.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from benchmarks.simulator.likelihoods import Likelihoods
from benchmarks.simulator.profiles import WorkerProfile
from benchmarks.simulator.worker import STOP, VirtualWorker
from pagewire.simulation.batch import StepLoad
from scheduler.dispatcher import Admission, Dispatcher, Failed, Finished, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.sequence import FinishReason, Request, SequenceGroup
from scheduler.sequence import Sequence as TokenSequence
from scheduler.step_plan import StepResult


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load. The scheduler may see all of it but `output_tokens`."""

    at_ns: int
    prompt: list[int]
    output_tokens: int  # of each sequence
    n: int = 1
    beam_width: int = 1  # above 1: a beam search, of which the client gets the `n` best
    tenant: str = ""
    priority: int = 0
    timeout_ns: int | None = None  # the client wants no answer after that
    min_tokens: int = 0  # as the scheduler is told


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that was answered. Times in virtual nanoseconds."""

    arrived: int
    first_token: int
    finished: int
    prompt_tokens: int
    output_tokens: int  # of each sequence
    n: int
    cached_tokens: int
    preemptions: int
    beam_width: int = 1
    tenant: str = ""
    too_late: bool = False  # its deadline passed before its last token

    @property
    def first_token_ns(self) -> int:
        """Submission to the first token."""
        return self.first_token - self.arrived

    @property
    def normalized_ns(self) -> float:
        """Latency per output token, the paper's measure (section 6.1)."""
        return (self.finished - self.arrived) / self.output_tokens


@dataclass(slots=True)
class WorkerTally:
    """What one worker did."""

    steps: int = 0
    busy_ns: int = 0
    row_ns: int = 0  # integral of rows over busy time
    tokens: int = 0  # computed, prefill and decode
    dropped: int = 0  # sampled and not accepted: rows that ran past their end
    most_plans_in_flight: int = 0
    swap_ns: int = 0


@dataclass(slots=True)
class Outcome:
    """What a simulation brought."""

    completions: list[Completion] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refused: int = 0
    end_ns: int = 0  # the last answer
    last_result_ns: int = 0  # rows that ran past their end come in after it
    workers: list[WorkerTally] = field(default_factory=list)
    preemptions: dict[str, int] = field(default_factory=dict)
    token_gaps: list[int] = field(default_factory=list)  # nanoseconds between tokens of a sequence, if asked for

    @property
    def normalized_latency(self) -> float:
        """Mean over requests of latency per output token, in seconds."""
        return sum(done.normalized_ns for done in self.completions) / len(self.completions) / 1e9

    @property
    def mean_rows(self) -> float:
        """Sequences in a step, averaged over busy time of all workers."""
        busy = sum(tally.busy_ns for tally in self.workers)
        return sum(tally.row_ns for tally in self.workers) / busy if busy else 0.0

    @property
    def utilisation(self) -> float:
        """Busy time of the workers over the whole time."""
        whole = len(self.workers) * self.last_result_ns
        return sum(tally.busy_ns for tally in self.workers) / whole if whole else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        return sum(done.output_tokens * done.n for done in self.completions) / (self.end_ns * 1e-9)


NEVER = 1 << 62
"""Nanoseconds that no simulation reaches."""

COLLECT_EVERY = (50_000, 5, 5)
"""Python's thresholds during a simulation. Plans in flight of a large pool are many objects that all go away without a
collection; at the default thresholds, walking them takes a fifth of the time with 1,000 workers."""

SchedulerFactory = Callable[..., Scheduler]
WorkerFactory = Callable[[WorkerProfile, int, Likelihoods | None], VirtualWorker]
"""Of a profile, an epoch and what beam searches find likely."""
Observer = Callable[[Scheduler, StepLoad, int], None]
"""Called after each applied result with the worker's scheduler, what the step did and how long it took."""


class Simulation:
    """One run over a list of arrivals in order of time."""

    def __init__(
        self,
        profiles: Sequence[WorkerProfile],
        arrivals: Sequence[Arrival],
        *,
        config: SchedulerConfig | None = None,
        make_scheduler: SchedulerFactory = Scheduler,
        observer: Observer | None = None,
        answers_whole_batches: bool = False,
        give_up_ns: int | None = None,
        keeps_gaps: bool = False,
        likelihoods: Likelihoods | None = None,
        make_worker: WorkerFactory = VirtualWorker,
        tells_deadlines: bool = True,
    ) -> None:
        """`answers_whole_batches`: nobody gets an answer before everybody who runs is done, as with a static batcher.
        `give_up_ns`: stop at this virtual time, whoever is still there; for loads beyond what can be sustained.
        `keeps_gaps`: note every time between two tokens of a sequence.
        `likelihoods`: what beam searches find likely.
        `make_worker`: makes what executes the plans.
        `tells_deadlines`: the scheduler knows them; otherwise a request is cancelled when its time is over."""
        profile = profiles[0]
        self.dispatcher = Dispatcher(
            config
            or SchedulerConfig(
                max_num_seqs=profile.max_num_seqs,
                token_budget=profile.token_budget,
                prefix_cache=False,
                max_waiting=len(arrivals) + 1,
                retention_ns=0,
                max_retained=0,
            ),
            make_scheduler=self._make_scheduler,
        )
        self.schedulers: dict[str, Scheduler] = {}
        self.workers: dict[str, VirtualWorker] = {}
        self.outcome = Outcome(workers=[WorkerTally() for _ in profiles])
        self._factory = make_scheduler
        self._observer = observer
        self._answers_whole_batches = answers_whole_batches
        self._give_up_ns = give_up_ns
        self._last_token_at: dict[TokenSequence, int] | None = {} if keeps_gaps else None
        self._arrivals = arrivals
        self._held: dict[SequenceGroup, None] = {}  # ended and not answered yet; an ordered set
        self._free_at = dict.fromkeys(range(len(profiles)), 0)  # when a worker has executed all its plans
        self._events: list[tuple[int, int, int, StepResult, StepLoad, int, int]] = []
        self._timers: list[tuple[int, int]] = []  # when a plan that was held back is due, and for which worker
        self._timer_of: dict[int, int] = {}  # the last of a worker's timers
        self._tells_deadlines = tells_deadlines
        self._has_deadlines = False  # the scheduler knows some
        self._timeouts: list[tuple[int, str]] = []  # deadlines that the scheduler does not know
        self._made = 0  # events ever made, so that equal times are taken in order
        for index, each in enumerate(profiles):
            name, epoch = str(index), index + 1
            self.workers[name] = make_worker(each, epoch, likelihoods)
            self.dispatcher.add_worker(name, each.capacity, each.rates, epoch, 0)

    def _make_scheduler(self, worker_id: str, *arguments: object) -> Scheduler:
        made = self.schedulers[worker_id] = self._factory(worker_id, *arguments)
        return made

    def run(self) -> Outcome:
        """Runs until everybody is answered."""
        with rare_collections():
            self._run()
        for scheduler in self.schedulers.values():
            for mode, count in scheduler.preemptions_total.items():
                self.outcome.preemptions[mode] = self.outcome.preemptions.get(mode, 0) + count
        return self.outcome

    def _run(self) -> None:
        arrivals, events = self._arrivals, self._events
        following = 0
        while following < len(arrivals) or events:
            next_event = events[0][0] if events else NEVER
            next_arrival = arrivals[following].at_ns if following < len(arrivals) else NEVER
            if (due := self._next_deadline()) < min(next_event, next_arrival):
                self._pass_deadline(due)
            elif self._timers and self._timers[0][0] < min(next_event, next_arrival):
                now, index = heappop(self._timers)
                self._plan(str(index), now)
            elif next_arrival <= next_event:
                now = arrivals[following].at_ns
                if self._give_up_ns is not None and now > self._give_up_ns:
                    break
                self._arrive(following, arrivals[following])
                following += 1
            else:
                now, _, index, result, load, duration, num_rows = heappop(events)
                if self._give_up_ns is not None and now > self._give_up_ns:
                    break
                self._finish_step(now, index, result, load, duration, num_rows)

    def _arrive(self, number: int, arrival: Arrival) -> None:
        longest = self.workers["0"].profile.model.max_model_len
        request = Request(
            str(number),
            array("I", arrival.prompt),
            n=arrival.n,
            beam_width=arrival.beam_width,
            max_tokens=longest - len(arrival.prompt),
            stop_ids=STOP_IDS,
            tenant=arrival.tenant,
            priority=arrival.priority,
            payload=arrival.output_tokens,
            min_tokens=arrival.min_tokens,
        )
        if arrival.timeout_ns is not None:
            deadline = arrival.at_ns + arrival.timeout_ns
            if self._tells_deadlines:
                request = replace(request, deadline=deadline)
                self._has_deadlines = True
            else:
                heappush(self._timeouts, (deadline, request.request_id))
        submitted = self.dispatcher.submit(request, arrival.at_ns)
        if submitted.admission is not Admission.OK:
            self.outcome.refused += 1
        elif submitted.group is not None and submitted.group.worker_id is not None:
            self._plan(submitted.group.worker_id, arrival.at_ns)

    def _next_deadline(self) -> int:
        """When one has to be looked at."""
        if self._timeouts:
            return self._timeouts[0][0]
        due = self.dispatcher.next_expiry() if self._has_deadlines else None
        return NEVER if due is None else max(due, self.outcome.last_result_ns)

    def _pass_deadline(self, now: int) -> None:
        if self._timeouts:
            self.dispatcher.abort(heappop(self._timeouts)[1], FinishReason.DEADLINE, now)
        else:
            self.dispatcher.expire(now)
        self._note_events(now)
        for name in self.dispatcher.take_woken():
            self._plan(name, now)

    def _plan(self, name: str, now: int) -> None:
        """Hands a worker all the plans that its scheduler will give."""
        worker, index = self.workers[name], int(name)
        delay = worker.profile.link_delay_ns
        while (plan := self.dispatcher.schedule(name, now)) is not None:
            in_flight = len(self.schedulers[name].in_flight)
            tally = self.outcome.workers[index]
            tally.most_plans_in_flight = max(tally.most_plans_in_flight, in_flight)
            result, duration, load = worker.execute(plan)
            ahead = self._free_at[index] - now - delay
            idle = max(0, -ahead)
            result = replace(result, timings=replace(result.timings, idle_ns=idle, early_ns=max(0, ahead)))
            end = self._free_at[index] + idle + duration
            self._free_at[index] = end
            self._made += 1
            num_rows = load.decode_tokens + load.num_chunks
            heappush(self._events, (end + delay, self._made, index, result, load, duration, num_rows))
        due = self.schedulers[name].held_until
        if due is not None and self._timer_of.get(index) != due:
            self._timer_of[index] = due
            heappush(self._timers, (due, index))

    def _finish_step(
        self, now: int, index: int, result: StepResult, load: StepLoad, duration: int, num_rows: int
    ) -> None:
        name = str(index)
        output = self.dispatcher.apply(name, result, now)
        self.outcome.last_result_ns = now
        tally = self.outcome.workers[index]
        tally.steps += 1
        tally.busy_ns += duration
        tally.row_ns += num_rows * duration
        tally.tokens += load.decode_tokens + load.chunk_tokens
        tally.dropped += len(result.token_ids) - len(output.token_ids)
        tally.swap_ns += result.timings.swap_out_ns + result.timings.swap_in_ns
        if self._last_token_at is not None:
            self._note_gaps(self._last_token_at, output.sequences, now)
        if self._observer is not None:
            self._observer(self.schedulers[name], load, duration)
        self._note_events(now)
        if self._answers_whole_batches and self.schedulers[name].blocks.num_used == 0:
            self._answer(now)
        self._plan(name, now)

    def _note_gaps(self, last: dict[TokenSequence, int], sequences: list[TokenSequence], now: int) -> None:
        for sequence in sequences:
            before = last.get(sequence)
            if before is not None:
                self.outcome.token_gaps.append(now - before)
            last[sequence] = now

    def _note_events(self, now: int) -> None:
        for event in self.dispatcher.take_events():
            if isinstance(event, Finished) and event.sequence.group.is_finished:
                self._held[event.sequence.group] = None  # several may end at once
            elif isinstance(event, Failed):
                self.outcome.failures.append(event.message)
        if not self._answers_whole_batches:
            self._answer(now)

    def _answer(self, now: int) -> None:
        for group in self._held:
            request = group.request
            self.outcome.completions.append(
                Completion(
                    arrived=group.accepted_at,
                    first_token=group.first_token_at or now,
                    finished=now,
                    prompt_tokens=len(request.prompt),
                    output_tokens=len(group.sequences[0].output),
                    n=request.n,
                    cached_tokens=group.cached_tokens,
                    preemptions=group.preemptions,
                    beam_width=request.beam_width,
                    tenant=request.tenant,
                    too_late=any(ended_by_deadline(sequence) for sequence in group.sequences),
                )
            )
            self.outcome.end_ns = now
        self._held.clear()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Python collects garbage rarely meanwhile."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_EVERY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def ended_by_deadline(sequence: TokenSequence) -> bool:
    return sequence.finish is not None and sequence.finish.reason is FinishReason.DEADLINE


STOP_IDS = frozenset({STOP})
