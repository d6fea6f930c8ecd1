"""What a running service is doing, as values: two answers of ControlService become one frame with rates in it."""

from __future__ import annotations

from dataclasses import dataclass

from pagewire.v1 import control_pb2

NS_PER_S = 1e9
_STATE_PREFIX = "REQUEST_STATE_"


@dataclass(frozen=True)
class Answers:
    """What the control service said at one moment."""

    server: control_pb2.GetServerInfoResponse
    loads: control_pb2.GetLoadsResponse
    workers: control_pb2.ListWorkersResponse


@dataclass(frozen=True, slots=True)
class Server:
    """The scheduler and what it serves."""

    version: str
    model: str
    """Empty until a worker has joined."""
    dtype: str
    max_model_len: int
    uptime_s: float
    draining: bool


@dataclass(frozen=True, slots=True)
class Blocks:
    """A pool of blocks. used + cached + free == total."""

    total: int
    used: int
    cached: int
    """Hold a prefix that nobody uses just now."""
    free: int


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker. Rates are over the time between two answers; None: not known yet, or no step has ended in it."""

    worker_id: str
    device: str
    epoch: int
    stalled: bool
    heard_s: float
    """Since its last message."""
    running: int
    """Sequences."""
    waiting: int
    """Requests."""
    swapped: int
    """Requests whose KV is in the host arena."""
    kv_blocks: Blocks
    host_blocks: Blocks
    kv_waste_ratio: float
    cache_hit_ratio: float | None
    """Prompt tokens found in the prefix cache over those looked up, in this epoch."""
    preemptions_swap: int
    preemptions_recompute: int
    steps: int
    steps_per_s: float | None
    step_ms: float | None
    """Mean time of a step on the worker."""
    idle_ratio: float | None
    """Share of the time for which the device waited for plans."""
    generation_tokens_per_s: float | None
    prompt_tokens_per_s: float | None
    swap_out_bytes_per_s: float | None
    swap_in_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class Request:
    """One live request."""

    request_id: str
    worker_id: str
    state: str
    """waiting, prefilling, running, swapped or preempted."""
    priority: int
    tenant: str
    sequences: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    max_tokens: int
    blocks: int
    preemptions: int
    age_s: float
    queue_s: float | None
    first_token_s: float | None
    tokens_per_s: float | None
    """Over the time between two answers; None: the earlier one did not have it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything that one picture shows."""

    server: Server
    live_requests: int
    unassigned_requests: int
    workers: tuple[Worker, ...]
    requests: tuple[Request, ...]


def frame(now: Answers, before: Answers | None) -> Frame:
    """The frame at `now`, with rates since `before`."""
    if before is not None and before.server.uptime_ns > now.server.uptime_ns:
        before = None  # another scheduler: its clock and its counters have nothing to do with the new one's
    seconds = 0.0 if before is None else (now.loads.now_ns - before.loads.now_ns) / NS_PER_S
    if before is None or seconds <= 0:
        before, seconds = None, 0.0
    earlier_loads = {} if before is None else {(load.worker_id, load.epoch): load for load in before.loads.loads}
    earlier_tokens = {} if before is None else {one.request_id: one.output_tokens for one in before.loads.requests}
    infos = {info.hello.worker_id: info for info in now.workers.workers}
    return Frame(
        server=Server(
            version=now.server.version,
            model=now.server.model.name,
            dtype=now.server.model.dtype,
            max_model_len=now.server.model.max_model_len,
            uptime_s=now.server.uptime_ns / NS_PER_S,
            draining=now.loads.draining,
        ),
        live_requests=now.loads.live_requests,
        unassigned_requests=now.loads.unassigned_requests,
        workers=tuple(
            _worker(load, infos.get(load.worker_id), earlier_loads.get((load.worker_id, load.epoch)), seconds)
            for load in now.loads.loads
        ),
        requests=tuple(_request(one, earlier_tokens.get(one.request_id), seconds) for one in now.loads.requests),
    )


def total(pools: list[Blocks]) -> Blocks:
    """Several pools taken together."""
    return Blocks(
        total=sum(pool.total for pool in pools),
        used=sum(pool.used for pool in pools),
        cached=sum(pool.cached for pool in pools),
        free=sum(pool.free for pool in pools),
    )


def known_sum(rates: list[float | None]) -> float | None:
    """Sum of the known ones; None: none is known."""
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def _worker(
    load: control_pb2.WorkerLoad,
    info: control_pb2.WorkerInfo | None,
    before: control_pb2.WorkerLoad | None,
    seconds: float,
) -> Worker:
    steps = 0 if before is None else load.steps - before.steps

    def rate(name: str) -> float | None:
        return None if before is None else (getattr(load, name) - getattr(before, name)) / seconds

    queries, hits = load.prefix_cache_queries, load.prefix_cache_hits + load.prefix_cache_host_hits
    idle = rate("idle_ns")
    return Worker(
        worker_id=load.worker_id,
        device="" if info is None else info.hello.device,
        epoch=load.epoch,
        stalled=info is not None and info.stalled,
        heard_s=0.0 if info is None else info.since_heartbeat_ns / NS_PER_S,
        running=load.running,
        waiting=load.waiting,
        swapped=load.swapped,
        kv_blocks=_blocks(load.total_blocks, load.free_blocks, load.cached_blocks),
        host_blocks=_blocks(load.total_host_blocks, load.free_host_blocks, load.cached_host_blocks),
        kv_waste_ratio=load.kv_waste_ratio,
        cache_hit_ratio=hits / queries if queries else None,
        preemptions_swap=load.preemptions_swap,
        preemptions_recompute=load.preemptions_recompute,
        steps=load.steps,
        steps_per_s=rate("steps"),
        step_ms=None if before is None or not steps else (load.busy_ns - before.busy_ns) / steps / 1e6,
        # The wait before a step is told with its result, so one that began long ago may be longer than the interval.
        idle_ratio=None if idle is None or not steps else min(1.0, idle / NS_PER_S),
        generation_tokens_per_s=rate("generation_tokens"),
        prompt_tokens_per_s=rate("prompt_tokens"),
        swap_out_bytes_per_s=rate("swap_out_bytes"),
        swap_in_bytes_per_s=rate("swap_in_bytes"),
    )


def _blocks(total_blocks: int, free_or_cached: int, cached: int) -> Blocks:
    return Blocks(total_blocks, total_blocks - free_or_cached, cached, free_or_cached - cached)


def _request(load: control_pb2.RequestLoad, tokens_before: int | None, seconds: float) -> Request:
    return Request(
        request_id=load.request_id,
        worker_id=load.worker_id,
        state=control_pb2.RequestState.Name(load.state).removeprefix(_STATE_PREFIX).lower(),
        priority=load.priority,
        tenant=load.tenant,
        sequences=load.sequences,
        prompt_tokens=load.prompt_tokens,
        cached_tokens=load.cached_tokens,
        output_tokens=load.output_tokens,
        max_tokens=load.max_tokens,
        blocks=load.blocks,
        preemptions=load.preemptions,
        age_s=load.age_ns / NS_PER_S,
        queue_s=load.queue_ns / NS_PER_S if load.HasField("queue_ns") else None,
        first_token_s=load.first_token_ns / NS_PER_S if load.HasField("first_token_ns") else None,
        tokens_per_s=None if tokens_before is None else (load.output_tokens - tokens_before) / seconds,
    )
