"""A worker that is a cost model: it keeps its persistent batch by the plans it gets, as a real one does, and holds no
memory. A steady decode step costs it a constant.

The simulated model ends every sequence of a request after `payload` output tokens (an int) with the token STOP, which
the scheduler cannot foresee. All other tokens are TOKEN. With another payload, sequences end by length.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulator.profiles import StepLoad, WorkerProfile
from scheduler.sequence import Request
from scheduler.step_plan import StepPlan, StepResult, StepTimings

STOP = 2
TOKEN = 5


@dataclass(slots=True)
class Row:
    """One row of the persistent batch."""

    request: Request
    wanted: int  # output tokens, the last of which is STOP
    computed: int  # tokens with KV, while not decoding
    known: int  # tokens known before the next sample, while not decoding
    outputs: int  # output tokens sampled, while not decoding
    base: int = 0  # while decoding: step s writes the KV of position s - base
    stop_step: int = 0  # while decoding: the step that samples STOP; 0: not decoding


def wanted_tokens(request: Request) -> int:
    """Output tokens after which the simulated model stops; beyond max_tokens if it does not."""
    return request.payload if isinstance(request.payload, int) else request.max_tokens + 1


class VirtualWorker:
    """Executes the plans of one epoch, in order."""

    def __init__(self, profile: WorkerProfile, epoch: int) -> None:
        self.profile = profile
        self.epoch = epoch
        self.last_step = 0
        self._rows: dict[int, Row] = {}
        self._decode_set: list[int] = []  # slots, in the order of the result's rows
        self._sum_of_bases = 0  # over the decode set
        self._stops: dict[int, list[int]] = {}  # step -> slots whose sequence samples STOP then; some have left since

    def execute(self, plan: StepPlan) -> tuple[StepResult, int, StepLoad]:
        """The result of a plan, how many nanoseconds it took, and what it had to do."""
        if plan.epoch != self.epoch or plan.step != self.last_step + 1:
            raise AssertionError(f"plan {plan.epoch}/{plan.step} after {self.epoch}/{self.last_step}")
        step = self.last_step = plan.step
        self._release(plan.release_slots)
        for new in plan.new_sequences:
            outputs = len(new.token_ids) - new.prompt_tokens
            self._rows[new.slot] = Row(
                new.request, wanted_tokens(new.request), new.computed_tokens, len(new.token_ids), outputs
            )
        for slot in plan.decode_add:
            self._start_decoding(slot, step)
        sampled, load = self._compute(plan)
        swap_out = self.profile.swap_ns(load.swapped_out_blocks) if load.swapped_out_blocks else 0
        swap_in = self.profile.swap_ns(load.swapped_in_blocks) if load.swapped_in_blocks else 0
        forward = self.profile.forward_ns(load)
        timings = StepTimings(
            swap_out_ns=swap_out,
            swap_in_ns=swap_in,
            forward_ns=forward,
            chunk_tokens=load.chunk_tokens,
            decode_tokens=load.decode_tokens,
        )
        return StepResult(plan.epoch, step, sampled, timings=timings), swap_out + swap_in + forward, load

    def _release(self, slots: list[int]) -> None:
        if not slots:
            return
        decoding = False
        for slot in slots:
            row = self._rows.pop(slot)
            if row.stop_step:
                decoding = True
                self._sum_of_bases -= row.base
        if decoding:
            self._decode_set = [slot for slot in self._decode_set if slot in self._rows]

    def _start_decoding(self, slot: int, step: int) -> None:
        row = self._rows[slot]
        row.base = step - row.computed
        row.stop_step = step + max(0, row.wanted - row.outputs - 1)
        self._sum_of_bases += row.base
        self._decode_set.append(slot)
        self._stops.setdefault(row.stop_step, []).append(slot)

    def _compute(self, plan: StepPlan) -> tuple[list[int], StepLoad]:
        step, decode_set = plan.step, self._decode_set
        tokens = [TOKEN] * len(decode_set)
        for slot in self._stops.pop(step, ()):
            row = self._rows.get(slot)
            if row is not None and row.stop_step == step:
                tokens[decode_set.index(slot)] = STOP
        chunk_context = chunk_pairs = 0
        for slot, count in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            row = self._rows[slot]
            start = row.computed
            row.computed = start + count
            chunk_context += row.computed
            chunk_pairs += count * start + count * (count + 1) // 2
            if row.computed == row.known:
                row.outputs += 1
                tokens.append(STOP if row.outputs == row.wanted else TOKEN)
        for fork in plan.forks:
            parent = self._rows[fork.parent_slot]
            self._rows[fork.slot] = Row(parent.request, parent.wanted, parent.computed, parent.known, parent.outputs)
            tokens.append(STOP if parent.outputs == parent.wanted else TOKEN)
        load = StepLoad(
            decode_tokens=len(decode_set),
            decode_context=len(decode_set) * (step + 1) - self._sum_of_bases,
            num_chunks=len(plan.chunk_slots),
            chunk_tokens=sum(plan.chunk_tokens),
            chunk_context=chunk_context,
            chunk_pairs=chunk_pairs,
            copied_blocks=len(plan.copies),
            swapped_out_blocks=len(plan.swap_out),
            swapped_in_blocks=len(plan.swap_in),
        )
        return tokens, load
