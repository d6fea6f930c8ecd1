"""A generation gives every token once, in order, with its text, however steps, breaks and reads interleave."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.generation import Generation
from gateway.tokenizer import Tokenizer
from pagewire.v1 import inference_pb2, scheduler_pb2
from tests.gateway import tiny_tokenizers

LENGTH, STOP = inference_pb2.FINISH_REASON_LENGTH, inference_pb2.FINISH_REASON_STOP
EOS = 1


class NoLink:
    """Notes what the generation asks of the session."""

    def __init__(self) -> None:
        self.stops: list[tuple[int, int, str]] = []

    def detach(self, listener: Generation) -> None:
        raise AssertionError("nobody has left")

    def stop(self, listener: Generation, index: int, num_tokens: int, matched_stop: str) -> None:
        self.stops.append((index, num_tokens, matched_stop))


async def read_all(generation: Generation) -> list[inference_pb2.GenerateResponse]:
    """What is ready now; all of it once the generation is done."""
    responses = []
    while generation._ready:
        response = await generation.next()
        assert response is not None
        responses.append(response)
    return responses


actions = st.lists(
    st.one_of(
        st.tuples(st.just("tokens"), st.integers(0, 1), st.integers(1, 6)),
        st.tuples(st.just("break"), st.integers(0, 4), st.integers(0, 4)),
        st.just(("read", 0, 0)),
    ),
    max_size=25,
)


@given(
    outputs=st.tuples(*[st.lists(st.integers(2, 399), max_size=30)] * 2),
    actions=actions,
    stops=st.lists(st.text("the c\n", min_size=1, max_size=2), max_size=2),
    ends_with_eos=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_interleaving_of_steps_breaks_and_reads_gives_the_same_stream(
    outputs: tuple[list[int], list[int]],
    actions: list[tuple[str, int, int]],
    stops: list[str],
    ends_with_eos: bool,
) -> None:
    asyncio.run(play(outputs, actions, stops, ends_with_eos))


async def play(
    outputs: tuple[list[int], list[int]], actions: list[tuple[str, int, int]], stops: list[str], ends_with_eos: bool
) -> None:
    backend = tiny_tokenizers.byte_level()
    submit = scheduler_pb2.Submit(
        request_id="job",
        token_ids=[5],
        sampling=inference_pb2.SamplingParams(n=2),
        stop=inference_pb2.StopParams(max_tokens=40, stop=stops),
    )
    tokenizer = Tokenizer(tiny_tokenizers.as_transformers(backend))
    link = NoLink()
    generation = Generation(link, tokenizer, frozenset([EOS]), 1 << 20, request_id="job", submit=submit)
    truth = [output + [EOS] * ends_with_eos for output in outputs]
    told = [0, 0]
    responses: list[inference_pb2.GenerateResponse] = []
    for kind, first, second in actions:
        if kind == "tokens":
            for token_id in truth[first][told[first] : told[first] + second]:
                generation.token(first, token_id, None)
                told[first] += 1
        elif kind == "break":  # the scheduler may remember a little less, or have gone on meanwhile
            for index, change in enumerate((first, second)):
                told[index] = max(0, min(len(truth[index]), told[index] + change - 2))
            states = [scheduler_pb2.SequenceState(token_ids=truth[i][: told[i]]) for i in (0, 1)]
            generation.attached(scheduler_pb2.StreamAttached(request=submit, sequences=states))
            generation.acknowledged = True
        else:
            responses += await read_all(generation)
    reason = STOP if ends_with_eos else LENGTH
    for index in (0, 1):
        for token_id in truth[index][told[index] :]:
            generation.token(index, token_id, None)
        generation.finished(index, inference_pb2.Finish(reason=reason))
    responses += await read_all(generation)
    assert generation.done
    assert await generation.next() is None
    tokenizer.close()
    for index in (0, 1):
        check_one(backend.decode(outputs[index]), truth[index], stops, [r for r in responses if r.index == index])


def check_one(whole: str, truth: list[int], stops: list[str], responses: list[inference_pb2.GenerateResponse]) -> None:
    delivered: list[int] = []
    for response in responses:
        assert response.first_token == len(delivered)
        delivered += response.token_ids
    text = "".join(response.text for response in responses)
    assert [response.HasField("finish") for response in responses] == [False] * (len(responses) - 1) + [True]
    finish = responses[-1].finish
    assert finish.usage.completion_tokens == len(delivered)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if ends:
        assert text + finish.matched_stop == whole[: min(ends)]
        assert delivered == truth[: len(delivered)]
        assert finish.reason == STOP
    else:
        assert (text, delivered, finish.matched_stop) == (whole, truth, "")
