"""A virtual worker whose beams are a real model's: the worker's own executor computes what they find likely."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.simulator.likelihoods import Likelihoods
from benchmarks.simulator.profiles import WorkerProfile
from benchmarks.simulator.worker import HOPELESS, STOP, ModelRow, VirtualWorker
from pagewire.simulation.batch import StepLoad
from pagewire.v1 import scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.step_plan import StepPlan, StepResult, TokenLogprobs
from worker.codec import plan_from_wire, result_to_wire
from worker.config import WorkerSettings
from worker.models.base import PagedModel
from worker.start import make_executor

SHIFT = STOP + 1
"""The scheduler's ids are the model's and this, so that none of them is STOP."""
END = 0
"""The bundled model's end-of-text token. Where the load does not end an answer, no search chooses it."""


class ModelWorker(VirtualWorker):
    """A virtual worker whose beams offer what a model finds likeliest. Everything else is the cost model's."""

    def __init__(
        self, model: PagedModel, profile: WorkerProfile, epoch: int, likelihoods: Likelihoods | None = None
    ) -> None:
        super().__init__(profile, epoch, likelihoods)
        capacity = profile.capacity
        settings = WorkerSettings(
            block_size=capacity.block_size,
            num_blocks=capacity.num_blocks,
            host_blocks=capacity.host_blocks,
            max_num_seqs=capacity.max_slots,
            token_budget=capacity.max_step_tokens,
        )
        self._executor = make_executor(settings, model, torch.device("cpu"))
        self._offers: Iterator[TokenLogprobs] = iter(())  # of the step's beams, in the order of its rows
        self.likeliest: list[tuple[int, float]] = []
        """Of every offer: the output tokens before it, and the probability of the likeliest token."""

    def execute(self, plan: StepPlan) -> tuple[StepResult, int, StepLoad]:
        message = worker_pb2.JoinResponse.FromString(codec.encode_plan(in_ids_of_the_model(plan))).step_plan
        computed = codec.decode_result(result_to_wire(self._executor.execute(plan_from_wire(message))))
        self._offers = iter(computed.logprobs)
        result, duration, load = super().execute(plan)
        assert result.logprob_rows == computed.logprob_rows
        return result, duration, load

    def _offer(self, row: ModelRow) -> TokenLogprobs:
        offer = next(self._offers)
        if row.known >= row.stop_at:
            return super()._offer(row)
        self.likeliest.append((row.known - row.prompt_tokens, math.exp(offer.top_logprobs[0])))
        ids, logprobs = list(offer.top_ids), list(offer.top_logprobs)
        if END in ids:
            del logprobs[ids.index(END)]
            ids.remove(END)
            ids, logprobs = [*ids, END], [*logprobs, HOPELESS]
        return TokenLogprobs(0.0, 1, [token + SHIFT for token in ids], logprobs)


def in_ids_of_the_model(plan: StepPlan) -> StepPlan:
    """The plan as the worker's executor takes it."""
    return replace(
        plan,
        new_sequences=[
            new._replace(
                token_ids=[token - SHIFT for token in new.token_ids],
                request=replace(
                    new.request,
                    payload=scheduler_pb2.Submit(token_ids=[token - SHIFT for token in new.request.prompt]),
                ),
            )
            for new in plan.new_sequences
        ],
        beam_tokens=[token - SHIFT for token in plan.beam_tokens],
    )
