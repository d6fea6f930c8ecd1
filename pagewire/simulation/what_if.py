"""What a recorded run would have been with other settings: the same clients, the same tokens, step times by the cost
model that was fitted to the run.

What a client did when time came, it does at the recorded time: submit, cancel. What it did on seeing tokens, it does on
seeing the same ones: stop strings, parking. Between a park or an end and the continue it thinks for as long as it did.
A sequence gets the recorded token at every position, because a draw depends on nothing but request, seed and position;
where the recorded run was cut off earlier, filler that ends nothing. A worker's lack of memory for activations is not
simulated.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Literal

from pagewire.recording import Recording
from pagewire.simulation.batch import Batch, RequestRow
from pagewire.simulation.costs import Fit, StepCosts, StepWatch, fit
from pagewire.simulation.exact import config_of, continuation_of, simulate
from pagewire.v1 import recording_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.dispatcher import Admission, Dispatcher, Event, Finished, ParkingVerdict, SchedulerConfig, StepOutput
from scheduler.events import Failed, StatusCode
from scheduler.policy import WorkerCapacity
from scheduler.sequence import FinishReason, Request, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult, StepTimings, TokenLogprobs

Call = Callable[[int], None]
"""Something that happens at a time."""
Position = tuple[int, int, int]
"""Number of the submission, index of the sequence, known tokens before this one."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Settings that differ from the recorded ones; None: as recorded. Sizes are of every worker."""

    preemption_mode: Literal["auto", "swap", "recompute"] | None = None
    token_budget: int | None = None
    max_num_seqs: int | None = None
    prefix_cache: bool | None = None
    num_blocks: int | None = None
    host_blocks: int | None = None

    def config(self, recorded: SchedulerConfig) -> SchedulerConfig:
        """The core's settings."""
        changed = {
            name: getattr(self, name)
            for name in ("preemption_mode", "token_budget", "max_num_seqs", "prefix_cache")
            if getattr(self, name) is not None
        }
        return replace(recorded, **changed)

    def capacity(self, recorded: WorkerCapacity) -> WorkerCapacity:
        """A worker's sizes; one that is asked for more rows or tokens per step has them."""
        return replace(
            recorded,
            num_blocks=recorded.num_blocks if self.num_blocks is None else self.num_blocks,
            host_blocks=recorded.host_blocks if self.host_blocks is None else self.host_blocks,
            max_slots=max(recorded.max_slots, self.max_num_seqs or 0),
            max_step_tokens=max(recorded.max_step_tokens, self.token_budget or 0),
        )


@dataclass
class Tally:
    """What a run brought. Times in nanoseconds."""

    finished: int = 0
    """Turns of requests that ended otherwise than by an error or a park."""
    failed: int = 0
    refused: int = 0
    output_tokens: int = 0
    first_token_ns: list[int] = field(default_factory=list)
    """From submission, per turn."""
    total_ns: list[int] = field(default_factory=list)
    """From submission to the end, per turn."""
    steps: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)
    """By mode."""
    began_ns: int | None = None
    ended_ns: int = 0
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def note(self, event: Event, now: int) -> None:
        """Counts an event of the core."""
        if isinstance(event, Failed):
            self.failed += 1
        elif isinstance(event, Finished) and event.sequence.group.is_finished:
            self._note_end(event.sequence.group, now)

    def _note_end(self, group: SequenceGroup, now: int) -> None:
        key = (group.request.request_id, group.arrival)
        if group.is_parked or key in self._seen:
            return
        self._seen.add(key)
        self.finished += 1
        self.ended_ns = now
        self.output_tokens += sum(len(sequence.output) for sequence in group.sequences[: group.request.n])
        if group.first_token_at is not None:
            self.first_token_ns.append(group.first_token_at - group.accepted_at)
        self.total_ns.append(now - group.accepted_at)

    def count_preemptions(self, dispatcher: Dispatcher, worker_id: str | None = None) -> None:
        """Takes over what schedulers have counted: that of one worker before it leaves, or all at the end."""
        for scheduler in dispatcher.schedulers:
            if worker_id in (None, scheduler.worker_id):
                self.preemptions.update(scheduler.preemptions_total)

    @property
    def seconds(self) -> float:
        """From the first submission to the last end."""
        return max(0, self.ended_ns - (self.began_ns or 0)) / 1e9


@dataclass
class Script:
    """What clients and workers did in a recorded run."""

    calls: list[tuple[int, recording_pb2.RecordingEvent]] = field(default_factory=list)
    """At their times: workers, submissions, cancellations, pins. A worker that left when nothing was to be done stays,
    because a slower run would still need it."""
    tokens: dict[Position, int] = field(default_factory=dict)
    nonfinite: set[Position] = field(default_factory=set)
    offers: dict[tuple[int, tuple[int, ...]], TokenLogprobs] = field(default_factory=dict)
    """Of beams, by number of the submission and output so far."""
    stops: dict[tuple[int, int], deque[int]] = field(default_factory=lambda: defaultdict(deque))
    """Stop strings, by submission and sequence: known tokens that are kept."""
    parks: dict[int, deque[tuple[int, int]]] = field(default_factory=lambda: defaultdict(deque))
    """By submission: known tokens of its first sequence at which it is parked, and for how long."""
    cuts: dict[int, deque[int]] = field(default_factory=lambda: defaultdict(deque))
    """Stop strings found in held requests, by submission: output tokens that are kept."""
    continues: dict[int, deque[tuple[int, recording_pb2.RecordedContinue]]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    """By submission: nanoseconds after its park or end, and what it goes on with."""


class ScriptWatch(StepWatch):
    """Collects the script, the step times and the tally of a recorded run."""

    def __init__(self) -> None:
        super().__init__()
        self.script = Script()
        self.tally = Tally()
        self.dispatcher: Dispatcher | None = None
        self._numbers = Numbers()
        self._sampled: dict[tuple[int, int], list[tuple[RequestRow, int]]] = {}

    def called(self, event: recording_pb2.RecordingEvent, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        kind, script = event.WhichOneof("event"), self.script
        leaves_in_peace = kind == "worker_left" and next(dispatcher.live_groups(), None) is None
        if (
            kind in ("worker_joined", "worker_left", "submitted", "request_ended", "prefix_pinned")
            and not leaves_in_peace
        ):
            script.calls.append((event.at_ns or (script.calls[-1][0] if script.calls else 0), event))
        if kind == "worker_left":
            self.tally.count_preemptions(dispatcher, event.worker_left.worker_id)
        elif kind == "sequence_stopped":
            self._note_stop(event.sequence_stopped, dispatcher)
        elif kind == "parked" and event.parked.verdict == ParkingVerdict.OK.value:
            group = dispatcher.find(event.parked.request_id)
            assert group is not None
            known = group.sequences[0].num_tokens
            script.parks[self._numbers.of(group.request)].append((known, event.parked.ttl_ns))
        elif kind == "held_cut":
            group = dispatcher.find(event.held_cut.request_id)
            if group is not None and group.keep_until is not None:
                script.cuts[self._numbers.of(group.request)].append(event.held_cut.num_tokens)
        elif kind == "continued" and event.continued.verdict == ParkingVerdict.OK.value:
            group = dispatcher.find(event.continued.request_id)
            assert group is not None
            thought = event.at_ns - (group.finished_at or event.at_ns)
            script.continues[self._numbers.of(group.request)].append((thought, event.continued))

    def _note_stop(self, stop: recording_pb2.RecordedStop, dispatcher: Dispatcher) -> None:
        group = dispatcher.find(stop.request_id)
        if group is not None and not group.is_finished:
            known = len(group.request.prompt) + stop.num_tokens
            self.script.stops[self._numbers.of(group.request), stop.index].append(known)

    def submitted(self, request: Request, admission: Admission, now: int) -> None:
        self._numbers.add(request)
        if self.tally.began_ns is None:
            self.tally.began_ns = now
        if admission not in (Admission.OK, Admission.DUPLICATE):
            self.tally.refused += 1

    def sampling(self, plan: StepPlan, batch: Batch[RequestRow]) -> None:
        self._sampled[plan.epoch, plan.step] = batch.sampling()

    def applied(self, worker_id: str, result: StepResult, output: StepOutput, now: int) -> None:
        super().applied(worker_id, result, output, now)
        rows = self._sampled.pop((result.epoch, result.step), None)
        if rows is None or len(rows) != len(result.token_ids):
            return
        self.tally.steps += 1
        offered = dict(zip(result.logprob_rows, result.logprobs, strict=True))
        for place, ((row, known), token) in enumerate(zip(rows, result.token_ids, strict=True)):
            number = self._numbers.of(row.request)
            position = (number, row.index, known)
            if place in result.nonfinite_rows:
                self.script.nonfinite.add(position)
            elif row.request.is_beam_search and place in offered:
                self.script.offers[number, row.beam] = offered[place]
            else:
                self.script.tokens[position] = token

    def happened(self, event: Event, now: int) -> None:
        self.tally.note(event, now)


class Numbers:
    """Numbers submissions in their order; a request of a later turn has the number of the first."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}
        self._payloads: list[object] = []  # kept, so that no identity is used twice

    def add(self, request: Request) -> None:
        self._of[id(request.payload)] = len(self._payloads)
        self._payloads.append(request.payload)

    def of(self, request: Request) -> int:
        return self._of[id(request.payload)]


@dataclass(frozen=True)
class Run:
    """A recorded run, ready to be run otherwise."""

    recording: Recording
    config: SchedulerConfig
    script: Script
    fit: Fit
    measured: Tally
    """As it was."""
    first_difference: str
    """Of the exact simulation. The script ends there."""


def read(recording: Recording) -> Run:
    """Simulates a recording exactly, to learn from it. Raises RecordingError and, with too few steps, ValueError."""
    watch = ScriptWatch()
    report = simulate(recording, watch)
    if watch.dispatcher is not None:
        watch.tally.count_preemptions(watch.dispatcher)
    return Run(recording, config_of(recording), watch.script, fit(watch.steps), watch.tally, report.first_difference)


def run_with(run: Run, changes: Changes) -> Tally:
    """The run with other settings."""
    return _WhatIf(run, changes).run()


class _Worker:
    """Executes plans one after the other, in the time that the cost model says."""

    def __init__(self, hello: worker_pb2.WorkerHello, epoch: int, costs: StepCosts) -> None:
        self.costs = costs.with_measured_swap(hello)
        self.epoch = epoch
        self.batch = Batch(RequestRow.of)
        self.free_at = 0


class _WhatIf:
    def __init__(self, run: Run, changes: Changes) -> None:
        self.script, self.costs, self.link_ns = run.script, run.fit.costs, round(run.fit.link_ns)
        self.changes = changes
        self.limits = codec.limits_of(run.recording.header.model)
        self.dispatcher = Dispatcher(changes.config(run.config))
        self.tally = Tally()
        self.workers: dict[str, _Worker] = {}
        self.numbers = Numbers()
        self.queue: list[tuple[int, int, Call]] = []
        self.made = 0
        self.waiting_stops = {key: deque(known) for key, known in run.script.stops.items()}
        self.waiting_parks = {key: deque(parks) for key, parks in run.script.parks.items()}
        self.waiting_cuts = {key: deque(cuts) for key, cuts in run.script.cuts.items()}
        self.waiting_continues = {key: deque(continues) for key, continues in run.script.continues.items()}

    def run(self) -> Tally:
        for at, event in self.script.calls:
            self._at(at, lambda now, event=event: self._client(event, now))  # type: ignore[misc]
        while self.queue:
            due = self.dispatcher.next_expiry()
            if due is not None and due < self.queue[0][0]:
                self.dispatcher.expire(due)
                now = due
            else:
                now, _, call = heappop(self.queue)
                call(now)
            for worker_id in self.dispatcher.take_woken():
                self._plan(worker_id, now)
            self._tell(now)
        self.tally.count_preemptions(self.dispatcher)
        return self.tally

    def _at(self, at: int, call: Call) -> None:
        self.made += 1
        heappush(self.queue, (at, self.made, call))

    # What happens at its time

    def _client(self, event: recording_pb2.RecordingEvent, now: int) -> None:
        kind = event.WhichOneof("event")
        if kind == "worker_joined":
            self._join(event.worker_joined.hello, event.worker_joined.epoch, now)
        elif kind == "worker_left":
            worker_id = event.worker_left.worker_id
            self.tally.count_preemptions(self.dispatcher, worker_id)
            self.workers.pop(worker_id, None)
            self.dispatcher.remove_worker(worker_id, now)
        elif kind == "submitted":
            self._submit(event.submitted, now)
        elif kind == "request_ended":
            ended = event.request_ended
            if ended.finish_reason:
                self.dispatcher.abort(ended.request_id, FinishReason(ended.finish_reason), now)
            else:
                self.dispatcher.fail(ended.request_id, StatusCode(ended.code), ended.reason, "", now)
        elif event.prefix_pinned.unpin:
            self.dispatcher.unpin_prefix(event.prefix_pinned.tenant, event.prefix_pinned.token_ids[:])
        else:
            self.dispatcher.pin_prefix(event.prefix_pinned.tenant, event.prefix_pinned.token_ids[:])

    def _join(self, hello: worker_pb2.WorkerHello, epoch: int, now: int) -> None:
        self.tally.count_preemptions(self.dispatcher, hello.worker_id)
        self.workers[hello.worker_id] = _Worker(hello, epoch, self.costs)
        capacity = self.changes.capacity(codec.capacity_of(hello))
        self.dispatcher.add_worker(hello.worker_id, capacity, codec.rates_of(hello), epoch, now)

    def _submit(self, submitted: recording_pb2.RecordedSubmission, now: int) -> None:
        submit = scheduler_pb2.Submit()
        submit.CopyFrom(submitted.submit)
        request = codec.decode_submit(submit, self.limits, now)
        self.numbers.add(request)
        if submitted.verdict == Admission.DUPLICATE.value:
            return
        if self.tally.began_ns is None:
            self.tally.began_ns = now
        if self.dispatcher.submit(request, now).admission is not Admission.OK:
            self.tally.refused += 1

    # Steps

    def _plan(self, worker_id: str, now: int) -> None:
        while (plan := self.dispatcher.schedule(worker_id, now)) is not None:
            worker = self.workers[worker_id]
            load = worker.batch.execute(plan)
            step_ns = worker.costs.step_ns(load)
            idle, early = max(0, now - worker.free_at), max(0, worker.free_at - now)
            worker.free_at += idle + round(step_ns) + self.link_ns
            swap_out, swap_in = (round(worker.costs.swap_ns * len(moves)) for moves in (plan.swap_out, plan.swap_in))
            timings = StepTimings(
                idle_ns=idle,
                early_ns=early,
                swap_out_ns=swap_out,
                swap_in_ns=swap_in,
                forward_ns=max(0, round(step_ns) - swap_out - swap_in),
                chunk_tokens=load.chunk_tokens,
                decode_tokens=load.decode_tokens,
            )
            result = self._result(plan, worker.batch.sampling(), timings)
            self._at(worker.free_at, lambda at, result=result: self._apply(worker_id, result, at))  # type: ignore[misc]

    def _result(self, plan: StepPlan, rows: list[tuple[RequestRow, int]], timings: StepTimings) -> StepResult:
        tokens, nonfinite = [], []
        offers: dict[int, TokenLogprobs] = {}
        for place, (row, known) in enumerate(rows):
            position = (self.numbers.of(row.request), row.index, known)
            if position in self.script.nonfinite:
                nonfinite.append(place)
            if row.request.is_beam_search:
                offers[place] = self.script.offers.get((position[0], row.beam)) or _filler_offer(row.request)
            token = self.script.tokens.get(position)
            tokens.append(_filler(row.request) if token is None else token)
        return StepResult(
            plan.epoch,
            plan.step,
            tokens,
            logprob_rows=list(offers),
            logprobs=list(offers.values()),
            nonfinite_rows=nonfinite,
            timings=timings,
        )

    def _apply(self, worker_id: str, result: StepResult, now: int) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.epoch != result.epoch:
            return  # it has left meanwhile
        self.tally.steps += 1
        output = self.dispatcher.apply(worker_id, result, now)
        for sequence in dict.fromkeys(output.sequences):
            number = self.numbers.of(sequence.request)
            self._stop(sequence.group, number, sequence.index, now)
            if sequence.index == 0:
                self._park(sequence.group, number, now)
        self._plan(worker_id, now)

    # What clients do on seeing tokens

    def _stop(self, group: SequenceGroup, number: int, index: int, now: int) -> None:
        stops, sequence = self.waiting_stops.get((number, index)), group.sequences[index]
        if stops and sequence.num_tokens >= stops[0]:
            kept = stops.popleft() - len(group.request.prompt)
            if kept >= 0:
                self.dispatcher.stop_sequence(group.request.request_id, index, kept, "", now)

    def _park(self, group: SequenceGroup, number: int, now: int) -> None:
        parks = self.waiting_parks.get(number)
        if parks and group.sequences[0].num_tokens >= parks[0][0]:
            self.dispatcher.park(group.request.request_id, parks.popleft()[1], now)

    def _tell(self, now: int) -> None:
        ended: dict[SequenceGroup, None] = {}
        for event in self.dispatcher.take_events():
            self.tally.note(event, now)
            if isinstance(event, Finished) and event.sequence.group.is_finished:
                ended[event.sequence.group] = None
        for group in ended:
            number, request_id = self.numbers.of(group.request), group.request.request_id
            if group.keep_until is None:
                continue
            cuts, continues = self.waiting_cuts.get(number), self.waiting_continues.get(number)
            if cuts and not group.is_parked:
                self.dispatcher.cut(request_id, 0, cuts.popleft(), "")
            if continues:
                thought, continued = continues.popleft()
                self._at(now + thought, lambda at, continued=continued: self._continue(continued, at))  # type: ignore[misc]

    def _continue(self, continued: recording_pb2.RecordedContinue, now: int) -> None:
        self.dispatcher.resume(continued.request_id, continuation_of(continued, self.limits, now), now)


def _filler(request: Request) -> int:
    """A token that ends nothing."""
    return next(token for token in range(len(request.stop_ids) + 1) if token not in request.stop_ids)


def _filler_offer(request: Request) -> TokenLogprobs:
    """What a beam offers where the recorded run was cut off before it."""
    count = request.start_beam_search().num_candidates
    return TokenLogprobs(0.0, 1, list(range(count)), [-1.0 - place for place in range(count)])
