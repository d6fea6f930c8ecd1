"""Figures for metrics, ListWorkers and load balancing, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class WorkerLoads(NamedTuple):
    """One worker's figures. Counters (`_total`, `_ns`) grow for as long as the worker's epoch lasts. A named tuple,
    made four times as fast as a frozen dataclass: a pool of a thousand workers makes a thousand at a time."""

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
    host_blocks_free: int  # free or only cached
    host_blocks_cached: int  # of the free ones, those that hold a reusable prefix
    host_blocks_used: int
    kv_waste_ratio: float  # allocated slots that hold no token / allocated slots
    plan_lead_ns: dict[str, int]  # of late plans, behind a step of "decodes" or with "chunks"
    gathering_wait_ns: int  # for a result before beams are planned
    preemptions_total: dict[str, int]  # by mode: swap, recompute
    preemption_cost_predicted_ns: dict[str, int]  # by mode
    preemption_cost_actual_ns: dict[str, int]  # by mode
    swap_out_bytes_total: int
    swap_in_bytes_total: int
    prefix_cache_query_tokens_total: int
    prefix_cache_hit_tokens_total: int  # found in the KV pool
    prefix_cache_host_hit_tokens_total: int  # copied in from the host arena
    prompt_tokens_total: int
    generation_tokens_total: int


@dataclass(frozen=True, slots=True)
class Loads:
    """Figures over all workers."""

    workers: list[WorkerLoads]
    waiting: int  # groups that have not started, with those that have no worker
    unassigned: int  # groups without a worker
    running: int  # groups with rows on a worker
    swapped: int  # groups preempted by swap
    preempted: int  # groups preempted by recompute
    retained: int  # finished groups that can still be found
    parked: int  # groups that wait to be continued, held ones included
    stale_results_total: int
