"""Beam search through gateway, scheduler and worker processes equals transformers' `generate(num_beams=...)`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests import tiny_models
from tests.service import service

PROMPTS = [
    [5, 9, 200, 31],
    [17, 44, 90, 120, 7, 3, 250, 66, 12],
    [80, 81, 99, 14, 222, 160, 41, 35, 8, 19, 100, 3, 77],
]
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_tiny_model("llama", tmp_path_factory.mktemp("beams") / "model", max_position_embeddings=128)


def beams(
    prompt: list[int],
    width: int,
    n: int,
    *,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    max_tokens: int = MAX_TOKENS,
    **fields: Any,
) -> inference_pb2.GenerateRequest:
    """A beam search that the model's own end-of-sequence token does not end."""
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(beam_width=width, n=n, length_penalty=length_penalty),
        stop=inference_pb2.StopParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stop_ids),
        **fields,
    )


async def answers(channel: grpc.aio.Channel, request: inference_pb2.GenerateRequest) -> list[service.Completion]:
    """The answers of a search, which come best first."""
    found = await service.collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
    assert list(found) == list(range(request.sampling.n))
    return [found[index] for index in range(request.sampling.n)]


async def check(
    channel: grpc.aio.Channel, model: Path, prompt: list[int], width: int, n: int, **fields: Any
) -> inference_pb2.Usage:
    """One search, compared with transformers in tokens, log-probabilities and reasons. Returns what it cost."""
    penalty, stops = fields.get("length_penalty", 1.0), list(fields.get("stop_ids", ()))
    expected = tiny_models.reference_beams(
        model, prompt, width=width, n=n, max_new_tokens=MAX_TOKENS, stop_ids=stops, length_penalty=penalty
    )
    found = await answers(channel, beams(prompt, width, n, priority=-1, **fields))
    for one, beam in zip(found, expected, strict=True):
        assert one.token_ids == beam.token_ids
        finish = one.finish
        assert finish is not None
        assert finish.usage.completion_tokens == len(beam.token_ids)
        assert finish.cumulative_logprob / len(beam.token_ids) ** penalty == pytest.approx(beam.score, rel=1e-4)
        stopped = beam.token_ids[-1] in stops
        reasons = {True: inference_pb2.FINISH_REASON_STOP, False: inference_pb2.FINISH_REASON_LENGTH}
        assert finish.reason == reasons[stopped]
        assert not stopped or finish.matched_token_id == beam.token_ids[-1]
    assert found[0].finish is not None
    return found[0].finish.usage


@pytest.mark.parametrize(("mode", "cost"), [("swap", "swapped_bytes"), ("recompute", "recomputed_tokens")])
async def test_searches_equal_transformers_beside_each_other_and_beside_other_requests_while_all_are_preempted(
    model: Path, tmp_path: Path, mode: str, cost: str
) -> None:
    generator = random.Random(3)
    probe = tiny_models.reference_beams(model, PROMPTS[1], width=4, n=4, max_new_tokens=8, stop_ids=[])
    stops = sorted({beam.token_ids[3 + at] for at, beam in enumerate(probe)})
    others = [[generator.randrange(4, 280) for _ in range(generator.randint(4, 30))] for _ in range(12)]
    arguments = ["--model", str(model), "--dtype", "float32", "--block-size", "4", "--num-blocks", "40"]
    arguments += ["--host-blocks", "40", "--max-num-seqs", "16", "--token-budget", "40", "--preemption-mode", mode]
    async with service.running(tmp_path / "up", *arguments) as up, up.channel() as channel:
        sampled = [
            inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=prompt),
                sampling=inference_pb2.SamplingParams(temperature=1.0, seed=number),
                stop=inference_pb2.StopParams(max_tokens=MAX_TOKENS, ignore_eos=True),
            )
            for number, prompt in enumerate(others)
        ]
        alone = [await service.generate(channel, request) for request in sampled[:3]]
        searches = [
            check(channel, model, PROMPTS[at], width, n, length_penalty=penalty, stop_ids=stops[:count])
            for at, width, n, penalty, count in (
                (0, 2, 2, 1.0, 0),
                (1, 4, 2, 1.0, 2),
                (2, 4, 4, 0.0, 3),
                (0, 6, 3, 2.0, 1),
                (1, 3, 1, -1.0, 2),
                (2, 8, 8, 1.0, 0),
            )
        ]
        greedy = [service.generate(channel, service.greedy(prompt, MAX_TOKENS)) for prompt in others]
        usages, results = await asyncio.gather(
            asyncio.gather(*searches),
            asyncio.gather(*(service.generate(channel, one) for one in sampled), *greedy),
        )
        assert [one.token_ids for one in results[:3]] == [one.token_ids for one in alone]
        for prompt, completion in zip(others, results[-len(others) :], strict=True):
            assert completion.token_ids == tiny_models.reference_greedy(model, prompt, MAX_TOKENS)
        await service.wait_until_idle(channel)
        assert sum(getattr(usage, cost) for usage in usages) > 0, "no search was preempted"


async def test_a_search_survives_its_worker_and_a_cancelled_or_late_one_leaves_nothing(
    model: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(model), "--dtype", "float32", "--block-size", "4", "--num-blocks", "200"]
    async with service.running(tmp_path / "up", *arguments) as up, up.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = beams(PROMPTS[1], 4, 2, max_tokens=100, output=inference_pb2.OutputOptions(logprobs=2))
        undisturbed = await answers(channel, request)

        async def until_it_has_run(steps: int) -> None:
            before = (await service.loads(channel))[0].steps
            while (await service.loads(channel))[0].steps < before + steps:
                await asyncio.sleep(0.005)

        request.request_id = "survivor"
        search = asyncio.ensure_future(answers(channel, request))
        await until_it_has_run(5)
        assert not search.done(), "the search ended before its worker was killed"
        up.kill_worker()
        assert [one.token_ids for one in await search] == [one.token_ids for one in undisturbed]
        attached = await service.collect(stub.Attach(inference_pb2.AttachRequest(request_id="survivor")))
        for index, one in enumerate(undisturbed):
            assert attached[index].token_ids == one.token_ids
            assert attached[index].text == one.text
            assert [entry.rank for entry in attached[index].logprobs] == [entry.rank for entry in one.logprobs]
            assert all(len(entry.top_ids) == 2 for entry in one.logprobs)
            assert sum(entry.logprob for entry in one.logprobs) == pytest.approx(one.finish.cumulative_logprob)

        request.request_id = "cancelled"
        search = asyncio.ensure_future(answers(channel, request))
        await until_it_has_run(3)
        assert (await stub.Cancel(inference_pb2.CancelRequest(request_id="cancelled"))).found
        for one in await search:
            assert (one.token_ids, one.finish.reason) == ([], inference_pb2.FINISH_REASON_CANCELLED)
        await service.wait_until_idle(channel)

        request.request_id = "late"
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await service.collect(stub.Generate(request, timeout=0.1))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await service.wait_until_idle(channel)
