"""The dispatcher: the one object the edges talk to. It owns the registry of requests and one scheduler per worker.

Pure: no clock, no sockets, no threads. Every time is `now`, nanoseconds of a monotonic clock. Not thread-safe.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from scheduler.sequence import FinishReason, Request, Sequence, SequenceGroup
from scheduler.step_plan import StepPlan, StepResult, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Policy settings; sizes come from the workers."""

    max_num_seqs: int = 256  # sequences that run at once per worker, bounded by the worker's rows as well
    token_budget: int = 2048  # tokens computed per step, decodes first, bounded by the worker's own limit as well
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    prefix_cache: bool = True
    max_waiting: int = 1024  # requests that have not started; more are answered LATER
    watermark: float = 0.01  # fraction of the KV pool that admission leaves free
    retention_ns: int = 60_000_000_000  # how long a finished request can be found
    max_retained: int = 4096  # finished requests kept at most
    max_plans_in_flight: int = 2


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker can hold; as in worker.proto."""

    block_size: int
    num_blocks: int
    host_blocks: int
    block_bytes: int
    max_slots: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class TransferRates:
    """What a worker measured at its start; 0: unknown. The scheduler goes on learning from step results."""

    swap_out_bytes_per_second: int = 0
    swap_in_bytes_per_second: int = 0
    prefill_tokens_per_second: int = 0


class Admission(enum.Enum):
    """The verdict of submit()."""

    OK = "ok"
    LATER = "later"  # the waiting queue is full
    NEVER = "never"  # it cannot fit, ever
    DUPLICATE = "duplicate"  # a live request has this id


@dataclass(frozen=True, slots=True)
class Submitted:
    """Answer of submit()."""

    admission: Admission
    reason: str = ""  # one clear line for LATER and NEVER
    group: SequenceGroup | None = None  # for OK


class StatusCode(enum.IntEnum):
    """The gRPC status codes that the core answers with."""

    RESOURCE_EXHAUSTED = 8
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request's first sequence has begun to run (with prompt_logprobs: its prompt has been computed)."""

    group: SequenceGroup


@dataclass(frozen=True, slots=True)
class Finished:
    """One sequence has ended; sequence.finish says how."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Failed:
    """The whole request has ended with an error; all its unfinished sequences have finish.reason ERROR."""

    group: SequenceGroup
    code: StatusCode
    reason: str  # ErrorInfo.reason, e.g. NONFINITE_LOGITS
    message: str  # one clear line
    retry_after_ns: int = 0  # 0: a retry does not help


Event = Admitted | Finished | Failed


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step result brought: accepted tokens only, dropped ones are not in it. Do not change the lists."""

    accepted: bool = True  # False: the result was stale and has been ignored
    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # parallel to sequences
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position in token_ids


@dataclass(frozen=True, slots=True)
class WorkerLoads:
    """One worker's figures; counters (_total, _ns) grow for as long as the worker's epoch lasts."""

    worker_id: str
    epoch: int
    step: int  # last plan made
    plans_in_flight: int
    running_groups: int
    running_sequences: int
    waiting_groups: int
    swapped_groups: int
    preempted_groups: int  # waiting to be recomputed
    kv_blocks_free: int  # free or only cached
    kv_blocks_used: int
    kv_blocks_cached: int  # of the free ones, those that hold a reusable prefix
    host_blocks_free: int
    host_blocks_used: int
    kv_waste_ratio: float  # allocated slots that hold no token / allocated slots
    preemptions_total: dict[str, int]  # by mode: swap, recompute
    preemption_cost_predicted_ns: dict[str, int]  # by mode
    preemption_cost_actual_ns: dict[str, int]  # by mode
    swap_out_bytes_total: int
    swap_in_bytes_total: int
    prefix_cache_query_tokens_total: int
    prefix_cache_hit_tokens_total: int
    prompt_tokens_total: int
    generation_tokens_total: int


@dataclass(frozen=True, slots=True)
class Loads:
    """Figures for metrics and ListWorkers. Costs time linear in the running sequences: read it per scrape, not per step."""

    workers: list[WorkerLoads]
    waiting: int  # groups that have not started, with those that have no worker
    unassigned: int  # groups without a worker
    running: int  # groups on a worker's batch
    swapped: int  # groups preempted by swap
    preempted: int  # groups preempted by recompute
    retained: int  # finished groups that can still be found
    stale_results_total: int


class ResultError(ValueError):
    """A step result contradicts its plan; the caller should drop the worker."""


class Dispatcher:
    """Requests in, step plans out, step results in, tokens out."""

    def __init__(self, config: SchedulerConfig) -> None: ...

    def add_worker(
        self, worker_id: str, capacity: WorkerCapacity, rates: TransferRates, epoch: int, now: int
    ) -> None:
        """Makes a worker ready. A worker of the same id is removed first. `epoch` must be larger than any before."""

    def remove_worker(self, worker_id: str, now: int) -> None:
        """Takes a lost worker's groups back: they go on elsewhere by recompute, or wait for a worker."""

    def submit(self, request: Request, now: int) -> Submitted:
        """Accepts a request, or says why not: LATER (queue full), NEVER (cannot fit), DUPLICATE (id is live)."""
        raise NotImplementedError

    def abort(self, request_id: str, reason: FinishReason, now: int) -> bool:
        """Ends a request in whatever state it is. False: no live request has that name."""

    def fail(self, request_id: str, code: StatusCode, reason: str, message: str, now: int) -> bool:
        """Ends a request with an error. False: no live request has that name."""

    def stop_sequence(self, request_id: str, index: int, num_tokens: int, matched_stop: str, now: int) -> bool:
        """Ends one sequence at a stop string, keeping num_tokens of its output. False: it is not live."""

    def expire(self, now: int) -> None:
        """Ends requests whose deadline has passed and forgets finished ones whose retention is over."""

    def next_expiry(self) -> int | None:
        """When expire() has something to do next; None: nothing."""

    def schedule(self, worker_id: str, now: int) -> StepPlan | None:
        """The next plan for a worker. None: nothing to do now, too many plans in flight, or no such worker."""

    def apply(self, worker_id: str, result: StepResult, now: int) -> StepOutput:
        """Accepts a result once. Raises ResultError when it contradicts its plan."""

    def take_events(self) -> list[Event]:
        """What happened since the last call, in order; deliver it after the tokens of the same step."""

    def find(self, request_id: str) -> SequenceGroup | None:
        """A live or recently finished request."""

    def workers(self) -> list[str]:
        """Ids of the ready workers."""

    def loads(self) -> Loads: ...

    def check_integrity(self) -> None:
        """Raises AssertionError when books do not balance."""
