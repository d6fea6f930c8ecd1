"""Plans and results survive the wire, field by field."""

from __future__ import annotations

import gc
import math
import re
from array import array

import pytest

from pagewire.v1 import inference_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.codec import ModelLimits, SubmitError
from scheduler.sequence import Request, SequenceStatus
from scheduler.step_plan import (
    BlockMoves,
    Fork,
    NewSequence,
    PromptLogprobs,
    StepPlan,
    StepResult,
    StepTimings,
    TokenLogprobs,
)

LIMITS = ModelLimits(vocab_size=100, max_model_len=64, eos_token_ids=frozenset({2}))


def sampling(**changes: object) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(**{"temperature": 0.5, "seed": 7, "n": 2, **changes})


def test_every_field_of_a_plan_arrives() -> None:
    request = Request(
        request_id="r",
        prompt=array("I", [5, 6, 7]),
        min_tokens=3,
        stop_ids=frozenset({9, 2}),
        logprobs=0,
        payload=scheduler_pb2.Submit(sampling=sampling()),
    )
    row = NewSequence(
        slot=4,
        token_ids=array("I", [5, 6, 7, 8]),
        prompt_tokens=3,
        computed_tokens=2,
        blocks=[11, 12],
        index=1,
        request=request,
        logprobs=0,
        prompt_logprobs=5,
    )
    plan = StepPlan(
        epoch=1 << 41,
        step=3,
        release_slots=[1],
        swap_out=BlockMoves([1], [2]),
        swap_in=BlockMoves([3], [4]),
        copies=BlockMoves([5, 6], [7, 8]),
        new_sequences=[row],
        beam_slots=[9, 4],
        beam_parents=[4, 4],
        beam_tokens=[31, 32],
        append_slots=[2],
        append_blocks=[20],
        replace_slots=[3],
        replace_indices=[0],
        replace_blocks=[21],
        decode_remove=[5],
        decode_add=[6, 7],
        chunk_slots=[4],
        chunk_tokens=[2],
        forks=[Fork(parent_slot=4, slot=8, index=1)],
    )
    assert worker_pb2.JoinResponse.FromString(codec.encode_plan(plan)).step_plan == worker_pb2.StepPlan(
        epoch=1 << 41,
        step=3,
        release_slots=[1],
        swap_out=worker_pb2.BlockMoves(sources=[1], destinations=[2]),
        swap_in=worker_pb2.BlockMoves(sources=[3], destinations=[4]),
        copies=worker_pb2.BlockMoves(sources=[5, 6], destinations=[7, 8]),
        new_sequences=[
            worker_pb2.NewSequence(
                slot=4,
                token_ids=array("I", [5, 6, 7, 8]),
                prompt_tokens=3,
                computed_tokens=2,
                blocks=[11, 12],
                index=1,
                sampling=sampling(),
                logprobs=0,
                prompt_logprobs=5,
                min_tokens=3,
                stop_token_ids=[2, 9],
            )
        ],
        beam_slots=[9, 4],
        beam_parents=[4, 4],
        beam_tokens=[31, 32],
        append_slots=[2],
        append_blocks=[20],
        replace_slots=[3],
        replace_indices=[0],
        replace_blocks=[21],
        decode_remove=[5],
        decode_add=[6, 7],
        chunk_slots=[4],
        chunk_tokens=[2],
        forks=[worker_pb2.Fork(parent_slot=4, slot=8, index=1)],
    )


def test_a_steady_decode_plan_of_256_sequences_is_a_few_hundred_bytes() -> None:
    # 16 of 256 rows fill a block in each step when a block holds 16 tokens.
    plan = StepPlan(epoch=1 << 41, step=1000, append_slots=list(range(16)), append_blocks=list(range(50_000, 50_016)))
    assert len(codec.encode_plan(plan)) < 100


def test_every_field_of_a_result_arrives() -> None:
    said = worker_pb2.StepResult(
        epoch=5,
        step=6,
        token_ids=[7, 8],
        logprob_rows=[1],
        logprobs=[{"logprob": -0.5, "rank": 2, "top_ids": [9, 8], "top_logprobs": [-0.25, -0.5]}],
        prompt_logprobs=[{"slot": 3, "first_token": 1, "logprobs": [{"logprob": -1.0, "rank": 1}]}],
        nonfinite_rows=[0],
        timings={
            "idle_ns": 1,
            "swap_out_ns": 2,
            "swap_in_ns": 3,
            "copy_ns": 4,
            "forward_ns": 5,
            "sample_ns": 6,
            "chunk_tokens": 7,
            "decode_tokens": 8,
        },
        out_of_memory_slots=[4],
    )
    assert codec.decode_result(worker_pb2.StepResult.FromString(said.SerializeToString())) == StepResult(
        epoch=5,
        step=6,
        token_ids=[7, 8],
        logprob_rows=[1],
        logprobs=[TokenLogprobs(-0.5, 2, [9, 8], [-0.25, -0.5])],
        prompt_logprobs=[PromptLogprobs(3, 1, [TokenLogprobs(-1.0, 1, [], [])])],
        nonfinite_rows=[0],
        timings=StepTimings(1, 2, 3, 4, 5, 6, 7, 8),
        out_of_memory_slots=[4],
    )
    assert codec.decode_result(worker_pb2.StepResult(epoch=1, step=1)) == StepResult(1, 1, [])


def submit(**changes: object) -> scheduler_pb2.Submit:
    values: dict = {
        "stream": 3,
        "request_id": "r",
        "token_ids": [5, 6, 7],
        "sampling": sampling(),
        "stop": inference_pb2.StopParams(max_tokens=10, min_tokens=1, stop_token_ids=[9]),
        "tenant": "t",
        "priority": -4,
    }
    return scheduler_pb2.Submit(**{**values, **changes})


def test_a_submission_becomes_a_request_with_the_models_stop_ids() -> None:
    request = codec.decode_submit(submit(timeout_ns=50, detached=True), LIMITS, now=1000)
    assert (request.request_id, list(request.prompt), request.n) == ("r", [5, 6, 7], 2)
    assert (request.max_tokens, request.min_tokens, request.stop_ids) == (10, 1, frozenset({2, 9}))
    assert (request.priority, request.tenant, request.deadline, request.detached) == (-4, "t", 1050, True)
    assert (request.logprobs, request.prompt_logprobs) == (None, None)
    assert isinstance(request.payload, scheduler_pb2.Submit)
    assert request.payload.token_ids == [5, 6, 7]
    assert request.payload.sampling == sampling()


def test_the_garbage_collector_does_not_walk_the_tokens_of_a_prompt() -> None:
    prompt = codec.decode_submit(submit(), LIMITS, now=0).prompt
    assert gc.get_referents(prompt) == [array]  # its type; a list would name each token


def test_ignore_eos_leaves_only_the_clients_stop_ids() -> None:
    stop = inference_pb2.StopParams(max_tokens=10, stop_token_ids=[9], ignore_eos=True)
    assert codec.decode_submit(submit(stop=stop), LIMITS, now=0).stop_ids == frozenset({9})


@pytest.mark.parametrize("asked", [0, 3])
def test_log_probabilities_of_the_chosen_token_only_are_not_none_at_all(asked: int) -> None:
    output = inference_pb2.OutputOptions(logprobs=asked, prompt_logprobs=asked)
    request = codec.decode_submit(submit(output=output), LIMITS, now=0)
    assert (request.logprobs, request.prompt_logprobs) == (asked, asked)


@pytest.mark.parametrize(("length", "room"), [(1, 63), (60, 4), (63, 1)])
def test_max_tokens_is_cut_to_what_the_context_leaves(length: int, room: int) -> None:
    stop = inference_pb2.StopParams(max_tokens=1000)
    assert codec.decode_submit(submit(token_ids=[5] * length, stop=stop), LIMITS, now=0).max_tokens == room


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sampling": sampling(temperature=math.nan)}, "sampling.temperature is nan"),
        ({"sampling": sampling(temperature=-1.0)}, "sampling.temperature is -1"),
        ({"sampling": sampling(top_p=0.0)}, "sampling.top_p must be above 0"),
        ({"sampling": sampling(top_p=1.5)}, "sampling.top_p is 1.5"),
        ({"sampling": sampling(min_p=-0.5)}, "sampling.min_p is -0.5"),
        ({"sampling": sampling(repetition_penalty=0.0)}, "sampling.repetition_penalty must be above 0"),
        ({"sampling": sampling(presence_penalty=math.inf)}, "sampling.presence_penalty is inf"),
        ({"sampling": sampling(frequency_penalty=math.nan)}, "sampling.frequency_penalty is nan"),
        ({"sampling": sampling(logit_bias={100: 1.0})}, "the keys of sampling.logit_bias must be below"),
        ({"sampling": sampling(logit_bias={1: math.nan})}, "the values of sampling.logit_bias must be finite"),
        ({"sampling": sampling(n=4097)}, "sampling.n must be at most 4096"),
        ({"stop": inference_pb2.StopParams(max_tokens=1, stop_token_ids=[100])}, "stop.stop_token_ids must be below"),
        ({"output": inference_pb2.OutputOptions(logprobs=101)}, "output.logprobs and output.prompt_logprobs must be"),
        ({"output": inference_pb2.OutputOptions(prompt_logprobs=101)}, "output.logprobs and output.prompt_logprobs"),
    ],
)
def test_what_a_worker_would_die_of_is_refused_though_a_gateway_let_it_pass(changes: dict, names: str) -> None:
    with pytest.raises(SubmitError, match=re.escape(names)) as refusal:
        codec.decode_submit(submit(**changes), LIMITS, now=0)
    assert (refusal.value.code, refusal.value.reason) == (codec.INVALID_ARGUMENT, "INVALID_SUBMIT")


def test_the_edges_of_every_range_are_taken() -> None:
    widest = sampling(temperature=0.0, top_p=1.0, min_p=1.0, repetition_penalty=0.01, n=4096, logit_bias={99: -100.0})
    output = inference_pb2.OutputOptions(logprobs=100, prompt_logprobs=100)
    assert codec.decode_submit(submit(sampling=widest, output=output), LIMITS, now=0).n == 4096


def test_every_status_of_a_live_sequence_has_a_state_of_its_request() -> None:
    assert codec._REQUEST_STATES.keys() == set(SequenceStatus) - {SequenceStatus.FINISHED}
