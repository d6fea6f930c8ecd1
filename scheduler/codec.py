"""Between the wire and the core: the only place that knows both protobuf messages and the core's dataclasses.

Encoding a plan or decoding a result touches only what is in it, so a steady decode step costs some tens of microseconds
however long its sequences are.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from pagewire.v1 import control_pb2, inference_pb2, scheduler_pb2, worker_pb2
from scheduler.block_picture import Changes
from scheduler.dispatcher import Continuation
from scheduler.events import Failed
from scheduler.loads import Loads
from scheduler.policy import ChunkStep, TransferRates, WorkerCapacity
from scheduler.sequence import Finish, FinishReason, Request, Sequence, SequenceGroup, SequenceStatus
from scheduler.step_plan import (
    NO_TIMINGS,
    BlockMoves,
    NewSequence,
    PromptLogprobs,
    StepPlan,
    StepResult,
    StepTimings,
    TokenLogprobs,
)

MAX_REQUEST_ID = 128
MAX_SEQUENCES = 4096
"""Sequences of one request, whatever the gateway's own ceiling: the core makes an object for each."""
GREEDY_TEMPERATURE = 1e-5
NS_PER_S = 1_000_000_000
MAX_LENGTH_PENALTY = 10.0
NEUTRAL_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

# google.rpc.Code values, which are gRPC's.
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
ALREADY_EXISTS = 6
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
INTERNAL = 13
UNAVAILABLE = 14

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
    FinishReason.PARKED: inference_pb2.FINISH_REASON_PARKED,
}


class SubmitError(Exception):
    """One request is refused. Carries what StreamFailed needs."""

    def __init__(self, code: int, reason: str, message: str, retry_after_ns: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after_ns = retry_after_ns


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of the model bounds a request."""

    vocab_size: int
    """Token ids are below it."""
    max_model_len: int
    """Prompt and output together, in tokens."""
    eos_token_ids: frozenset[int]
    """End a sequence unless ignore_eos."""


# Worker link


def capacity_of(hello: worker_pb2.WorkerHello) -> WorkerCapacity:
    """What a worker can hold."""
    said = hello.capacity
    return WorkerCapacity(
        block_size=said.block_size,
        num_blocks=said.num_blocks,
        host_blocks=said.host_blocks,
        block_bytes=said.block_bytes,
        max_slots=said.max_slots,
        max_step_tokens=said.max_step_tokens,
    )


def rates_of(hello: worker_pb2.WorkerHello) -> TransferRates:
    """What a worker has measured."""
    return TransferRates(
        swap_out_bytes_per_second=hello.swap_out_bytes_per_second,
        swap_in_bytes_per_second=hello.swap_in_bytes_per_second,
        prefill_tokens_per_second=hello.prefill_tokens_per_second,
        chunk_steps=tuple(ChunkStep(step.rows, step.nanoseconds) for step in hello.chunk_steps),
    )


def limits_of(model: worker_pb2.ModelInfo) -> ModelLimits:
    """What of the model bounds a request."""
    return ModelLimits(model.vocab_size, model.max_model_len, frozenset(model.eos_token_ids))


def encode_plan(plan: StepPlan, traceparents: Iterable[str] = ()) -> bytes:
    """A plan as the JoinResponse that carries it, with the trace contexts of requests that it computes for."""
    response = worker_pb2.JoinResponse()
    message = response.step_plan
    message.epoch = plan.epoch
    message.step = plan.step
    if plan.release_slots:
        message.release_slots.extend(plan.release_slots)
    if plan.swap_out.sources:
        _encode_moves(message.swap_out, plan.swap_out)
    if plan.swap_in.sources:
        _encode_moves(message.swap_in, plan.swap_in)
    if plan.copies.sources:
        _encode_moves(message.copies, plan.copies)
    for row in plan.new_sequences:
        _encode_new_sequence(message.new_sequences.add(), row)
    if plan.beam_slots:
        message.beam_slots.extend(plan.beam_slots)
        message.beam_parents.extend(plan.beam_parents)
        message.beam_tokens.extend(plan.beam_tokens)
    if plan.append_slots:
        message.append_slots.extend(plan.append_slots)
        message.append_blocks.extend(plan.append_blocks)
    if plan.replace_slots:
        message.replace_slots.extend(plan.replace_slots)
        message.replace_indices.extend(plan.replace_indices)
        message.replace_blocks.extend(plan.replace_blocks)
    if plan.decode_remove:
        message.decode_remove.extend(plan.decode_remove)
    if plan.decode_add:
        message.decode_add.extend(plan.decode_add)
    if plan.chunk_slots:
        message.chunk_slots.extend(plan.chunk_slots)
        message.chunk_tokens.extend(plan.chunk_tokens)
    for fork in plan.forks:
        message.forks.add(parent_slot=fork.parent_slot, slot=fork.slot, index=fork.index)
    message.traceparents.extend(traceparents)
    return response.SerializeToString()


def _encode_moves(message: worker_pb2.BlockMoves, moves: BlockMoves) -> None:
    message.sources.extend(moves.sources)
    message.destinations.extend(moves.destinations)


def _encode_new_sequence(message: worker_pb2.NewSequence, row: NewSequence) -> None:
    request = row.request
    submit = request.payload
    assert isinstance(submit, scheduler_pb2.Submit)
    message.slot = row.slot
    given = submit.token_ids  # known tokens begin with it; merging copies memory, extending looks at every number
    message.token_ids.MergeFrom(given)
    if len(row.token_ids) > len(given):
        message.token_ids.extend(row.token_ids[len(given) :])
    message.prompt_tokens = row.prompt_tokens
    message.computed_tokens = row.computed_tokens
    message.blocks.extend(row.blocks)
    message.index = row.index
    message.sampling.CopyFrom(submit.sampling)
    if row.logprobs is not None:
        message.logprobs = row.logprobs
    if row.prompt_logprobs is not None:
        message.prompt_logprobs = row.prompt_logprobs
    if request.min_tokens and not request.is_beam_search:
        message.min_tokens = request.min_tokens
        message.stop_token_ids.extend(sorted(request.stop_ids))


def decode_result(message: worker_pb2.StepResult) -> StepResult:
    """A worker's result as a value."""
    timings = NO_TIMINGS
    if message.HasField("timings"):
        said = message.timings
        timings = StepTimings(
            idle_ns=said.idle_ns,
            swap_out_ns=said.swap_out_ns,
            swap_in_ns=said.swap_in_ns,
            copy_ns=said.copy_ns,
            forward_ns=said.forward_ns,
            sample_ns=said.sample_ns,
            chunk_tokens=said.chunk_tokens,
            decode_tokens=said.decode_tokens,
            early_ns=said.early_ns,
        )
    return StepResult(
        epoch=message.epoch,
        step=message.step,
        token_ids=message.token_ids[:],
        logprob_rows=message.logprob_rows[:],
        logprobs=_decode_logprobs(message.logprobs),
        prompt_logprobs=[
            PromptLogprobs(part.slot, part.first_token, _decode_logprobs(part.logprobs))
            for part in message.prompt_logprobs
        ],
        nonfinite_rows=message.nonfinite_rows[:],
        timings=timings,
        out_of_memory_slots=message.out_of_memory_slots[:],
    )


def encode_result(result: StepResult) -> worker_pb2.StepResult:
    """A result as its worker sent it, for recordings."""
    return worker_pb2.StepResult(
        epoch=result.epoch,
        step=result.step,
        token_ids=result.token_ids,
        logprob_rows=result.logprob_rows,
        logprobs=[encode_logprobs(one) for one in result.logprobs],
        prompt_logprobs=[
            worker_pb2.PromptLogprobs(
                slot=part.slot, first_token=part.first_token, logprobs=[encode_logprobs(one) for one in part.logprobs]
            )
            for part in result.prompt_logprobs
        ],
        nonfinite_rows=result.nonfinite_rows,
        timings=worker_pb2.StepTimings(**dataclasses.asdict(result.timings)),
        out_of_memory_slots=result.out_of_memory_slots,
    )


def _decode_logprobs(messages: Iterable[inference_pb2.TokenLogprobs]) -> list[TokenLogprobs]:
    return [TokenLogprobs(one.logprob, one.rank, one.top_ids[:], one.top_logprobs[:]) for one in messages]


def encode_logprobs(one: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    """One position's log-probabilities."""
    return inference_pb2.TokenLogprobs(
        logprob=one.logprob, rank=one.rank, top_ids=one.top_ids, top_logprobs=one.top_logprobs
    )


# Gateway link


def decode_submit(message: scheduler_pb2.Submit, limits: ModelLimits, now: int) -> Request:
    """A submission as the core's request, after checking everything that the core relies on.

    The gateway has validated it; this is the other side of that wire. The request's payload is the Submit without
    stream number and timeout.

    Raises:
        SubmitError: a value the core could not live with. Messages name fields of Submit and hold no prompt.
    """
    num_prompt = len(message.token_ids)
    sampling, stop, output = message.sampling, message.stop, message.output
    if not 1 <= len(message.request_id) <= MAX_REQUEST_ID:
        raise _invalid(f"request_id must have 1 to {MAX_REQUEST_ID} characters")
    if num_prompt == 0:
        raise _invalid("token_ids must not be empty")
    if num_prompt >= limits.max_model_len:
        raise _invalid(f"token_ids has {num_prompt} tokens; the context has room for {limits.max_model_len - 1}")
    num_sequences = max(1, sampling.n)
    if num_sequences > MAX_SEQUENCES:
        raise _invalid(f"sampling.n must be at most {MAX_SEQUENCES}")
    if message.hold_seconds and max(num_sequences, sampling.beam_width) > 1:
        raise _invalid("hold_seconds needs a request of one sequence")
    if not sampling.HasField("temperature"):
        raise _invalid("sampling.temperature must be set")
    if sampling.temperature >= GREEDY_TEMPERATURE and not sampling.HasField("seed"):
        raise _invalid("sampling.seed must be set")
    if not stop.max_tokens:
        raise _invalid("stop.max_tokens must be set")
    prompt = message.token_ids[:]  # a list, whose greatest is found faster than an array's
    if max(prompt) >= limits.vocab_size:
        raise _invalid(f"token_ids must be below the vocabulary size {limits.vocab_size}")
    stop_ids = frozenset(stop.stop_token_ids)
    if stop_ids and max(stop_ids) >= limits.vocab_size:
        raise _invalid(f"stop.stop_token_ids must be below the vocabulary size {limits.vocab_size}")
    _check_sampling(sampling, limits)
    if max(output.logprobs, output.prompt_logprobs) > limits.vocab_size:
        raise _invalid(f"output.logprobs and output.prompt_logprobs must be at most {limits.vocab_size}")
    if not stop.ignore_eos:
        stop_ids = stop_ids | limits.eos_token_ids if stop_ids else limits.eos_token_ids
    if sampling.beam_width > 1:
        _check_beams(sampling, num_sequences, len(stop_ids), limits)
    payload = scheduler_pb2.Submit()
    payload.CopyFrom(message)  # a copy of its own: the message's memory is that of the whole message around it
    payload.ClearField("stream")
    payload.ClearField("timeout_ns")
    return Request(
        request_id=message.request_id,
        prompt=array("I", prompt),
        n=num_sequences,
        beam_width=max(1, sampling.beam_width),
        length_penalty=sampling.length_penalty if sampling.HasField("length_penalty") else 1.0,
        max_tokens=min(stop.max_tokens, limits.max_model_len - num_prompt),
        min_tokens=stop.min_tokens,
        stop_ids=stop_ids,
        priority=message.priority,
        tenant=message.tenant,
        deadline=now + message.timeout_ns if message.HasField("timeout_ns") else None,
        detached=message.detached,
        hold_ns=message.hold_seconds * NS_PER_S,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
        payload=payload,
    )


def decode_continuation(message: scheduler_pb2.ContinueStream, limits: ModelLimits, now: int) -> Continuation:
    """What a request goes on with. Raises SubmitError for a token that the model does not have."""
    tokens = message.token_ids[:]
    if tokens and max(tokens) >= limits.vocab_size:
        raise _invalid(f"token_ids must be below the vocabulary size {limits.vocab_size}")
    return Continuation(
        tokens=tokens,
        max_tokens=message.max_tokens,
        max_model_len=limits.max_model_len,
        deadline=now + message.timeout_ns if message.HasField("timeout_ns") else None,
        detached=message.detached,
        hold_ns=message.hold_seconds * NS_PER_S,
    )


def _check_sampling(sampling: inference_pb2.SamplingParams, limits: ModelLimits) -> None:
    """Refuses numbers that a worker would fail at, and with it every request that it runs."""
    ranges = [
        ("temperature", 0.0, math.inf),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.0, math.inf),
        ("presence_penalty", -math.inf, math.inf),
        ("frequency_penalty", -math.inf, math.inf),
    ]
    for name, low, high in ranges:
        value = getattr(sampling, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise _invalid(f"sampling.{name} is {value:g}, which is out of range")
    for name in ("top_p", "repetition_penalty"):
        if sampling.HasField(name) and getattr(sampling, name) == 0.0:
            raise _invalid(f"sampling.{name} must be above 0")
    if sampling.logit_bias:
        if max(sampling.logit_bias) >= limits.vocab_size:
            raise _invalid(f"the keys of sampling.logit_bias must be below the vocabulary size {limits.vocab_size}")
        if not all(map(math.isfinite, sampling.logit_bias.values())):
            raise _invalid("the values of sampling.logit_bias must be finite")


def _check_beams(
    sampling: inference_pb2.SamplingParams, num_sequences: int, num_stop_ids: int, limits: ModelLimits
) -> None:
    """Refuses a beam search that makes no sense."""
    width = sampling.beam_width
    if width > MAX_SEQUENCES or num_sequences > width:
        raise _invalid(f"sampling.beam_width must be at least sampling.n and at most {MAX_SEQUENCES}")
    if width + num_stop_ids > limits.vocab_size:
        raise _invalid(
            f"sampling.beam_width must leave a vocabulary of {limits.vocab_size} tokens other than stop tokens"
        )
    if sampling.temperature >= GREEDY_TEMPERATURE:
        raise _invalid("sampling.temperature must be 0 with sampling.beam_width above 1")
    if not (math.isfinite(sampling.length_penalty) and abs(sampling.length_penalty) <= MAX_LENGTH_PENALTY):
        raise _invalid(f"sampling.length_penalty must be from -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}")
    penalised = any(
        sampling.HasField(name) and getattr(sampling, name) != neutral for name, neutral in NEUTRAL_PENALTIES.items()
    )
    if sampling.logit_bias or penalised:
        raise _invalid("penalties and sampling.logit_bias do not go with sampling.beam_width above 1")


def _invalid(message: str) -> SubmitError:
    return SubmitError(INVALID_ARGUMENT, "INVALID_SUBMIT", message)


def encode_finish(finish: Finish) -> inference_pb2.Finish:
    """How a sequence ended and what it cost."""
    usage = finish.usage
    return inference_pb2.Finish(
        reason=_FINISH_REASONS[finish.reason],
        matched_stop=finish.matched_stop,
        matched_token_id=finish.matched_token_id or 0,
        usage=inference_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            preemptions=usage.preemptions,
            swapped_bytes=usage.swapped_bytes,
            recomputed_tokens=usage.recomputed_tokens,
            queue_ns=usage.queue_ns,
            first_token_ns=usage.first_token_ns,
            total_ns=usage.total_ns,
        ),
        cumulative_logprob=finish.cumulative_logprob,
    )


def encode_prompt(group: SequenceGroup) -> inference_pb2.PromptInfo:
    """What became of the prompt. Its first token has no log-probabilities: nothing precedes it."""
    info = inference_pb2.PromptInfo(prompt_tokens=group.given_tokens, cached_tokens=group.cached_tokens)
    if group.request.prompt_logprobs is not None:
        info.logprobs.add()
        info.logprobs.extend(map(encode_logprobs, group.prompt_logprobs))
    return info


def encode_attached(stream: int, group: SequenceGroup) -> scheduler_pb2.StreamAttached:
    """Everything so far of a live or finished request: the prompt as it was submitted, the output of all turns."""
    request = group.request
    attached = scheduler_pb2.StreamAttached(stream=stream)
    assert isinstance(request.payload, scheduler_pb2.Submit)
    attached.request.CopyFrom(request.payload)
    if len(group.sequences) == 1:
        attached.request.stop.max_tokens = len(group.sequences[0].earlier) + request.max_tokens
    if is_admitted(group):
        attached.prompt.CopyFrom(encode_prompt(group))
    for sequence in group.sequences[: request.n]:
        if group.search is not None and sequence.finish is None:  # a beam is no answer yet
            attached.sequences.add()
            continue
        state = attached.sequences.add(token_ids=[*sequence.earlier, *sequence.output])
        if sequence.logprobs or sequence.earlier_logprobs:
            state.logprobs.extend(map(encode_logprobs, chain(sequence.earlier_logprobs, sequence.logprobs)))
        for turn in sequence.turns:
            state.turns.add(num_tokens=turn.num_tokens, finish=encode_finish(turn.finish))
        if sequence.finish is not None:
            state.finish.CopyFrom(encode_finish(sequence.finish))
    return attached


def is_admitted(group: SequenceGroup) -> bool:
    """Whether the Admitted event of a request has been: it has run, and its prompt's log-probabilities are complete."""
    return group.announced


def encode_admitted(stream: int, group: SequenceGroup) -> scheduler_pb2.StreamAdmitted:
    """A request has begun to run."""
    return scheduler_pb2.StreamAdmitted(stream=stream, prompt=encode_prompt(group))


def encode_finished(stream: int, sequence: Sequence) -> scheduler_pb2.StreamFinished:
    """A sequence has ended."""
    assert sequence.finish is not None
    return scheduler_pb2.StreamFinished(
        stream=stream, num_tokens=len(sequence.earlier) + len(sequence.output), finish=encode_finish(sequence.finish)
    )


def encode_failed(stream: int, failed: Failed) -> scheduler_pb2.StreamFailed:
    """A request has ended with an error."""
    return scheduler_pb2.StreamFailed(
        stream=stream,
        code=int(failed.code),
        reason=failed.reason,
        message=failed.message,
        retry_after_ns=failed.retry_after_ns,
    )


def encode_refusal(stream: int, error: SubmitError) -> scheduler_pb2.StreamFailed:
    """A request has been refused."""
    return scheduler_pb2.StreamFailed(
        stream=stream, code=error.code, reason=error.reason, message=error.message, retry_after_ns=error.retry_after_ns
    )


# Control


_REQUEST_STATES = {
    SequenceStatus.RUNNING: control_pb2.REQUEST_STATE_RUNNING,
    SequenceStatus.ENDING: control_pb2.REQUEST_STATE_RUNNING,
    SequenceStatus.PREFILLING: control_pb2.REQUEST_STATE_PREFILLING,
    SequenceStatus.SWAPPED: control_pb2.REQUEST_STATE_SWAPPED,
    SequenceStatus.PREEMPTED: control_pb2.REQUEST_STATE_PREEMPTED,
    SequenceStatus.WAITING: control_pb2.REQUEST_STATE_WAITING,
}
"""The farthest first."""


def encode_request(group: SequenceGroup, now: int) -> control_pb2.RequestLoad:
    """One live request, without anything of its prompt or output."""
    request, live = group.request, group.live
    statuses = {sequence.status for sequence in live}
    message = control_pb2.RequestLoad(
        request_id=request.request_id,
        worker_id=group.worker_id or "",
        state=next(state for status, state in _REQUEST_STATES.items() if status in statuses),
        priority=request.priority,
        tenant=request.tenant,
        sequences=len(live),
        prompt_tokens=len(request.prompt),
        cached_tokens=group.cached_tokens,
        output_tokens=sum(len(sequence.output) for sequence in group.sequences),
        max_tokens=request.max_tokens,
        blocks=_num_blocks(live),
        preemptions=group.preemptions,
        age_ns=now - group.accepted_at,
    )
    if group.started_at is not None:
        message.queue_ns = group.started_at - group.accepted_at
    if group.first_token_at is not None:
        message.first_token_ns = group.first_token_at - group.accepted_at
    return message


def _num_blocks(sequences: list[Sequence]) -> int:
    if len(sequences) == 1:  # a table names no block twice
        return len(sequences[0].table.blocks)
    return len({block for sequence in sequences for block in sequence.table.blocks})


def encode_loads(loads: Loads) -> control_pb2.GetLoadsResponse:
    """What every worker carries, as the core knows it."""
    response = control_pb2.GetLoadsResponse(unassigned_requests=loads.unassigned)
    for worker in loads.workers:
        response.loads.add(
            worker_id=worker.worker_id,
            running=worker.running_sequences,
            waiting=worker.waiting_groups + worker.preempted_groups,
            swapped=worker.swapped_groups,
            total_blocks=worker.kv_blocks_free + worker.kv_blocks_used,
            free_blocks=worker.kv_blocks_free,
            cached_blocks=worker.kv_blocks_cached,
            total_host_blocks=worker.host_blocks_free + worker.host_blocks_used,
            free_host_blocks=worker.host_blocks_free,
            preemptions_swap=worker.preemptions_total.get("swap", 0),
            preemptions_recompute=worker.preemptions_total.get("recompute", 0),
            kv_waste_ratio=worker.kv_waste_ratio,
            epoch=worker.epoch,
            prefix_cache_queries=worker.prefix_cache_query_tokens_total,
            prefix_cache_hits=worker.prefix_cache_hit_tokens_total,
            prompt_tokens=worker.prompt_tokens_total,
            generation_tokens=worker.generation_tokens_total,
            cached_host_blocks=worker.host_blocks_cached,
            swap_out_bytes=worker.swap_out_bytes_total,
            swap_in_bytes=worker.swap_in_bytes_total,
            prefix_cache_host_hits=worker.prefix_cache_host_hit_tokens_total,
        )
    return response


def encode_block_changes(changes: Changes, *, snapshot: bool) -> control_pb2.WatchBlocksResponse:
    """What has changed in the blocks, without loads."""
    message = control_pb2.WatchBlocksResponse(
        snapshot=snapshot, gone_workers=changes.gone_workers, ended_owners=changes.ended_owners
    )
    for number, owner in changes.owners:
        message.owners.add(number=number, request_id=owner.request_id, index=owner.index)
    for pool in changes.pools:
        message.pools.add(
            worker_id=pool.key.worker_id,
            memory=control_pb2.BLOCK_MEMORY_HOST_ARENA if pool.key.on_host else control_pb2.BLOCK_MEMORY_KV_POOL,
            whole=pool.total_blocks is not None,
            total_blocks=pool.total_blocks or 0,
            skips=pool.runs.skips,
            lengths=pool.runs.lengths,
            owners=pool.runs.owners,
            references=pool.runs.references,
        )
    return message
