"""What the scheduler is told: policy settings, a worker's sizes and a worker's measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PreemptionMode = Literal["auto", "swap", "recompute"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Policy settings; sizes come from the workers."""

    max_num_seqs: int = 256  # sequences that run at once per worker, bounded by the worker's rows as well
    token_budget: int = 2048  # tokens computed per step, decodes first, bounded by the worker's own limit as well
    target_itl_ns: int = 0  # time of a step within which prefill stays when others decode; 0: no limit
    preemption_mode: PreemptionMode = "auto"
    max_preemptions: int = 16  # so often a group may be preempted; then it runs to its end
    prefix_cache: bool = True
    host_prefix_cache: bool = True  # full blocks that the pool gives up go to the host arena, and come back from there
    max_waiting: int = 1024  # requests that have not started; more are answered LATER
    watermark: float = 0.01  # fraction of the KV pool that admission leaves free
    headroom: float = 0.3  # new requests leave headroom * b * sqrt(n) blocks free for n sequences of b, see config.py
    retention_ns: int = 60_000_000_000  # how long a finished request can be found
    max_retained: int = 4096  # finished requests kept at most
    park_ceiling_ns: int = 600_000_000_000  # how long a request may stay parked or held
    max_parked: int = 1024  # parked and held requests, over all tenants
    max_parked_per_tenant: int = 64
    park_arena_share: float = 0.5  # of a host arena, for their KV; what finds no room is computed again
    max_plans_in_flight: int = 2
    max_worker_losses: int = 3  # after so many worker losses without progress, a request that ran each time fails


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker can hold; as in worker.proto."""

    block_size: int  # tokens per KV block
    num_blocks: int  # KV pool
    host_blocks: int  # host arena; 0: no swapping
    block_bytes: int  # one block over all layers
    max_slots: int  # rows of the persistent batch
    max_step_tokens: int  # tokens that one step may compute


@dataclass(frozen=True, slots=True)
class TransferRates:
    """What a worker measured at its start; 0: unknown. The scheduler goes on learning from step results."""

    swap_out_bytes_per_second: int = 0
    swap_in_bytes_per_second: int = 0
    prefill_tokens_per_second: int = 0
    chunk_steps: tuple[ChunkStep, ...] = ()  # sizes that steps with chunks are padded to


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """A size of steps with chunks, and its time without what contexts and sampling add."""

    rows: int
    ns: int
