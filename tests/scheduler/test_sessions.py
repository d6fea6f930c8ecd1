"""What a gateway sees of its requests."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest

from pagewire.v1 import inference_pb2, scheduler_pb2, scheduler_pb2_grpc
from tests.scheduler.peers import EOS, VOCAB_SIZE, FakeGateway, Pool, expected, next_token, pool, submission


async def test_a_request_streams_its_tokens_between_admission_and_finish() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(5, [11, 12, 13], max_tokens=6)
        assert await gateway.finish(5) == [expected([11, 12, 13], 6)]
        heard = gateway.on(5)
        assert heard.admitted is not None
        assert heard.admitted.prompt.prompt_tokens == 3
        assert heard.finished is not None
        assert heard.finished.num_tokens == 6
        assert heard.finish.reason == inference_pb2.FINISH_REASON_LENGTH
        assert heard.finish.usage.prompt_tokens == 3
        assert heard.finish.usage.completion_tokens == 6
        assert heard.finish.usage.total_ns >= heard.finish.usage.first_token_ns > 0


async def test_the_end_of_sequence_token_ends_a_sequence_unless_it_is_ignored() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.sample = lambda history, index: EOS if len(history) == 5 else 50
        worker.run()
        await gateway.submit(1, [11, 12, 13], max_tokens=6, ignore_eos=False)
        await gateway.submit(2, [14, 12, 13], max_tokens=6, ignore_eos=True)
        assert await gateway.finish(1, 2) == [[50, 50, EOS], [50, 50, EOS, 50, 50, 50]]
        assert gateway.on(1).finish.reason == inference_pb2.FINISH_REASON_STOP
        assert gateway.on(1).finish.matched_token_id == EOS
        assert gateway.on(2).finish.reason == inference_pb2.FINISH_REASON_LENGTH


async def test_a_step_reaches_a_session_as_one_message_with_the_tokens_of_all_its_streams() -> None:
    async with pool() as made:
        worker, gateway, other = await made.worker(), await made.gateway(), await made.gateway()
        for stream in range(16):
            await gateway.submit(stream, [20 + stream], max_tokens=4)
        await other.submit(3, [90], max_tokens=4, request_id="theirs")
        await made_live(made, 17)
        # Whatever the first plan took in, from the second on everything decodes together.
        while len(worker.decode_set) < 17:
            await worker.step()
        await gateway.until(lambda: all(gateway.on(stream).tokens for stream in range(16)))
        count = len(gateway.steps)
        await worker.step()
        step = await gateway.step()
        assert len(gateway.steps) == count + 1
        assert sorted(step.streams) == list(range(16))
        worker.run()
        assert await gateway.finish(*range(16)) == [expected([20 + stream], 4) for stream in range(16)]
        assert await other.finish(3) == [expected([90], 4)]
        assert set(other.heard) == {3}


async def made_live(made: Pool, count: int) -> None:
    """Waits until the scheduler knows that many live requests."""
    while len(made.serving.engine.live) < count:
        await asyncio.sleep(0)


async def test_without_credit_steps_are_merged_and_sent_when_credit_comes() -> None:
    async with pool() as made:
        worker = await made.worker()
        gateway = await made.gateway(credit=1, gives_credit=False)
        await gateway.submit(1, [11, 12], max_tokens=30)
        await gateway.step()
        for _ in range(25):
            await worker.step()
        while made.serving.engine.metrics.generation_tokens < 25:
            await asyncio.sleep(0)
        assert len(gateway.steps) == 1
        await gateway.send(credit=scheduler_pb2.SessionCredit(steps=1))
        merged = await gateway.step()
        assert list(merged.token_ids) == expected([11, 12], 30)[: len(merged.token_ids)]
        assert len(merged.token_ids) >= 24
        gateway.gives_credit = True
        await gateway.send(credit=scheduler_pb2.SessionCredit(steps=4))
        worker.run()
        assert await gateway.finish(1) == [expected([11, 12], 30)]


async def test_a_session_that_lets_too_much_wait_is_ended_and_its_requests_go_on() -> None:
    async with pool(session_backlog_tokens=1024) as made:
        worker = await made.worker()
        slow = await made.gateway(credit=1, gives_credit=False)
        worker.run()
        for stream in range(8):
            await slow.submit(stream, [11 + stream], max_tokens=400)
        await slow.step()
        assert await slow.status() == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "more than 1024 tokens waited for this session's credit",
        )
        gateway = await made.gateway()
        await gateway.attach(100, "r0")
        assert await gateway.finish(100) == [expected([11], 400)]


async def test_parallel_samples_have_a_stream_number_each() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(10, [11, 12, 13, 14, 15], max_tokens=5, n=3)
        prompt = [11, 12, 13, 14, 15]
        assert await gateway.finish(10, 11, 12) == [expected(prompt, 5, index) for index in range(3)]
        assert gateway.on(11).admitted is None


async def test_logprobs_travel_with_the_tokens_they_belong_to() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11, 12], max_tokens=4)
        await gateway.submit(2, [13, 12], max_tokens=4, logprobs=1)
        tokens, with_logprobs = await gateway.finish(1, 2)
        assert tokens == expected([11, 12], 4)
        assert gateway.on(1).logprobs == []
        assert [list(one.top_ids) for one in gateway.on(2).logprobs] == [[token] for token in with_logprobs]
        assert gateway.on(2).finish.cumulative_logprob == pytest.approx(-sum(with_logprobs) / VOCAB_SIZE, rel=1e-5)


async def test_attaching_in_mid_stream_gives_everything_so_far_and_then_the_rest() -> None:
    async with pool() as made:
        worker, first, second = await made.worker(), await made.gateway(), await made.gateway()
        await first.submit(1, [11, 12, 13], max_tokens=10)
        await worker.step()
        await worker.step()
        await first.until(lambda: len(first.on(1).tokens) == 2)
        await second.attach(40, "r1")
        await second.until(lambda: second.on(40).attached)
        attached = second.on(40).attached
        assert attached is not None
        assert list(attached.request.token_ids) == [11, 12, 13]
        assert attached.request.request_id == "r1"
        assert attached.prompt.prompt_tokens == 3
        assert list(attached.sequences[0].token_ids) == expected([11, 12, 13], 2)
        worker.run()
        assert await first.finish(1) == await second.finish(40) == [expected([11, 12, 13], 10)]
        assert second.on(40).finish == first.on(1).finish


async def test_attaching_after_the_end_gives_everything_at_once() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11, 12], max_tokens=5, n=2)
        await gateway.finish(1, 2)
        await gateway.attach(50, "r1")
        await gateway.until(lambda: gateway.on(50).attached)
        attached = gateway.on(50).attached
        assert attached is not None
        states = attached.sequences
        assert [list(state.token_ids) for state in states] == [expected([11, 12], 5, index) for index in range(2)]
        assert [state.finish.reason for state in states] == [inference_pb2.FINISH_REASON_LENGTH] * 2


async def test_a_finished_request_is_forgotten_after_its_retention() -> None:
    async with pool(retention_s=0.01) as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11, 12], max_tokens=2)
        await gateway.finish(1)
        while made.serving.engine.dispatcher.find("r1") is not None:
            await asyncio.sleep(0.005)
        await gateway.attach(50, "r1")
        await gateway.finish(50)
        assert_failed(gateway, 50, grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")


def assert_failed(gateway: FakeGateway, stream: int, code: grpc.StatusCode, reason: str) -> None:
    failed = gateway.on(stream).failed
    assert failed is not None
    assert (failed.code, failed.reason) == (code.value[0], reason)
    assert failed.message


async def test_when_the_last_listener_detaches_the_request_is_cancelled() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11, 12], max_tokens=100)
        await worker.step()
        await gateway.until(lambda: gateway.on(1).tokens)
        await gateway.attach(20, "r1")
        await gateway.until(lambda: gateway.on(20).attached)
        group = made.serving.engine.dispatcher.find("r1")
        assert group is not None
        await gateway.send(detach=scheduler_pb2.DetachStream(stream=1))
        while len(group.listeners) > 1:
            await asyncio.sleep(0)
        await worker.step()
        await gateway.until(lambda: len(gateway.on(20).tokens) == 2)
        await gateway.send(detach=scheduler_pb2.DetachStream(stream=20))
        worker.run()
        while made.serving.engine.live:
            await asyncio.sleep(0)
        assert group.sequences[0].finish is not None
        assert group.sequences[0].finish.reason.value == "cancelled"
        assert len(gateway.on(1).tokens) == 1


async def test_a_detached_request_goes_on_without_a_listener() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11, 12], max_tokens=20, detached=True)
        await worker.step()
        await gateway.send(detach=scheduler_pb2.DetachStream(stream=1))
        worker.run()
        await gateway.attach(2, "r1")
        await gateway.until(lambda: gateway.on(2).attached)
        attached = gateway.on(2).attached
        assert attached is not None
        if not attached.sequences[0].HasField("finish"):
            await gateway.finish(2)
        assert gateway.on(2).tokens == expected([11, 12], 20)


async def test_abort_ends_a_request_for_all_its_listeners() -> None:
    async with pool() as made:
        worker, first, second = await made.worker(), await made.gateway(), await made.gateway()
        await first.submit(1, [11, 12], max_tokens=100)
        await worker.step()
        await first.until(lambda: first.on(1).tokens)
        await second.attach(7, "r1")
        await second.until(lambda: second.on(7).attached)
        assert await made.abort("r1") is True
        await first.finish(1)
        await second.finish(7)
        assert first.on(1).finish.reason == second.on(7).finish.reason == inference_pb2.FINISH_REASON_CANCELLED
        assert await made.abort("r1") is False
        assert await made.abort("nobody") is False


async def test_a_stop_string_ends_its_sequence_and_keeps_the_tokens_the_gateway_names() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11, 12], max_tokens=100, n=2)
        while len(worker.plans) < 4:
            await worker.step()
        await gateway.until(lambda: len(gateway.on(2).tokens) == 4)
        stop = scheduler_pb2.StopSequence(stream=2, num_tokens=3, matched_stop="STOP")
        await gateway.send(stop=stop)
        await gateway.until(lambda: gateway.on(2).finished)
        finish = gateway.on(2).finish
        assert (finish.reason, finish.matched_stop) == (inference_pb2.FINISH_REASON_STOP, "STOP")
        assert finish.usage.completion_tokens == 3
        assert gateway.on(1).finished is None
        worker.run()
        await gateway.finish(1)
        assert gateway.on(1).tokens == expected([11, 12], 100)


async def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11, 12], max_tokens=100, timeout_ns=30_000_000)
        await worker.next_plan()  # never answered: the deadline must not depend on the worker
        await gateway.finish(1)
        assert gateway.on(1).finish.reason == inference_pb2.FINISH_REASON_DEADLINE


async def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    async with pool(max_waiting=2, max_num_seqs=1) as made:
        await made.worker()
        gateway = await made.gateway()
        for stream in range(8):
            await gateway.submit(stream, [11], max_tokens=4)
        await gateway.until(lambda: gateway.on(7).failed)
        assert_failed(gateway, 7, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        failed = gateway.on(7).failed
        assert failed is not None
        assert failed.retry_after_ns > 0


async def test_the_same_name_again_is_refused_while_the_request_lives() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=50)
        await gateway.submit(2, [12], max_tokens=50, request_id="r1")
        await gateway.finish(2)
        assert_failed(gateway, 2, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS")
        worker.run()
        assert await gateway.finish(1) == [expected([11], 50)]


async def test_before_any_worker_has_joined_requests_are_refused() -> None:
    async with pool() as made:
        gateway = await made.gateway()
        assert gateway.states[-1].ready is False
        await gateway.submit(1, [11])
        await gateway.finish(1)
        assert_failed(gateway, 1, grpc.StatusCode.UNAVAILABLE, "NO_WORKER")


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"token_ids": []}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"token_ids": [VOCAB_SIZE]}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"token_ids": [11] * 512}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"request_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"request_id": "x" * 129}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"sampling": {"temperature": 0.5}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"sampling": {"temperature": 0, "n": 1_000_000}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        *(
            (
                {"sampling": {"temperature": 0, "beam_width": 2} | wrong},
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_SUBMIT",
            )
            for wrong in (
                {"temperature": 0.5, "seed": 1},
                {"n": 3},
                {"beam_width": VOCAB_SIZE + 1},
                {"length_penalty": math.inf},
                {"presence_penalty": 1},
                {"logit_bias": {5: 1.0}},
            )
        ),
        ({"stop": {"max_tokens": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
        ({"stop": {"max_tokens": 1, "stop_token_ids": [5000]}}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SUBMIT"),
    ],
)
async def test_what_the_core_relies_on_is_checked_on_this_side_of_the_wire_too(
    change: dict, code: grpc.StatusCode, reason: str
) -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        message = submission(1, [11, 12])
        for name in change:
            message.ClearField(name)
        message.MergeFrom(scheduler_pb2.Submit(**change))
        await gateway.send(submit=message)
        await gateway.submit(2, [13], max_tokens=3)
        assert await gateway.finish(2) == [expected([13], 3)]
        assert_failed(gateway, 1, code, reason)


async def test_max_tokens_is_cut_to_the_context() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        worker.run()
        await gateway.submit(1, [11] * 500, max_tokens=4_000_000_000)
        assert await gateway.finish(1) == [expected([11] * 500, 12)]
        assert gateway.on(1).finish.reason == inference_pb2.FINISH_REASON_LENGTH


async def test_the_requests_of_a_broken_session_can_be_taken_over_by_another() -> None:
    async with pool(orphan_s=60) as made:
        worker, first = await made.worker(), await made.gateway()
        await first.submit(1, [11, 12], max_tokens=30)
        await worker.step()
        await first.until(lambda: first.on(1).tokens)
        first.call.cancel()
        while len(made.serving.engine.sessions):
            await asyncio.sleep(0)
        await worker.step()
        second = await made.gateway()
        await second.attach(8, "r1")
        await second.until(lambda: second.on(8).attached)
        worker.run()
        assert await second.finish(8) == [expected([11, 12], 30)]


async def test_the_requests_of_a_broken_session_are_cancelled_when_nobody_comes_unless_detached() -> None:
    async with pool(orphan_s=0.01) as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11, 12], max_tokens=30)
        await gateway.submit(2, [13, 12], max_tokens=30, detached=True)
        await made_live(made, 2)
        gateway.call.cancel()
        while len(made.serving.engine.live) > 1:
            await asyncio.sleep(0.005)
        find = made.serving.engine.dispatcher.find
        lonely, detached = find("r1"), find("r2")
        assert lonely is not None
        assert lonely.sequences[0].finish is not None
        assert lonely.sequences[0].finish.reason.value == "cancelled"
        assert detached is not None
        assert not detached.is_finished
        worker.run()
        while made.serving.engine.live:
            await asyncio.sleep(0.005)
        assert detached.sequences[0].output == expected([13, 12], 30)


async def test_a_draining_scheduler_finishes_what_runs_and_takes_nothing_new() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(1, [11], max_tokens=20)
        await worker.step()
        assert made.serving.engine.drain(resume=False) == 1
        await gateway.until(lambda: gateway.states[-1].draining)
        await gateway.submit(2, [12])
        worker.run()
        assert await gateway.finish(1, 2) == [expected([11], 20), []]
        assert_failed(gateway, 2, grpc.StatusCode.UNAVAILABLE, "DRAINING")
        made.serving.engine.drain(resume=True)
        await gateway.until(lambda: not gateway.states[-1].draining)
        await gateway.submit(3, [12], max_tokens=2)
        assert await gateway.finish(3) == [expected([12], 2)]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (scheduler_pb2.SessionRequest(credit={"steps": 1}).SerializeToString(), grpc.StatusCode.INVALID_ARGUMENT),
        (
            scheduler_pb2.SessionRequest(hello={"protocol_version": 9, "credit": 1}).SerializeToString(),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (
            scheduler_pb2.SessionRequest(hello={"protocol_version": 1}).SerializeToString(),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_a_session_that_begins_wrongly_is_refused_by_name(raw: bytes, code: grpc.StatusCode) -> None:
    async with pool() as made:
        call = made.channel.stream_stream("/pagewire.v1.SchedulerService/Session")()
        await call.write(raw)
        assert await call.code() == code
        assert "Exception" not in await call.details()
        assert "Error" not in await call.details()


async def test_a_stream_number_that_is_in_use_ends_the_session_that_lost_count() -> None:
    async with pool() as made:
        worker, gateway = await made.worker(), await made.gateway()
        await gateway.submit(4, [11], n=4)
        await gateway.submit(6, [12])
        assert (await gateway.status())[0] == grpc.StatusCode.INVALID_ARGUMENT
        other = await made.gateway()
        worker.run()
        await other.attach(0, "r4")
        assert (await other.finish(0, 1, 2, 3))[3] == expected([11], 8, 3)


async def test_a_truncated_abort_is_an_invalid_argument() -> None:
    async with pool() as made:
        abort = made.channel.unary_unary("/pagewire.v1.SchedulerService/Abort")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await abort(b"\x0a\x05ab")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "4 bytes are not a AbortRequest"


async def test_too_many_sessions_are_refused() -> None:
    async with pool(max_sessions=1) as made:
        await made.gateway()
        call = scheduler_pb2_grpc.SchedulerServiceStub(made.channel).Session()
        await call.write(scheduler_pb2.SessionRequest(hello={"protocol_version": 1, "credit": 1}))
        assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_fake_model_depends_on_the_whole_history() -> None:
    assert next_token([1, 2], 0) != next_token([2, 2], 0)
    assert next_token([1, 2], 0) != next_token([1, 2], 1)
    assert EOS not in {next_token([1], index) for index in range(500)}
