"""Attach, and what clients notice when the session to the scheduler breaks."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from pagewire.v1 import inference_pb2, scheduler_pb2
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.fake_scheduler import LIMIT_S
from tests.gateway.test_generate import LENGTH, STOP, ask, letters, refusal, rest


def attach(world: World, *positions: tuple[int, int], request_id: str = "job") -> Any:
    wanted = [inference_pb2.SequencePosition(index=index, first_token=first) for index, first in positions]
    return world.stub.Attach(inference_pb2.AttachRequest(request_id=request_id, positions=wanted))


def submitted(n: int = 1, **stop: Any) -> scheduler_pb2.Submit:
    """What the scheduler says was submitted by somebody, some time."""
    return scheduler_pb2.Submit(
        request_id="job",
        token_ids=[5, 6, 7],
        sampling=inference_pb2.SamplingParams(n=n, seed=1),
        stop=inference_pb2.StopParams(max_tokens=50, **stop),
    )


async def test_attach_gives_everything_from_the_beginning_and_goes_on(world: World) -> None:
    call = attach(world)
    message = await world.scheduler.expect("attach")
    assert message.request_id == "job"
    s = message.stream
    world.scheduler.answer_attach(s, submitted(), [letters("abc")])
    first = await call.read()
    assert (first.first_token, first.text, first.prompt.prompt_tokens) == (0, "abc", 3)
    world.scheduler.step([(s, letters("d")[0])], finished=[(s, 4, LENGTH)])
    (last,) = await rest(call)
    assert (last.first_token, last.text, last.finish.reason) == (3, "d", LENGTH)


async def test_attach_from_a_position_gives_the_text_of_the_tokens_from_there_on(world: World) -> None:
    call = attach(world, (0, 2), (1, 1))
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(n=2), [letters("abÃ©"), letters("xyz")])
    world.scheduler.step(finished=[(s, 4, LENGTH), (s + 1, 3, LENGTH)])
    responses = await rest(call)
    first_of = {index: next(r.first_token for r in responses if r.index == index) for index in (0, 1)}
    assert first_of == {0: 2, 1: 1}
    text = {index: "".join(r.text for r in responses if r.index == index) for index in (0, 1)}
    assert text == {0: "é", 1: "yz"}


async def test_a_finished_request_can_be_read_again_to_its_end_only(world: World) -> None:
    call = attach(world, (0, 3))
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(), [letters("abc")], finished=True)
    (only,) = await rest(call)
    assert (only.first_token, list(only.token_ids), only.finish.reason) == (3, [], LENGTH)
    call = attach(world, (0, 4))
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(), [letters("abc")], finished=True)
    assert [field for field, _ in (await refusal(call)).violations] == ["positions[0].first_token"]


async def test_a_position_that_is_still_to_come_is_waited_for(world: World) -> None:
    call = attach(world, (0, 2))
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(), [letters("a")])
    world.scheduler.step([(s, token) for token in letters("bc")], finished=[(s, 3, LENGTH)])
    (only,) = await rest(call)
    assert (only.first_token, only.text) == (2, "c")


@pytest.mark.parametrize(
    ("positions", "path"), [([(0, 51)], "positions[0].first_token"), ([(0, 0), (1, 0)], "positions[1].index")]
)
async def test_positions_that_can_never_come_are_refused(
    world: World, positions: list[tuple[int, int]], path: str
) -> None:
    call = attach(world, *positions)
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(), [letters("a")])
    details = await refusal(call)
    assert (details.code.name, [field for field, _ in details.violations]) == ("INVALID_ARGUMENT", [path])
    assert (await world.scheduler.expect("detach")).stream == s


async def test_malformed_attaches_never_reach_the_scheduler(world: World) -> None:
    for call in (attach(world, request_id=""), attach(world, (0, 1), (0, 2)), attach(world, *[(0, 0)] * 129)):
        assert (await refusal(call)).code == grpc.StatusCode.INVALID_ARGUMENT
    assert world.scheduler.said_nothing_more()


async def test_an_unknown_request_is_not_found(world: World) -> None:
    call = attach(world)
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.fail(s, grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    details = await refusal(call)
    assert (details.code.name, details.reason) == ("NOT_FOUND", "REQUEST_NOT_FOUND")


async def test_a_stop_string_in_the_snapshot_ends_the_sequence_there(world: World) -> None:
    call = attach(world)
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(stop=["b"]), [letters("abcd")])
    assert (await world.scheduler.expect("stop")).num_tokens == 2
    world.scheduler.step(finished=[(s, 2, STOP)])
    responses = await rest(call)
    assert "".join(response.text for response in responses) == "a"
    assert sum(len(response.token_ids) for response in responses) == 2


async def test_a_long_snapshot_comes_in_parts_and_does_not_count_as_slow(make_world: MakeWorld) -> None:
    world = await make_world(stream_buffer_bytes=1024)
    call = attach(world)
    s = (await world.scheduler.expect("attach")).stream
    request = submitted()
    request.stop.max_tokens = 4000
    world.scheduler.answer_attach(s, request, [[9] * 3000], finished=True)
    responses = await rest(call)
    assert [len(response.token_ids) for response in responses[:3]] == [1024, 1024, 952]
    assert [response.first_token for response in responses[:3]] == [0, 1024, 2048]


async def test_streams_continue_without_gap_or_repeat_after_the_session_breaks(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job"))
    submit = await world.scheduler.expect("submit")
    s = submit.stream
    world.scheduler.step([(s, token) for token in letters("abÃ")], admitted={s: 3})
    first = await call.read()
    assert (first.text, len(first.token_ids)) == ("ab", 3)
    world.scheduler.break_session()
    message = await world.scheduler.expect("attach")
    assert message.request_id == "job"
    s = message.stream
    world.scheduler.answer_attach(s, submit, [letters("abÃ©c")])
    second = await call.read()
    assert (second.first_token, second.text, list(second.token_ids)) == (3, "éc", letters("©c"))
    assert not second.HasField("prompt")
    world.scheduler.step([(s, letters("d")[0])], finished=[(s, 6, LENGTH)])
    (last,) = await rest(call)
    assert (last.first_token, last.text, last.finish.usage.completion_tokens) == (5, "d", 6)


async def test_tokens_told_again_after_a_break_are_not_repeated(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job"))
    submit = await world.scheduler.expect("submit")
    world.scheduler.step([(submit.stream, token) for token in letters("abc")], admitted={submit.stream: 3})
    await call.read()
    world.scheduler.break_session()
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submit, [letters("a")])  # a scheduler that remembers less computes it again
    world.scheduler.step([(s, token) for token in letters("bcd")], finished=[(s, 4, LENGTH)])
    (last,) = await rest(call)
    assert (last.first_token, last.text) == (3, "d")


async def test_a_stop_that_was_lost_with_the_session_is_said_again(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job", stop=inference_pb2.StopParams(stop=["b"])))
    submit = await world.scheduler.expect("submit")
    world.scheduler.step([(submit.stream, token) for token in letters("ab")], admitted={submit.stream: 3})
    assert (await world.scheduler.expect("stop")).num_tokens == 2
    world.scheduler.break_session()
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submit, [letters("abcd")])
    again = await world.scheduler.expect("stop")
    assert (again.stream, again.num_tokens) == (s, 2)
    world.scheduler.step(finished=[(s, 2, STOP)])
    assert (await rest(call))[-1].finish.matched_stop == "b"


async def test_a_submit_that_the_scheduler_never_heard_of_is_sent_once_more(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job"))
    submit = await world.scheduler.expect("submit")
    world.scheduler.break_session()
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.fail(s, grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    again = await world.scheduler.expect("submit")
    assert (again.request_id, again.sampling.seed) == ("job", submit.sampling.seed)
    world.scheduler.step([(again.stream, 9)], admitted={again.stream: 3}, finished=[(again.stream, 1, LENGTH)])
    assert (await rest(call))[-1].finish.reason == LENGTH


async def test_a_request_that_a_restarted_scheduler_has_forgotten_ends_as_unavailable(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job"))
    s = (await world.scheduler.expect("submit")).stream
    world.scheduler.step([(s, 9)], admitted={s: 3})
    await call.read()
    world.scheduler.break_session()
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.fail(s, grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    details = await refusal(call)
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "REQUEST_LOST")
    assert details.retry_after_ns > 0


async def test_a_name_taken_by_another_request_does_not_show_its_tokens_after_a_break(world: World) -> None:
    call = world.stub.Generate(ask(request_id="job"))
    await world.scheduler.expect("submit")
    world.scheduler.break_session()  # the refusal was lost with the session
    s = (await world.scheduler.expect("attach")).stream
    world.scheduler.answer_attach(s, submitted(), [letters("secret")])
    assert (await refusal(call)).code == grpc.StatusCode.ALREADY_EXISTS
    assert (await world.scheduler.expect("detach")).stream == s


async def test_streams_end_as_unavailable_when_the_scheduler_does_not_come_back(make_world: MakeWorld) -> None:
    world = await make_world(reattach_timeout_s=0.2)
    call = world.stub.Generate(ask())
    await world.scheduler.expect("submit")
    await world.scheduler.stop()
    details = await refusal(call)
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "NO_SCHEDULER")
    details = await refusal(world.stub.Generate(ask()))
    assert (details.code.name, details.reason) == ("UNAVAILABLE", "NO_SCHEDULER")
    await world.scheduler.start()
    async with asyncio.timeout(LIMIT_S):
        while not (await world.stub.ListModels(inference_pb2.ListModelsRequest())).models[0].ready:
            pass
    call = world.stub.Generate(ask())
    submit = await world.scheduler.expect("submit")
    world.scheduler.step([(submit.stream, 9)], admitted={submit.stream: 3}, finished=[(submit.stream, 1, LENGTH)])
    assert (await rest(call))[-1].finish.reason == LENGTH


async def test_a_client_that_leaves_while_the_session_is_down_is_not_attached_again(world: World) -> None:
    call = world.stub.Generate(ask(request_id="leaves"))
    await world.scheduler.expect("submit")
    other = world.stub.Generate(ask(request_id="stays"))
    await world.scheduler.expect("submit")
    await world.scheduler.stop()
    call.cancel()
    async with asyncio.timeout(LIMIT_S):
        while world.gateway.link.live_requests > 1:
            await world.stub.ListModels(inference_pb2.ListModelsRequest())
    await world.scheduler.start()
    assert (await world.scheduler.expect("attach")).request_id == "stays"
    assert world.scheduler.said_nothing_more()
    other.cancel()
