from __future__ import annotations

import dataclasses

from pagewire.v1 import inference_pb2, worker_pb2
from worker import step
from worker.codec import plan_from_wire, result_to_wire, sampling_from_wire


def test_every_field_of_a_plan_arrives() -> None:
    moves = worker_pb2.BlockMoves(sources=[1, 2], destinations=[3, 4])
    sampling = inference_pb2.SamplingParams(temperature=0.0, top_p=0.5, seed=2**64 - 1, logit_bias={7: -1.5})
    wire = worker_pb2.StepPlan(
        epoch=2**63,
        step=9,
        release_slots=[1],
        swap_out=moves,
        swap_in=moves,
        copies=moves,
        new_sequences=[
            worker_pb2.NewSequence(
                slot=3,
                token_ids=[5, 6],
                prompt_tokens=1,
                computed_tokens=1,
                blocks=[8],
                index=2,
                sampling=sampling,
                logprobs=0,
                min_tokens=4,
                stop_token_ids=[11],
            )
        ],
        beam_slots=[12],
        beam_parents=[13],
        beam_tokens=[14],
        append_slots=[2],
        append_blocks=[3],
        replace_slots=[4],
        replace_indices=[5],
        replace_blocks=[6],
        decode_remove=[7],
        decode_add=[8],
        chunk_slots=[9],
        chunk_tokens=[10],
        forks=[worker_pb2.Fork(parent_slot=1, slot=2, index=3)],
        traceparents=["trace"],
    )
    block_moves = step.BlockMoves([1, 2], [3, 4])
    assert plan_from_wire(wire) == step.StepPlan(
        epoch=2**63,
        step=9,
        release_slots=[1],
        swap_out=block_moves,
        swap_in=block_moves,
        copies=block_moves,
        new_sequences=[
            step.NewSequence(
                slot=3,
                token_ids=[5, 6],
                prompt_tokens=1,
                computed_tokens=1,
                blocks=[8],
                index=2,
                sampling=step.Sampling(temperature=0.0, top_p=0.5, seed=2**64 - 1, logit_bias=((7, -1.5),)),
                logprobs=0,
                prompt_logprobs=None,
                min_tokens=4,
                stop_token_ids=[11],
            )
        ],
        beam_slots=[12],
        beam_parents=[13],
        beam_tokens=[14],
        append_slots=[2],
        append_blocks=[3],
        replace_slots=[4],
        replace_indices=[5],
        replace_blocks=[6],
        decode_remove=[7],
        decode_add=[8],
        chunk_slots=[9],
        chunk_tokens=[10],
        forks=[step.Fork(1, 2, 3)],
        traceparents=["trace"],
    )


def test_unset_sampling_fields_have_the_apis_defaults() -> None:
    assert sampling_from_wire(inference_pb2.SamplingParams()) == step.Sampling(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=0,
        logit_bias=(),
    )


def test_the_worker_knows_every_field_of_the_wire() -> None:
    for message, ours in (
        (worker_pb2.StepPlan, step.StepPlan),
        (worker_pb2.NewSequence, step.NewSequence),
        (worker_pb2.Fork, step.Fork),
        (worker_pb2.BlockMoves, step.BlockMoves),
        (worker_pb2.StepResult, step.StepResult),
        (worker_pb2.PromptLogprobs, step.PromptLogprobs),
        (worker_pb2.StepTimings, step.StepTimings),
        (inference_pb2.TokenLogprobs, step.TokenLogprobs),
    ):
        assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in dataclasses.fields(ours)}


def test_every_field_of_a_result_is_sent() -> None:
    logprobs = step.TokenLogprobs(-0.5, 2, [4, 5], [-0.25, -0.5])
    wire = result_to_wire(
        step.StepResult(
            epoch=4,
            step=5,
            token_ids=[1, 2],
            logprob_rows=[1],
            logprobs=[logprobs],
            prompt_logprobs=[step.PromptLogprobs(3, 1, [logprobs])],
            nonfinite_rows=[0],
            timings=step.StepTimings(1, 2, 3, 4, 5, 6, 7, 8, 9),
            out_of_memory_slots=[6],
        )
    )
    entry = inference_pb2.TokenLogprobs(logprob=-0.5, rank=2, top_ids=[4, 5], top_logprobs=[-0.25, -0.5])
    assert wire == worker_pb2.StepResult(
        epoch=4,
        step=5,
        token_ids=[1, 2],
        logprob_rows=[1],
        logprobs=[entry],
        prompt_logprobs=[worker_pb2.PromptLogprobs(slot=3, first_token=1, logprobs=[entry])],
        nonfinite_rows=[0],
        timings=worker_pb2.StepTimings(
            idle_ns=1,
            swap_out_ns=2,
            swap_in_ns=3,
            copy_ns=4,
            forward_ns=5,
            sample_ns=6,
            chunk_tokens=7,
            decode_tokens=8,
            early_ns=9,
        ),
        out_of_memory_slots=[6],
    )
