"""A worker that is a cost model: it keeps its persistent batch by the plans it gets, as a real one does, and holds no
memory. A steady decode step costs it a constant.

The simulated model ends every sequence of a request after `payload` output tokens (an int) with the token STOP, which
the scheduler cannot foresee. All other tokens are TOKEN. With another payload, sequences end by length.

A beam offers the tokens TOKEN, TOKEN + 1, ... with the log-probabilities of `Likelihoods`; where its request is to
stop, all its beams offer STOP before anything else, which ends the search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.simulator.likelihoods import Likelihoods, extend
from benchmarks.simulator.profiles import StepLoad, WorkerProfile
from scheduler.sequence import Request
from scheduler.step_plan import NewSequence, StepPlan, StepResult, StepTimings, TokenLogprobs

STOP = 2
TOKEN = 5
NEVER = -1
"""Instead of a step in which STOP is sampled: nothing is sampled from a beam."""
HOPELESS = -1e9
"""A log-probability that no search chooses while there is another."""


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
    candidates: int = 0  # tokens that a beam offers; 0: it is no beam
    history: int = 0  # of a beam: what it has said

    def followed_by(self, token: int) -> Row:
        """A beam that has been computed, with a token chosen by the search."""
        return replace(self, known=self.known + 1, outputs=self.outputs + 1, history=extend(self.history, token))


def wanted_tokens(request: Request) -> int:
    """Output tokens after which the simulated model stops; beyond max_tokens if it does not."""
    return request.payload if isinstance(request.payload, int) else request.max_tokens + 1


class VirtualWorker:
    """Executes the plans of one epoch, in order."""

    def __init__(self, profile: WorkerProfile, epoch: int, likelihoods: Likelihoods | None = None) -> None:
        self.profile = profile
        self.likelihoods = likelihoods or Likelihoods()
        self.epoch = epoch
        self.last_step = 0
        self._rows: dict[int, Row] = {}
        self._decode_set: list[int] = []  # slots, in the order of the result's rows
        self._beams: list[int] = []  # the last slots of the decode set: those of beams, which are in it for one step
        self._sum_of_bases = 0  # over the decode set
        self._stops: dict[int, list[int]] = {}  # step -> slots whose sequence samples STOP then; some have left since

    def execute(self, plan: StepPlan) -> tuple[StepResult, int, StepLoad]:
        """The result of a plan, how many nanoseconds it took, and what it had to do."""
        if plan.epoch != self.epoch or plan.step != self.last_step + 1:
            raise AssertionError(f"plan {plan.epoch}/{plan.step} after {self.epoch}/{self.last_step}")
        step = self.last_step = plan.step
        self._release(plan.release_slots)
        if self._beams:
            self._stop_decoding_beams()
        for new in plan.new_sequences:
            self._rows[new.slot] = self._new_row(new)
        if plan.beam_slots:
            self._continue_beams(plan)
        if plan.decode_remove:
            self._sit_out(plan.decode_remove, step)
        for slot in plan.decode_add:
            self._start_decoding(slot, step)
        sampled, offers, load = self._compute(plan)
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
        result = StepResult(plan.epoch, step, sampled, list(offers), list(offers.values()), timings=timings)
        return result, swap_out + swap_in + forward, load

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
            self._beams = [slot for slot in self._beams if slot in self._rows]

    def _new_row(self, new: NewSequence) -> Row:
        request, known = new.request, len(new.token_ids)
        row = Row(request, wanted_tokens(request), new.computed_tokens, known, known - new.prompt_tokens)
        if request.is_beam_search:
            assert new.logprobs is not None
            row.candidates = new.logprobs
            row.history = self.likelihoods.history(request.request_id, new.token_ids[new.prompt_tokens :])
        return row

    def _sit_out(self, slots: list[int], step: int) -> None:
        """Rows leave the decode set with what they have; beams have left already."""
        for slot in slots:
            row = self._rows[slot]
            if not row.stop_step:
                continue
            self._sum_of_bases -= row.base
            row.computed = step - row.base
            row.outputs = row.wanted - 1 - (row.stop_step - step)
            row.stop_step = 0
        gone = set(slots)
        self._decode_set = [slot for slot in self._decode_set if slot not in gone]

    def _start_decoding(self, slot: int, step: int) -> None:
        row = self._rows[slot]
        row.base = step - row.computed
        self._sum_of_bases += row.base
        self._decode_set.append(slot)
        if row.candidates:
            row.stop_step = NEVER
            self._beams.append(slot)
        else:
            row.stop_step = step + max(0, row.wanted - row.outputs - 1)
            self._stops.setdefault(row.stop_step, []).append(slot)

    def _stop_decoding_beams(self) -> None:
        for slot in self._beams:
            row = self._rows[slot]
            self._sum_of_bases -= row.base
            row.computed += 1
            row.stop_step = 0
        del self._decode_set[-len(self._beams) :]
        self._beams = []

    def _continue_beams(self, plan: StepPlan) -> None:
        """Rows become copies of their parents, as those were before, with one more token."""
        moves = zip(plan.beam_slots, plan.beam_parents, plan.beam_tokens, strict=True)
        self._rows.update([(slot, self._rows[parent].followed_by(token)) for slot, parent, token in moves])

    def _offer(self, row: Row) -> TokenLogprobs:
        count = row.candidates
        if row.outputs + 1 < row.wanted:
            return self.likelihoods.offer(row.history, range(TOKEN, TOKEN + count))
        others = range(TOKEN, TOKEN + count - 1)
        return TokenLogprobs(0.0, 1, [STOP, *others], [0.0] + [HOPELESS] * len(others))

    def _compute(self, plan: StepPlan) -> tuple[list[int], dict[int, TokenLogprobs], StepLoad]:
        """Tokens by row of the result, what those rows that are beams offer, and what there was to do."""
        step, decode_set = plan.step, self._decode_set
        tokens = [TOKEN] * len(decode_set)
        for slot in self._stops.pop(step, ()):
            row = self._rows.get(slot)
            if row is not None and row.stop_step == step:
                tokens[decode_set.index(slot)] = STOP
        first_beam = len(decode_set) - len(self._beams)
        offers = {at: self._offer(self._rows[slot]) for at, slot in enumerate(self._beams, first_beam)}
        chunk_context = chunk_pairs = 0
        for slot, count in zip(plan.chunk_slots, plan.chunk_tokens, strict=True):
            row = self._rows[slot]
            start = row.computed
            row.computed = start + count
            chunk_context += row.computed
            chunk_pairs += count * start + count * (count + 1) // 2
            if row.computed == row.known and row.candidates:
                offers[len(tokens)] = self._offer(row)
                tokens.append(TOKEN)
            elif row.computed == row.known:
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
        return tokens, offers, load
