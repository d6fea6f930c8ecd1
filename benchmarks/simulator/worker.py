"""A worker that is a cost model: it follows its persistent batch by the plans it gets, as a real one does, and holds no
memory. A steady decode step costs it a constant.

The simulated model ends every sequence of a request after `payload` output tokens (an int) with the token STOP, which
the scheduler cannot foresee. All other tokens are TOKEN. With another payload, sequences end by length.

A beam offers the tokens TOKEN, TOKEN + 1, ... with the log-probabilities of `Likelihoods`; where its request is to
stop, all its beams offer STOP before anything else, which ends the search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from benchmarks.simulator.likelihoods import Likelihoods, extend
from benchmarks.simulator.profiles import WorkerProfile
from pagewire.simulation.batch import Batch, Row, StepLoad
from scheduler.sequence import Request
from scheduler.step_plan import NewSequence, StepPlan, StepResult, StepTimings, TokenLogprobs

STOP = 2
TOKEN = 5
HOPELESS = -1e9
"""A log-probability that no search chooses while there is another."""


@dataclass(slots=True)
class ModelRow(Row):
    """A row with what the simulated model says in it."""

    stop_at: int  # position of STOP
    prompt_tokens: int
    candidates: int = 0  # tokens that a beam offers; 0: it is no beam
    history: int = 0  # of a beam: what it has said
    stop_step: int = 0  # the step in which it samples STOP, if it decodes until then

    def followed_by(self, token: int) -> Self:
        return replace(self, history=extend(self.history, token))


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
        self._batch = Batch(self._row_of)
        self._stops: dict[int, list[int]] = {}  # step -> slots whose sequence samples STOP then; some have left since

    def execute(self, plan: StepPlan) -> tuple[StepResult, int, StepLoad]:
        """The result of a plan, how many nanoseconds it took, and what it had to do."""
        if plan.epoch != self.epoch or plan.step != self.last_step + 1:
            raise AssertionError(f"plan {plan.epoch}/{plan.step} after {self.epoch}/{self.last_step}")
        self.last_step = plan.step
        load = self._batch.execute(plan)
        sampled, offers = self._sample(plan)
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
        result = StepResult(plan.epoch, plan.step, sampled, list(offers), list(offers.values()), timings=timings)
        return result, swap_out + swap_in + forward, load

    def _row_of(self, new: NewSequence) -> ModelRow:
        request = new.request
        stop_at = new.prompt_tokens + wanted_tokens(request) - 1
        row = ModelRow(len(new.token_ids), new.computed_tokens, stop_at, new.prompt_tokens)
        if request.is_beam_search:
            assert new.logprobs is not None
            row.candidates = new.logprobs
            row.history = self.likelihoods.history(request.request_id, new.token_ids[new.prompt_tokens :])
        return row

    def _sample(self, plan: StepPlan) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Tokens by row of the result, and what those rows that are beams offer."""
        step, decode_set = plan.step, self._batch.decode_set
        tokens = [TOKEN] * len(decode_set)
        offers = {}
        for place, slot in enumerate(plan.decode_add, len(decode_set) - len(plan.decode_add)):
            row = decode_set[slot]
            if row.candidates:  # beams are in the decode set for one step
                offers[place] = self._offer(row)
            else:
                row.stop_step = step + max(0, row.stop_at - row.known)
                self._stops.setdefault(row.stop_step, []).append(slot)
        stopping = self._stops.pop(step, ())
        places = list(decode_set) if stopping else []
        for slot in stopping:
            decoding = decode_set.get(slot)
            if decoding is not None and decoding.stop_step == step:
                tokens[places.index(slot)] = STOP
        for row in self._batch.finishing:
            if row.candidates:
                offers[len(tokens)] = self._offer(row)
            tokens.append(STOP if row.known == row.stop_at and not row.candidates else TOKEN)
        return tokens, offers

    def _offer(self, row: ModelRow) -> TokenLogprobs:
        count = row.candidates
        if row.known < row.stop_at:
            return self.likelihoods.offer(row.history, range(TOKEN, TOKEN + count))
        others = range(TOKEN, TOKEN + count - 1)
        return TokenLogprobs(0.0, 1, [STOP, *others], [0.0] + [HOPELESS] * len(others))
