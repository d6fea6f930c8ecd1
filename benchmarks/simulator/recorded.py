"""A worker profile from a recording: the recorded worker's sizes, and the step costs fitted to its steps.

It needs to know nothing of the machine or of the model's shape; what it says of steps unlike the recorded ones is a
straight line.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.simulator.profiles import ModelShape, WorkerProfile
from pagewire.recording import Recording, RecordingError
from pagewire.simulation.batch import StepLoad
from pagewire.simulation.costs import StepCosts, fit, steps_of
from pagewire.v1 import worker_pb2
from scheduler.codec import capacity_of
from scheduler.policy import TransferRates, WorkerCapacity

UNKNOWN_SWAP_NS = 1e6
"""Per block, where no step has swapped and the worker has not measured it: dear, so that it is not chosen lightly."""


@dataclass(frozen=True, slots=True)
class RecordedProfile(WorkerProfile):
    """A machine as a recording shows it."""

    costs: StepCosts = field(default_factory=StepCosts)
    hello: worker_pb2.WorkerHello = field(default_factory=worker_pb2.WorkerHello)

    @property
    def capacity(self) -> WorkerCapacity:
        return capacity_of(self.hello)

    @property
    def rates(self) -> TransferRates:
        swap = round(self.hello.capacity.block_bytes * 1e9 / self.swap_ns(1))
        return TransferRates(swap, swap, self.hello.prefill_tokens_per_second)

    def forward_ns(self, load: StepLoad) -> int:
        if self.rows(load) == 0:
            return 0
        return round(self.costs.step_ns(replace(load, swapped_out_blocks=0, swapped_in_blocks=0)))

    def swap_ns(self, num_blocks: int) -> int:
        return round(num_blocks * self.costs.swap_ns)


def profile_of(recording: Recording) -> RecordedProfile:
    """The first worker's profile. Raises RecordingError for a recording that no costs can be fitted to."""
    hello = next(event.worker_joined.hello for event in recording.events() if event.HasField("worker_joined"))
    try:
        found = fit(steps_of(recording)[0])
    except ValueError as error:
        raise RecordingError(f"{recording.path}: {error}") from None
    said, costs = hello.capacity, found.costs.with_measured_swap(hello)
    if not costs.swap_ns:
        costs = replace(costs, swap_ns=UNKNOWN_SWAP_NS)
    # The shape serves for the bytes of a token alone: one layer, one head, one byte per element.
    shape = ModelShape(
        name=hello.model.name,
        weight_bytes=0,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=max(1, said.block_bytes // said.block_size // 2),
        max_model_len=hello.model.max_model_len,
        kv_dtype_bytes=1,
    )
    return RecordedProfile(
        name=f"recorded-{hello.model.name}",
        model=shape,
        kv_bytes=said.num_blocks * said.block_bytes,
        host_bytes=said.host_blocks * said.block_bytes,
        memory_rate=1.0,
        compute_rate=1.0,
        link_rate=1.0,
        step_overhead_ns=round(costs.fixed_ns),
        copy_overhead_ns=round(costs.swap_ns),
        link_delay_ns=round(found.link_ns / 2),
        block_size=said.block_size,
        max_num_seqs=said.max_slots,
        token_budget=said.max_step_tokens,
        costs=costs,
        hello=hello,
    )
