"""The engine: where links meet the core. Every event of every link passes here, and nothing here waits.

One turn is: let the workers have their next plans, then tell the sessions what is new. A result causes its own turn at
once, plans first, because the worker must not wait for the clients' tokens; submissions, aborts and joins are collected
until the event loop has read what else has arrived.

A defect of the core cannot be confined to one request: it is logged, and `failed` ends the process, whose supervisor
starts another.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import grpc

from pagewire.runtime import logs
from pagewire.runtime.fault_points import fault_point
from pagewire.runtime.tracing import Tracer
from pagewire.v1 import control_pb2, recording_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.codec import SubmitError
from scheduler.config import SchedulerSettings
from scheduler.dispatcher import Admission, ParkingVerdict, ResultError, StepOutput
from scheduler.duplex import Refusal, wrong_field
from scheduler.events import Admitted, Failed, Finished, StatusCode
from scheduler.fanout import Fanout
from scheduler.gateway_link import Listener, Session
from scheduler.metrics import NS_PER_S, Metrics
from scheduler.policy import SchedulerConfig
from scheduler.recorder import RecordedDispatcher, Recorder
from scheduler.sequence import FinishReason, Request, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult
from scheduler.traces import Traces
from scheduler.worker_link import WorkerLink

MAX_LISTED = 1000
"""Live requests that one answer of GetLoads lists."""
MAX_TENANT = 128
"""Characters of a tenant's name, as at the gateway."""
QUEUE_FULL_RETRY_NS = 1 * NS_PER_S
NO_WORKER_RETRY_NS = 2 * NS_PER_S
DRAINING_RETRY_NS = 5 * NS_PER_S
MIN_TIMER_NS = 1_000_000

_PARKING_ERRORS = {
    ParkingVerdict.UNKNOWN: (codec.NOT_FOUND, "REQUEST_NOT_FOUND", "no live, parked or recent request has this name"),
    ParkingVerdict.NOT_LIVE: (
        codec.FAILED_PRECONDITION,
        "REQUEST_NOT_LIVE",
        "the request has ended or is parked; only a live one can be parked",
    ),
    ParkingVerdict.NOT_PARKED: (
        codec.FAILED_PRECONDITION,
        "REQUEST_NOT_PARKED",
        "the request is neither parked nor held: park it first, or ask with hold_seconds",
    ),
    ParkingVerdict.SEARCHES: (
        codec.FAILED_PRECONDITION,
        "BEAM_SEARCH",
        "a beam search cannot be parked: it has no answer yet that could be kept",
    ),
    ParkingVerdict.FULL: (
        codec.RESOURCE_EXHAUSTED,
        "PARK_LIMIT",
        "as many requests as may be are parked already: continue or cancel one",
    ),
    ParkingVerdict.ONE_SEQUENCE: (
        codec.FAILED_PRECONDITION,
        "SEVERAL_SEQUENCES",
        "a request of several sequences goes on as it was: leave input, max_tokens and hold_seconds unset",
    ),
    ParkingVerdict.CONTEXT_FULL: (
        codec.FAILED_PRECONDITION,
        "CONTEXT_FULL",
        "the model's context has no room for the input and one more token",
    ),
}
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_CODES = {code.value[0]: code for code in grpc.StatusCode}

log = logs.get_logger("scheduler.engine")


class Engine:
    """Owns the dispatcher, the workers' links and the gateways' sessions. Lives on one event loop."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        wall_ms: int | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Makes an engine without workers.

        Args:
            settings: the process's.
            clock: nanoseconds of a monotonic clock.
            wall_ms: milliseconds of the wall clock, from which epochs are counted on; None: now. Later starts have
                larger ones, so epochs grow over restarts too.
            tracer: makes spans; None: there are no traces.
        """
        self.settings = settings
        self.clock = clock
        self.metrics = Metrics()
        self.config = SchedulerConfig(
            max_num_seqs=settings.max_num_seqs,
            token_budget=settings.token_budget,
            target_itl_ns=round(settings.target_itl_ms * 1e6),
            preemption_mode=settings.preemption_mode,
            prefix_cache=settings.prefix_cache,
            host_prefix_cache=settings.host_prefix_cache,
            max_waiting=settings.max_waiting,
            max_worker_losses=settings.max_worker_losses,
            watermark=settings.watermark,
            headroom=settings.headroom,
            retention_ns=int(settings.retention_s * NS_PER_S),
            max_retained=settings.max_retained,
            park_ceiling_ns=int(settings.park_ceiling_s * NS_PER_S),
            max_parked=settings.max_parked,
            max_parked_per_tenant=settings.max_parked_per_tenant,
            park_arena_share=settings.park_arena_share,
        )
        self.dispatcher = RecordedDispatcher(self.config, lambda worker_id: self.workers[worker_id].hello)
        self.workers: dict[str, WorkerLink] = {}
        self.sessions: dict[str, Session] = {}
        self.model: worker_pb2.ModelInfo | None = None
        """What the first worker ever has loaded; every later one must agree."""
        self.block_size = 0
        self.draining = False
        self.shutting_down = False
        self.live: dict[str, SequenceGroup] = {}
        """Requests that were accepted and whose end has not been told yet, by name."""
        self.started_at = clock()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception when the core is broken."""
        self.on_state: Callable[[scheduler_pb2.ModelState], None] = lambda _state: None
        """Called at every change of the model state."""
        self._limits: codec.ModelLimits | None = None
        self._epoch = int(time.time() * 1000) if wall_ms is None else wall_ms
        self._state = scheduler_pb2.ModelState()
        self._fanout = Fanout()
        self._traces = None if tracer is None else Traces(tracer, clock)
        self._touched: dict[Session, None] = {}
        self._turn_due = False
        self._expiry_at: int | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._orphans: dict[str, asyncio.TimerHandle] = {}
        self._no_worker_timer: asyncio.TimerHandle | None = None
        self._gave_up = False

    # Workers

    def next_epoch(self) -> int:
        """An epoch larger than all before it."""
        self._epoch += 1
        return self._epoch

    def check_pool(self, hello: worker_pb2.WorkerHello) -> None:
        """Refuses a worker that this pool cannot take: another model, or one too many."""
        if self.model is not None and hello.model.fingerprint != self.model.fingerprint:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the worker has loaded {hello.model.name!r} with fingerprint {hello.model.fingerprint}, "
                f"this scheduler serves {self.model.name!r} with fingerprint {self.model.fingerprint}",
                reason="MODEL_MISMATCH",
                metadata={"worker": hello.model.fingerprint, "scheduler": self.model.fingerprint},
            )
        if len(self.workers) >= self.settings.max_workers and hello.worker_id not in self.workers:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{len(self.workers)} workers have joined, which is the limit (max_workers)",
                reason="TOO_MANY_WORKERS",
            )

    def join(self, link: WorkerLink) -> None:
        """Makes a worker ready. One of the same name is taken for its own past and ended."""
        before = self.workers.get(link.worker_id)
        if before is not None:
            before.end(Refusal(grpc.StatusCode.ABORTED, "the worker has joined again", reason="SUPERSEDED"))
            self.leave(before, "it has joined again")
        if self.model is None:
            self.model = worker_pb2.ModelInfo()
            self.model.CopyFrom(link.hello.model)
            self._limits = codec.limits_of(self.model)
            self.block_size = link.hello.capacity.block_size
        self.workers[link.worker_id] = link
        self._gave_up = False
        if self._no_worker_timer is not None:
            self._no_worker_timer.cancel()
            self._no_worker_timer = None
        capacity, rates = codec.capacity_of(link.hello), codec.rates_of(link.hello)
        self.dispatcher.add_worker(link.worker_id, capacity, rates, link.epoch, self.clock())
        self._fanout.groups_moved()
        log.info("worker joined", worker=link.worker_id, epoch=link.epoch, device=link.hello.device)
        self.state_changed()
        self._wake()

    def leave(self, link: WorkerLink, why: str) -> None:
        """Takes a worker's sequences back; they go on elsewhere or wait. A link that has left already is ignored."""
        if self.workers.get(link.worker_id) is not link:
            return
        figures = self.dispatcher.loads_of(link.worker_id)
        if figures is not None:
            self.metrics.retire(figures)
        del self.workers[link.worker_id]
        self.dispatcher.remove_worker(link.worker_id, self.clock())
        self._fanout.groups_moved()
        if not self.workers:
            loop = asyncio.get_running_loop()
            self._no_worker_timer = loop.call_later(self.settings.no_worker_s, self._give_up)
        say = log.info if self.shutting_down else log.warning
        say("worker lost", worker=link.worker_id, epoch=link.epoch, last_step=link.last_step, why=why)
        self.state_changed()
        self._wake()

    def _give_up(self) -> None:
        """No worker has come back in time: ends everything that waits for one."""
        self._no_worker_timer, self._gave_up = None, True
        message = f"the workers were lost and none came back within {self.settings.no_worker_s:g} s"
        now = self.clock()
        for request_id in list(self.live):
            self.dispatcher.fail(request_id, StatusCode.UNAVAILABLE, "WORKER_LOST", message, now, NO_WORKER_RETRY_NS)
        self._wake()

    def shut_down(self) -> None:
        """Ends every stream, so that peers look for another scheduler or wait for this one to come back."""
        self.shutting_down = True
        refusal = Refusal(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down", reason="SHUTTING_DOWN")
        for link in self.workers.values():
            link.end(refusal)
        for session in self.sessions.values():
            session.end(refusal)

    def result(self, link: WorkerLink, message: worker_pb2.StepResult) -> None:
        """Applies a result, sends the worker its next plan, then tells the sessions.

        Raises:
            Refusal: the result contradicts its plan; the worker's stream must end.
        """
        if self.workers.get(link.worker_id) is not link:
            self.metrics.stale_results += 1
            return
        result = codec.decode_result(message)
        arrived = link.heard_at
        self._check_result(result)
        try:
            output = self._apply(link, result, arrived)
            fault_point("scheduler.after_apply")
            if output.accepted:
                self._measure(link, result, output, arrived)
            self._pump(link)
            fault_point("scheduler.before_emit")
            self._touch(self._fanout.deliver(link.worker_id, output))
            self._settle()
        except Refusal:
            raise
        except Exception as error:
            self.fail(error)
        if self.dispatcher.has_woken:
            self._wake()

    def _check_result(self, result: StepResult) -> None:
        assert self._limits is not None
        vocab_size = self._limits.vocab_size
        too_large = result.token_ids and max(result.token_ids) >= vocab_size
        if result.logprobs:  # a beam search chooses among the likeliest
            too_large = too_large or max(max(one.top_ids, default=0) for one in result.logprobs) >= vocab_size
        if too_large and not result.nonfinite_rows:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"step {result.step} sampled an id that is not below the vocabulary size {vocab_size}",
                reason="BAD_RESULT",
            )

    def _apply(self, link: WorkerLink, result: StepResult, now: int) -> StepOutput:
        """The one place where results pass."""
        try:
            return self.dispatcher.apply(link.worker_id, result, now)
        except ResultError as error:
            log.error("a result contradicts its plan", worker=link.worker_id, step=result.step, what=str(error))
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error), reason="BAD_RESULT") from None

    def _pump(self, link: WorkerLink) -> None:
        """Sends plans for as long as there is something to do and the core allows another in flight."""
        while True:
            begun = self.clock()
            plan = self.dispatcher.schedule(link.worker_id, begun)
            if plan is None:
                return
            self._send(link, plan)
            self.metrics.step_time["plan"].observe((self.clock() - begun) / NS_PER_S)

    def _send(self, link: WorkerLink, plan: StepPlan) -> None:
        """The one place where plans pass."""
        traces = self._traces
        traced = () if traces is None else traces.of_plan(self.dispatcher.computing(link.worker_id))
        raw = codec.encode_plan(plan, traced)
        fault_point("scheduler.before_plan_sent")
        link.send(raw)
        link.plan_sent(plan.step)
        log.debug("plan sent", worker=link.worker_id, epoch=plan.epoch, step=plan.step)
        block_bytes = link.hello.capacity.block_bytes
        self.metrics.swap_bytes["out"] += len(plan.swap_out.sources) * block_bytes
        self.metrics.swap_bytes["in"] += len(plan.swap_in.sources) * block_bytes

    # Sessions

    def open(self, session: Session) -> None:
        """Takes a session in and tells it the model state. Raises Refusal when there are too many."""
        if len(self.sessions) >= self.settings.max_sessions:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{len(self.sessions)} sessions are open, which is the limit (max_sessions)",
                reason="TOO_MANY_SESSIONS",
            )
        self.sessions[session.session_id] = session
        session.tell(self.model_state())
        log.info("session opened", session=session.session_id, gateway=session.gateway_id)

    def close(self, session: Session) -> None:
        """Lets go of a session. Its requests go on for a while, so that somebody can attach to them."""
        if self.sessions.pop(session.session_id, None) is None:
            return
        listeners = list(session.listeners.values())
        for listener in listeners:
            group = listener.group
            self._unlisten(listener)
            if not group.listeners and not group.request.detached:
                self._orphan(group.request.request_id)
        self._touched.pop(session, None)
        log.info("session closed", session=session.session_id, gateway=session.gateway_id, listeners=len(listeners))

    def submit(self, session: Session, message: scheduler_pb2.Submit) -> None:
        """Starts a request, or answers it with StreamFailed."""
        stream = message.stream
        try:
            group = self._accept(session, message)
        except SubmitError as error:
            if self._traces is not None:
                self._traces.refused(message, error.reason)
            self._refuse(session, stream, error)
            return
        except AssertionError as error:
            self.fail(error)
            return
        except Refusal:
            raise
        except Exception:
            log.exception("a submission failed", request_id=message.request_id)
            self._refuse(session, stream, SubmitError(codec.INTERNAL, "INTERNAL", "the scheduler failed here"))
            return
        self.live[group.request.request_id] = group
        log.debug("request accepted", request_id=group.request.request_id, prompt_tokens=len(group.request.prompt))
        if self._traces is not None:
            self._traces.submitted(group)
        group.listeners += (session.listen(group, stream),)
        self._wake()

    def _accept(self, session: Session, message: scheduler_pb2.Submit) -> SequenceGroup:
        self._check_open()
        assert self._limits is not None
        now = self.clock()
        request: Request = codec.decode_submit(message, self._limits, now)
        session.check_free(message.stream, request.n)
        submitted = self.dispatcher.submit(request, now)
        verdict = submitted.admission
        if verdict is Admission.LATER:
            raise SubmitError(codec.RESOURCE_EXHAUSTED, "QUEUE_FULL", submitted.reason, QUEUE_FULL_RETRY_NS)
        if verdict is Admission.TOO_LATE:
            raise SubmitError(codec.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE", submitted.reason)
        if verdict is Admission.DUPLICATE:
            raise SubmitError(codec.ALREADY_EXISTS, "REQUEST_EXISTS", "a live request has this request_id")
        if verdict is Admission.NEVER:
            raise SubmitError(codec.INVALID_ARGUMENT, "NEVER_FITS", submitted.reason)
        assert submitted.group is not None
        return submitted.group

    def park(self, request_id: str, ttl_s: int) -> scheduler_pb2.ParkLiveResponse:
        """Parks a live request by name. Raises Refusal for one that cannot be."""
        ceiling_s = int(self.settings.park_ceiling_s)
        ttl_s = min(ttl_s or ceiling_s, ceiling_s)
        verdict = self.dispatcher.park(request_id, ttl_s * NS_PER_S, self.clock())
        if verdict is not ParkingVerdict.OK:
            code, reason, message = _PARKING_ERRORS[verdict]
            raise Refusal(_CODES[code], message, reason=reason)
        self._settle()
        self._wake()
        group = self.dispatcher.find(request_id)
        assert group is not None
        response = scheduler_pb2.ParkLiveResponse(ttl_seconds=ttl_s)
        for sequence in group.sequences:
            if sequence.finish is not None and sequence.finish.reason is FinishReason.PARKED:
                first_token = len(sequence.earlier) + len(sequence.output)
                response.positions.add(index=sequence.index, first_token=first_token)
        return response

    def resume(self, session: Session, message: scheduler_pb2.ContinueStream) -> None:
        """Takes a parked or held request up again and listens to it, or answers with StreamFailed."""
        stream, request_id = message.stream, message.request_id
        self._settle()  # what has happened before must not be told again after the snapshot
        known = self.dispatcher.find(request_id)
        if known is not None:
            session.check_free(stream, len(known.sequences))
        try:
            group = self._continue(message)
        except SubmitError as error:
            self._refuse(session, stream, error)
            return
        self.live[request_id] = group
        session.snapshot(codec.encode_attached(stream, group))
        group.listeners += (session.listen(group, stream),)
        self._fanout.groups_moved()
        self._wake()

    def _continue(self, message: scheduler_pb2.ContinueStream) -> SequenceGroup:
        self._check_open()
        assert self._limits is not None
        now = self.clock()
        what = codec.decode_continuation(message, self._limits, now)
        resumed = self.dispatcher.resume(message.request_id, what, now)
        if resumed.verdict is ParkingVerdict.LATER:
            raise SubmitError(codec.RESOURCE_EXHAUSTED, "QUEUE_FULL", resumed.reason, QUEUE_FULL_RETRY_NS)
        if resumed.verdict is ParkingVerdict.NEVER:
            raise SubmitError(codec.INVALID_ARGUMENT, "NEVER_FITS", resumed.reason)
        if resumed.group is None:
            raise SubmitError(*_PARKING_ERRORS[resumed.verdict])
        return resumed.group

    def _check_open(self) -> None:
        """Raises SubmitError while no requests are taken."""
        if self.draining:
            raise SubmitError(
                codec.UNAVAILABLE, "DRAINING", "the scheduler takes no new requests: it drains", DRAINING_RETRY_NS
            )
        if self._limits is None or self._gave_up:
            raise SubmitError(codec.UNAVAILABLE, "NO_WORKER", "no worker has joined", NO_WORKER_RETRY_NS)

    def _refuse(self, session: Session, stream: int, error: SubmitError) -> None:
        session.failed.append(codec.encode_refusal(stream, error))
        session.flush()

    def attach(self, session: Session, stream: int, request_id: str) -> None:
        """Sends everything so far of a request and listens to the rest."""
        self._settle()  # what has happened before must not be told again after the snapshot
        group = self.dispatcher.find(request_id)
        if group is None:
            error = SubmitError(codec.NOT_FOUND, "REQUEST_NOT_FOUND", "no live or recent request has this name")
            self._refuse(session, stream, error)
            return
        session.check_free(stream, group.request.n)
        session.snapshot(codec.encode_attached(stream, group))
        if isinstance(group.failure, Failed):
            session.failed.append(codec.encode_failed(stream, group.failure))
            session.flush()
        elif not group.is_finished:
            group.listeners += (session.listen(group, stream),)
            self._fanout.listeners_changed(group)
            self._adopt(request_id)

    def detach(self, session: Session, stream: int) -> None:
        """Stops listening. A request that nobody listens to any more is cancelled, unless it is detached."""
        listener = session.listeners.get(stream)
        if listener is None:
            return  # it has ended meanwhile
        group = listener.group
        self._unlisten(listener)
        if not group.listeners and not group.request.detached:
            self.abort(group.request.request_id)

    def stop(self, session: Session, stop: scheduler_pb2.StopSequence) -> None:
        """Ends a sequence at a stop string."""
        found, num_tokens, matched_stop = session.sequence(stop.stream), stop.num_tokens, stop.matched_stop
        if found is None:  # it has ended meanwhile; if it is held, what is behind the stop string must not be
            self.dispatcher.cut(stop.request_id, stop.index, num_tokens, matched_stop)
            return
        group, index = found
        num_tokens -= len(group.sequences[index].earlier)
        if not 0 <= num_tokens <= len(group.sequences[index].output):
            log.error("a stop string behind the last token", request_id=group.request.request_id, num_tokens=num_tokens)
            return
        now = self.clock()
        if self.dispatcher.stop_sequence(group.request.request_id, index, num_tokens, matched_stop, now):
            self._wake()

    def abort(self, request_id: str) -> bool:
        """Cancels a request. False: no live one has that name."""
        found = self.dispatcher.abort(request_id, FinishReason.CANCELLED, self.clock())
        self._wake()
        return found

    def _unlisten(self, listener: Listener) -> None:
        group = listener.group
        listener.session.forget(listener)
        group.listeners = tuple(other for other in group.listeners if other is not listener)
        self._fanout.listeners_changed(group)

    def _orphan(self, request_id: str) -> None:
        self._adopt(request_id)
        timer = asyncio.get_running_loop().call_later(self.settings.orphan_s, self._end_orphan, request_id)
        self._orphans[request_id] = timer

    def _adopt(self, request_id: str) -> None:
        timer = self._orphans.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def _end_orphan(self, request_id: str) -> None:
        del self._orphans[request_id]
        log.info("nobody came back for a request", request_id=request_id)
        self.abort(request_id)

    # State

    def model_state(self) -> scheduler_pb2.ModelState:
        """What is served, and whether it is ready."""
        ready = [link for link in self.workers.values() if not link.stalled]
        return scheduler_pb2.ModelState(
            model=self.model,
            block_size=self.block_size,
            kv_blocks=sum(link.hello.capacity.num_blocks for link in ready),
            ready=bool(ready),
            workers=len(ready),
            draining=self.draining,
        )

    def state_changed(self) -> None:
        """Tells everyone the model state if it differs from what they were told last."""
        state = self.model_state()
        if state == self._state:
            return
        self._state = state
        for session in self.sessions.values():
            session.tell(state)
        self.on_state(state)

    def drain(self, *, resume: bool) -> int:
        """Stops (or resumes) the admission of new requests; returns how many live ones there are."""
        self.draining = not resume
        self.state_changed()
        return len(self.live)

    def pin_prefix(self, request: control_pb2.PinPrefixRequest) -> control_pb2.PinPrefixResponse:
        """Pins a prefix or unpins one. Raises Refusal for one that makes no sense or is too much."""
        limits, tokens, tenant = self._limits, request.token_ids[:], request.tenant
        if limits is None:
            message = "no worker has joined, so the block size is not known yet"
            raise Refusal(grpc.StatusCode.UNAVAILABLE, message, reason="NO_WORKER")
        if len(tokens) < self.block_size:
            raise wrong_field("token_ids", f"must hold a full block, which is {self.block_size} tokens")
        if len(tokens) > limits.max_model_len:
            raise wrong_field("token_ids", f"has {len(tokens)} tokens, but the context is {limits.max_model_len}")
        if max(tokens) >= limits.vocab_size:
            raise wrong_field("token_ids", f"must be below the vocabulary size {limits.vocab_size}")
        if len(tenant) > MAX_TENANT:
            raise wrong_field("tenant", f"must have at most {MAX_TENANT} characters")
        if request.unpin:
            found = self.dispatcher.unpin_prefix(tenant, tokens)
            self._wake()
            return control_pb2.PinPrefixResponse(found=found)
        refused = self.dispatcher.pin_prefix(tenant, tokens)
        if refused is not None:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, refused, reason="PIN_LIMIT")
        return control_pb2.PinPrefixResponse(pinned_tokens=len(tokens) // self.block_size * self.block_size, found=True)

    # Recording

    def record(self, path: Path) -> Recorder:
        """Records from now on. Raises OSError when the file cannot be made."""
        core = self.dispatcher
        present = [
            recording_pb2.RecordedWorkerPresent(hello=link.hello, epoch=link.epoch, last_step=link.last_step)
            for link in self.workers.values()
        ]
        loads = core.loads()
        holds_state = bool(present or self.live or loads.unassigned or loads.parked or len(core.pins))
        recorder = Recorder(path, self.config, self.settings_as_text(), in_mid_run=holds_state, present=present)
        self.dispatcher.recorder = recorder
        return recorder

    def start_recording(self, name: str) -> Recorder:
        """Records into a new file of the folder for that. Raises Refusal when that cannot be."""
        folder, running = self.settings.record_dir, self.dispatcher.recorder
        if folder is None:
            message = "no folder for recordings is set: start the scheduler with --record-dir"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message, reason="RECORDING_OFF")
        if running is not None and running.is_recording:
            message = f"{running.path} is being recorded: stop that first"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message, reason="RECORDING_RUNS")
        name = name or time.strftime("%Y%m%dT%H%M%SZ.rec", time.gmtime())
        if not _FILE_NAME.fullmatch(name):
            description = "must be 1 to 100 letters, digits, dots, dashes and underscores, and begin with no dot"
            raise wrong_field("name", description)
        try:
            return self.record(folder / name)
        except FileExistsError:
            message = f"{folder / name} exists: choose another name"
        except OSError as error:
            message = f"{folder / name} cannot be written: {error.strerror}"
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message, reason="RECORDING_FAILED")

    def end_recording(self) -> Recorder:
        """Records no more; the caller waits for the file. Raises Refusal when nothing is being recorded."""
        recorder, self.dispatcher.recorder = self.dispatcher.recorder, None
        if recorder is None:
            message = "nothing is being recorded"
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, message, reason="NOT_RECORDING")
        return recorder

    def settings_as_text(self) -> dict[str, str]:
        """The effective settings."""
        return {name: str(value) for name, value in self.settings.model_dump(mode="json").items()}

    def loads(self, max_requests: int = 0) -> control_pb2.GetLoadsResponse:
        """What every worker carries, and so many of the live requests."""
        response = codec.encode_loads(self.dispatcher.loads())
        for load in response.loads:
            link = self.workers[load.worker_id]
            load.steps, load.busy_ns, load.idle_ns = link.last_step, link.busy_ns, link.idle_ns
        response.now_ns = now = self.clock()
        response.live_requests = len(self.live)
        response.draining = self.draining
        for group in islice(self.dispatcher.live_groups(), min(max_requests, MAX_LISTED)):
            response.requests.append(codec.encode_request(group, now))
        return response

    def fail(self, error: Exception) -> None:
        """The core is broken: ends the process."""
        log.critical("the scheduler's core has failed", exc_info=error)
        if not self.failed.done():
            self.failed.set_exception(error)

    # Turns

    def _wake(self) -> None:
        """Has a turn made once the event loop has read what else has arrived: plans for those that have something new
        to plan, and never a look at every worker."""
        if not self._turn_due:
            self._turn_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self.failed.done():
            return
        try:
            for worker_id in self.dispatcher.take_woken():
                link = self.workers.get(worker_id)
                if link is not None:
                    self._pump(link)
            self._settle()
        except Exception as error:
            self.fail(error)

    def _touch(self, sessions: list[Session]) -> None:
        for session in sessions:
            self._touched[session] = None

    def _settle(self) -> None:
        """Tells the sessions what has happened: one message each, events after tokens."""
        ended: dict[SequenceGroup, None] = {}
        for event in self.dispatcher.take_events():
            if isinstance(event, Admitted):
                self._admitted(event.group)
            elif isinstance(event, Finished):
                self._finished(event)
                if event.sequence.group.is_finished:
                    ended[event.sequence.group] = None
            else:
                self._failed(event)
                ended[event.group] = None
        for group in ended:  # only now: further sequences of a group may have ended in the same step
            self._ended(group)
        if self._touched:
            touched, self._touched = self._touched, {}
            for session in touched:
                session.flush()
        self._arm_expiry()

    def _admitted(self, group: SequenceGroup) -> None:
        self.metrics.prompt_tokens += len(group.request.prompt)
        if self._traces is not None:
            self._traces.admitted(group)
        if group.started_at is not None:
            self.metrics.queue_time.observe((group.started_at - group.accepted_at) / NS_PER_S)
        for listener in group.listeners:
            listener.session.admitted.append(codec.encode_admitted(listener.stream, group))
            self._touched[listener.session] = None

    def _finished(self, event: Finished) -> None:
        sequence = event.sequence
        group = sequence.group
        assert sequence.finish is not None
        self.metrics.finished[sequence.finish.reason.value] += 1
        for listener in group.listeners:
            finished = codec.encode_finished(listener.stream + sequence.index, sequence)
            listener.session.finished.append(finished)
            self._touched[listener.session] = None

    def _failed(self, event: Failed) -> None:
        group = event.group
        self.metrics.finished[FinishReason.ERROR.value] += group.request.n
        for listener in group.listeners:
            listener.session.failed.append(codec.encode_failed(listener.stream, event))
            self._touched[listener.session] = None
        log.warning("request failed", request_id=group.request.request_id, reason=event.reason)

    def _ended(self, group: SequenceGroup) -> None:
        if self.live.get(group.request.request_id) is group:  # its name may have been used again already
            del self.live[group.request.request_id]
        log.debug("request ended", request_id=group.request.request_id, worker=group.worker_id)
        if self._traces is not None:
            self._traces.ended(group, group.failure.reason if isinstance(group.failure, Failed) else "")
        if group.finished_at is not None:
            self.metrics.e2e_latency.observe((group.finished_at - group.accepted_at) / NS_PER_S)
        for listener in group.listeners:
            self._unlisten(listener)
        self._adopt(group.request.request_id)

    def _measure(self, link: WorkerLink, result: StepResult, output: StepOutput, arrived: int) -> None:
        """Counts a step. Nothing here loops over the tokens."""
        metrics, timings = self.metrics, result.timings
        before = link.result_at
        sent_at = link.result_arrived(result.step)
        link.result_at = arrived
        num_tokens = len(output.token_ids)
        metrics.generation_tokens += num_tokens
        num_first = 0
        for group in output.first_tokens:
            assert group.first_token_at is not None
            metrics.time_to_first_token.observe((group.first_token_at - group.accepted_at) / NS_PER_S)
            num_first += group.request.n
        following = num_tokens - max(num_first, output.num_searched)
        if before and following > 0:
            metrics.inter_token_latency.observe((arrived - before) / NS_PER_S, following)
        metrics.idle_ns[link.worker_id] += timings.idle_ns
        metrics.swap_ns["out"] += timings.swap_out_ns
        metrics.swap_ns["in"] += timings.swap_in_ns
        metrics.step_time["forward"].observe(timings.forward_ns / NS_PER_S)
        metrics.step_time["sample"].observe(timings.sample_ns / NS_PER_S)
        worked = timings.step_ns
        link.busy_ns += worked
        link.idle_ns += timings.idle_ns
        if sent_at is not None:
            metrics.step_time["wire"].observe(max(0, arrived - max(sent_at, before) - worked) / NS_PER_S)

    def _arm_expiry(self) -> None:
        due, armed = self.dispatcher.next_expiry(), self._expiry_at
        if due == armed or (due is not None and armed is not None and armed < due):
            return  # a timer that rings too early sets the next one: that costs less than setting one per ended request
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        self._expiry_at = due
        if due is not None:
            wait_ns = max(due - self.clock(), MIN_TIMER_NS)
            self._expiry_timer = asyncio.get_running_loop().call_later(wait_ns / NS_PER_S, self._expire)

    def _expire(self) -> None:
        self._expiry_timer, self._expiry_at = None, None
        try:
            self.dispatcher.expire(self.clock())
        except Exception as error:
            self.fail(error)
            return
        self._wake()
