"""Protobuf messages to the worker's dataclasses and back. Generated classes appear here and in `worker.link` only."""

from __future__ import annotations

from pagewire.v1 import inference_pb2, worker_pb2
from worker.step import (
    BlockMoves,
    Fork,
    NewSequence,
    Sampling,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

_DEFAULTS = Sampling()


def plan_from_wire(plan: worker_pb2.StepPlan) -> StepPlan:
    """A step plan as the executor takes it."""
    return StepPlan(
        epoch=plan.epoch,
        step=plan.step,
        release_slots=list(plan.release_slots),
        swap_out=_moves(plan.swap_out),
        swap_in=_moves(plan.swap_in),
        copies=_moves(plan.copies),
        new_sequences=[_new_sequence(new) for new in plan.new_sequences],
        beam_slots=list(plan.beam_slots),
        beam_parents=list(plan.beam_parents),
        beam_tokens=list(plan.beam_tokens),
        append_slots=list(plan.append_slots),
        append_blocks=list(plan.append_blocks),
        replace_slots=list(plan.replace_slots),
        replace_indices=list(plan.replace_indices),
        replace_blocks=list(plan.replace_blocks),
        decode_remove=list(plan.decode_remove),
        decode_add=list(plan.decode_add),
        chunk_slots=list(plan.chunk_slots),
        chunk_tokens=list(plan.chunk_tokens),
        forks=[Fork(fork.parent_slot, fork.slot, fork.index) for fork in plan.forks],
        traceparents=list(plan.traceparents),
    )


def result_to_wire(result: StepResult) -> worker_pb2.StepResult:
    """A step result as it is sent."""
    timings = result.timings
    return worker_pb2.StepResult(
        epoch=result.epoch,
        step=result.step,
        token_ids=result.token_ids,
        logprob_rows=result.logprob_rows,
        logprobs=[_logprobs(entry) for entry in result.logprobs],
        prompt_logprobs=[
            worker_pb2.PromptLogprobs(
                slot=entry.slot,
                first_token=entry.first_token,
                logprobs=[_logprobs(position) for position in entry.logprobs],
            )
            for entry in result.prompt_logprobs
        ],
        nonfinite_rows=result.nonfinite_rows,
        timings=worker_pb2.StepTimings(
            idle_ns=timings.idle_ns,
            swap_out_ns=timings.swap_out_ns,
            swap_in_ns=timings.swap_in_ns,
            copy_ns=timings.copy_ns,
            forward_ns=timings.forward_ns,
            sample_ns=timings.sample_ns,
            chunk_tokens=timings.chunk_tokens,
            decode_tokens=timings.decode_tokens,
            early_ns=timings.early_ns,
        ),
        out_of_memory_slots=result.out_of_memory_slots,
    )


def sampling_from_wire(sampling: inference_pb2.SamplingParams) -> Sampling:
    """Sampling parameters, unset ones at the API's defaults."""
    return Sampling(
        temperature=sampling.temperature if sampling.HasField("temperature") else _DEFAULTS.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else _DEFAULTS.top_p,
        min_p=sampling.min_p,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else _DEFAULTS.repetition_penalty
        ),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logit_bias=tuple(sampling.logit_bias.items()),
    )


def _new_sequence(new: worker_pb2.NewSequence) -> NewSequence:
    return NewSequence(
        slot=new.slot,
        token_ids=list(new.token_ids),
        prompt_tokens=new.prompt_tokens,
        computed_tokens=new.computed_tokens,
        blocks=list(new.blocks),
        index=new.index,
        sampling=sampling_from_wire(new.sampling),
        logprobs=new.logprobs if new.HasField("logprobs") else None,
        prompt_logprobs=new.prompt_logprobs if new.HasField("prompt_logprobs") else None,
        min_tokens=new.min_tokens,
        stop_token_ids=list(new.stop_token_ids),
    )


def _moves(moves: worker_pb2.BlockMoves) -> BlockMoves:
    return BlockMoves(list(moves.sources), list(moves.destinations))


def _logprobs(entry: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        logprob=entry.logprob, rank=entry.rank, top_ids=entry.top_ids, top_logprobs=entry.top_logprobs
    )
