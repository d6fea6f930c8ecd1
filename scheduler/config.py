"""What an operator can set on the scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from pagewire.runtime.settings import RoleSettings


class SchedulerSettings(RoleSettings):
    """Runs the scheduler: owns every request, every block table and the queues; workers and gateways dial in."""

    role: ClassVar[str] = "scheduler"

    listen: str = "127.0.0.1:50052"
    """Addresses for workers and gateways, separated by commas: HOST:PORT (port 0 picks a free one) or unix:PATH.
    Loopback by default because the link carries no authentication yet."""
    insecure: bool = False
    """Allow addresses that other machines can reach, without TLS. For private networks only."""
    metrics_port: int | None = Field(default=None, le=65535)
    """Port of the Prometheus page, on metrics_host. 0 picks a free one; unset or negative: no page."""
    metrics_host: str = "127.0.0.1"
    """Host name or address that the Prometheus page listens on. Loopback because it needs no password."""

    max_num_seqs: int = Field(default=256, ge=1, le=65536)
    """Sequences that run at once on one worker; a worker with fewer rows lowers it. 256 keeps an 8B model on one large
    GPU near its best throughput."""
    token_budget: int = Field(default=2048, ge=1, le=1 << 20)
    """Tokens that one step computes at most, decodes and prefill chunks together. Larger: faster prefill, longer pauses
    of the streams that decode beside it."""
    target_itl_ms: float = Field(default=0.0, ge=0.0, le=60_000.0)
    """Milliseconds between two tokens of a stream that prefill should not exceed: a step beside decoding streams
    takes as many prompt tokens as fit, by step times learned live, and at least 64. 0: only token_budget limits it."""
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    """How a sequence group leaves GPU memory when that is full: by the cheaper of two measured costs, or always one."""
    prefix_cache: bool = True
    """Keep the KV blocks of finished prompts for later prompts that begin alike, per tenant."""
    host_prefix_cache: bool = True
    """Keep full blocks that the block pool gives up in the workers' host arenas, and copy them back when that is
    cheaper than computing them."""
    max_worker_losses: int = Field(default=3, ge=1)
    """Workers lost in a row while they ran a request, without progress, after which it fails. 3: two may be chance."""
    max_waiting: int = Field(default=1024, ge=1, le=1 << 20)
    """Requests that may wait before new ones are refused with RESOURCE_EXHAUSTED."""
    watermark: float = Field(default=0.01, ge=0.0, lt=1.0)
    """Share of the block pool that admission leaves free, so that running sequences can grow without preemptions."""
    headroom: float = Field(default=0.3, ge=0.0, le=10.0)
    """The same for new requests, by what runs: headroom * b * sqrt(n) blocks for n sequences that hold b each, but no
    more than g * sqrt(n), if g of those hold output."""

    retention_s: float = Field(default=60.0, ge=0.0, le=86400.0)
    """Seconds for which a finished request can still be attached to."""
    max_retained: int = Field(default=4096, ge=0, le=1 << 20)
    """Finished requests kept for attaching, whatever their age; the oldest are forgotten first."""
    park_ceiling_s: float = Field(default=600.0, ge=1.0, le=86400.0)
    """Seconds for which a request may stay parked, or held after its end. Then it is cancelled, or no longer held."""
    max_parked: int = Field(default=1024, ge=0, le=1 << 20)
    """Parked and held requests at once, over all tenants."""
    max_parked_per_tenant: int = Field(default=64, ge=0, le=1 << 20)
    """Parked and held requests at once of one tenant."""
    park_arena_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of a worker's host arena that their KV may take; what finds no room is computed again. Half, so that
    preemptions can still swap."""
    orphan_s: float = Field(default=30.0, ge=0.0, le=86400.0)
    """Seconds for which a request goes on after its gateway's session broke, waiting for an attach. Detached requests
    go on without one."""

    heartbeat_timeout_s: float = Field(default=2.5, gt=0.0, le=3600.0)
    """Seconds without any message after which a worker is declared lost. Found within 3 s; gRPC's own keepalive alone
    takes longer."""
    step_timeout_s: float = Field(default=120.0, gt=0.0, le=86400.0)
    """Seconds without progress in its heartbeats after which a worker that owes a result is declared lost."""
    stall_s: float = Field(default=10.0, gt=0.0, le=86400.0)
    """Seconds without progress after which a worker that owes a result no longer counts as ready in health and model
    state. It is still waited for until step_timeout_s."""
    no_worker_s: float = Field(default=300.0, ge=0.0, le=86400.0)
    """Seconds for which requests wait for a worker after the last one was lost; then they fail with UNAVAILABLE. Long
    enough to load a large model again."""

    max_workers: int = Field(default=256, ge=1, le=4096)
    """Worker streams at once; more are refused."""
    max_sessions: int = Field(default=256, ge=1, le=4096)
    """Gateway sessions at once; more are refused."""
    record: Path | None = None
    """File to record the whole run in: prompts, step plans and step results, for `pagewire replay`. An existing file is
    kept, and another name taken. Unset, because it holds what users write."""

    record_dir: Path | None = None
    """Folder for recordings that operators start with ControlService.RecordPlans. Unset: they cannot, because a
    recording holds what users write."""

    session_backlog_tokens: int = Field(default=4_000_000, ge=1024)
    """Tokens (and attached snapshots' tokens) that may wait for one gateway's credit before its session is ended. Its
    requests go on and can be attached to."""

    watch_interval_ms: float = Field(default=100.0, ge=10.0, le=60_000.0)
    """Milliseconds between two messages of WatchBlocks, at least: ten pictures per second look alive. More when taking
    them is slow, so that watching takes no more than 2 % of the scheduler's time."""
    max_watchers: int = Field(default=16, ge=0, le=1024)
    """WatchBlocks streams at once; more are refused. 0: nobody may watch."""

    @field_validator("listen")
    @classmethod
    def _at_least_one_address(cls, value: str) -> str:
        if not [part for part in value.split(",") if part.strip()]:
            raise ValueError("at least one address is needed, such as 127.0.0.1:50052")
        return value

    @field_validator("record_dir")
    @classmethod
    def _an_existing_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("an existing folder is needed")
        return value

    @field_validator("record")
    @classmethod
    def _a_file_in_a_folder(cls, value: Path | None) -> Path | None:
        if value is not None and (value.is_dir() or not value.parent.is_dir()):
            raise ValueError("a file in an existing folder is needed")
        return value

    @property
    def addresses(self) -> list[str]:
        """`listen`, split."""
        return [part.strip() for part in self.listen.split(",") if part.strip()]
