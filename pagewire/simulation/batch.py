"""What the steps of a run have to do: a worker's rows, followed by its plans, without memory and without a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.sequence import Request
from scheduler.step_plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step does, as far as its time depends on it."""

    decode_sequences: int = 0
    """Sequences that compute one token each."""
    prefill_tokens: int = 0
    """Tokens computed by chunks."""
    context_tokens: int = 0
    """Pairs of a computed token and a token that it attends to."""
    copied_blocks: int = 0
    """Blocks copied within the KV pool."""
    swapped_blocks: int = 0
    """Blocks copied between KV pool and host arena, both ways."""


@dataclass(slots=True)
class Row:
    """One row of the persistent batch."""

    request: Request
    index: int
    """Of the sequence in its request."""
    known: int
    """Tokens, prompt and output; the next one sampled comes to this position."""
    computed: int
    """Of them, those with KV."""
    beam: tuple[int, ...] = ()
    """Output tokens of a beam."""


class Batch:
    """The rows of one epoch. Plans must come in order, each once."""

    def __init__(self) -> None:
        self._rows: dict[int, Row] = {}
        self._decode_set: list[int] = []

    def execute(self, plan: StepPlan) -> tuple[list[Row], StepWork]:
        """Copies of the rows that sample in this step, in the order of its result, and what the step does."""
        self._change_rows(plan)
        gone = {*plan.release_slots, *plan.decode_remove}
        if gone:
            self._decode_set = [slot for slot in self._decode_set if slot not in gone]
        self._decode_set.extend(plan.decode_add)
        sampling = [self._rows[slot] for slot in self._decode_set]
        context = 0
        for row in sampling:
            row.computed += 1
            context += row.computed
        for slot, count in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            row = self._rows[slot]
            context += count * row.computed + count * (count + 1) // 2
            row.computed += count
            if row.computed == row.known:
                sampling.append(row)
        for fork in plan.forks:
            row = self._rows[fork.slot] = replace(self._rows[fork.parent_slot], index=fork.index)
            sampling.append(row)
        work = StepWork(
            decode_sequences=len(self._decode_set),
            prefill_tokens=sum(plan.chunk_tokens),
            context_tokens=context,
            copied_blocks=len(plan.copies),
            swapped_blocks=len(plan.swap_out) + len(plan.swap_in),
        )
        sampled = [replace(row) for row in sampling]
        for row in sampling:
            row.known += 1
        return sampled, work

    def _change_rows(self, plan: StepPlan) -> None:
        for slot in plan.release_slots:
            del self._rows[slot]
        for new in plan.new_sequences:
            output = tuple(new.token_ids[new.prompt_tokens :]) if new.request.is_beam_search else ()
            self._rows[new.slot] = Row(new.request, new.index, len(new.token_ids), new.computed_tokens, output)
        moved = zip(plan.beam_slots, plan.beam_parents, plan.beam_tokens, strict=True)
        beams = {slot: self._continued(self._rows[parent], token) for slot, parent, token in moved}
        self._rows.update(beams)

    @staticmethod
    def _continued(parent: Row, token: int) -> Row:
        return replace(parent, beam=(*parent.beam, token))
