"""WatchBlocks over real sockets: snapshots, changes, slow watchers, limits, and the end of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from pagewire.v1 import control_pb2, control_pb2_grpc
from scheduler.block_watch import BlockWatch
from scheduler.duplex import Refusal
from tests.scheduler.peers import LIMIT_S, Pool, capacity, pool, status_of

KV_POOL, HOST_ARENA = control_pb2.BLOCK_MEMORY_KV_POOL, control_pb2.BLOCK_MEMORY_HOST_ARENA


class Follower:
    """A client by the letter of control.proto."""

    def __init__(self) -> None:
        self.messages = 0
        self.pools: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.owners: dict[int, tuple[str, int]] = {}
        self.loads = control_pb2.GetLoadsResponse()

    def apply(self, message: control_pb2.WatchBlocksResponse) -> None:
        assert message.snapshot == (self.messages == 0)
        self.messages += 1
        for worker in message.gone_workers:
            self.pools = {name: cells for name, cells in self.pools.items() if name[0] != worker}
        self.owners.update({owner.number: (owner.request_id, owner.index) for owner in message.owners})
        for change in message.pools:
            if change.whole:
                self.pools[change.worker_id, change.memory] = [(0, 0)] * change.total_blocks
            cells, end = self.pools[change.worker_id, change.memory], 0
            for skip, length, *cell in zip(change.skips, change.lengths, change.owners, change.references, strict=True):
                first, end = end + skip, end + skip + length
                cells[first:end] = [tuple(cell)] * length  # type: ignore[list-item]
        for number in message.ended_owners:
            del self.owners[number]
        self.loads = message.loads

    async def until(self, call: Any, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                message = await call.read()
                assert message is not grpc.aio.EOF, await call.details()
                self.apply(message)

    def held_by(self, request_id: str, memory: int = KV_POOL) -> list[int]:
        """Blocks whose owner is a sequence of that request."""
        return [
            block
            for (_, where), cells in self.pools.items()
            for block, (owner, _) in enumerate(cells)
            if where == memory and owner >= 16 and self.owners[owner][0] == request_id
        ]


def watch(made: Pool, **fields: int) -> Any:
    return control_pb2_grpc.ControlServiceStub(made.channel).WatchBlocks(control_pb2.WatchBlocksRequest(**fields))


async def test_a_watcher_sees_blocks_taken_shared_cached_and_a_worker_leave() -> None:
    async with pool(watch_interval_ms=10, watermark=0) as made:
        seen = Follower()
        call = watch(made, max_requests=10)
        await seen.until(call, lambda: seen.messages)
        assert seen.pools == {}
        worker, gateway = await made.worker(), await made.gateway()
        await seen.until(call, lambda: seen.pools)
        assert seen.pools == {("w1", KV_POOL): [(0, 0)] * 256, ("w1", HOST_ARENA): [(0, 0)] * 16}
        await gateway.submit(1, [11] * 9, max_tokens=30, n=2, request_id="pair")
        await worker.step()
        await worker.step()
        await seen.until(call, lambda: len(seen.held_by("pair")) >= 4)
        assert sorted(index for _, index in seen.owners.values()) == [0, 1]
        counts = [count for owner, count in seen.pools["w1", KV_POOL] if owner >= 16]
        assert counts.count(2) == 2, "the prompt's two full blocks are shared"
        (row,) = seen.loads.requests
        assert (row.request_id, row.blocks) == ("pair", len(counts))
        worker.run()
        await gateway.finish(1, 2)
        await seen.until(call, lambda: not seen.owners)
        assert {owner for owner, _ in seen.pools["w1", KV_POOL]} == {0, 1}, "free or cached"
        await worker.stop()
        await seen.until(call, lambda: not seen.pools)
        call.cancel()


async def test_a_watcher_who_comes_late_gets_a_snapshot_of_the_same_state() -> None:
    async with pool(watch_interval_ms=10) as made:
        worker, gateway = await made.worker(), await made.gateway()
        early, late = Follower(), Follower()
        first = watch(made)
        await early.until(first, lambda: early.pools)
        await gateway.submit(1, [11] * 20, max_tokens=8, request_id="a")
        await worker.step()
        await early.until(first, lambda: early.held_by("a"))
        second = watch(made)
        await late.until(second, lambda: late.messages)
        await early.until(first, lambda: early.pools == late.pools)
        assert early.owners == late.owners
        assert late.messages == 1
        worker.run()
        await gateway.finish(1)
        first.cancel()
        second.cancel()


async def test_fifty_thousand_blocks_in_use_are_a_small_message() -> None:
    async with pool(watch_interval_ms=10) as made:
        worker, gateway = await made.worker(capacity=capacity(num_blocks=50_000)), await made.gateway()
        for stream in range(1, 33):
            await gateway.submit(stream, [stream, *[11] * 400], max_tokens=60)
        while len(worker.rows) < 32:
            await worker.step()
        call, seen = watch(made), Follower()
        message = await call.read()
        seen.apply(message)
        assert sum(owner >= 16 for owner, _ in seen.pools["w1", KV_POOL]) > 3000
        assert message.ByteSize() < 10_000
        call.cancel()
        worker.run()
        await gateway.finish(*range(1, 33))


class SlowContext:
    """A call whose client does not read: a write ends when the test says so."""

    def __init__(self) -> None:
        self.written: list[control_pb2.WatchBlocksResponse] = []
        self.begun = asyncio.Event()
        self.taken = asyncio.Event()

    async def write(self, raw: bytes) -> None:
        self.written.append(control_pb2.WatchBlocksResponse.FromString(raw))
        self.begun.set()
        await self.taken.wait()


async def test_a_slow_watcher_holds_one_message_and_then_gets_the_newest_state_at_once() -> None:
    async with pool(watch_interval_ms=10) as made:
        worker, gateway = await made.worker(), await made.gateway()
        context, seen = SlowContext(), Follower()
        watching = BlockWatch(made.serving.engine)
        task = asyncio.create_task(watching.serve(control_pb2.WatchBlocksRequest(), context))
        await context.begun.wait()
        worker.run()
        for stream in range(1, 9):
            await gateway.submit(stream, [stream] * 20, max_tokens=9)
            await gateway.finish(stream)
        assert len(context.written) == 1
        context.begun.clear()
        context.taken.set()
        await context.begun.wait()
        for message in context.written:
            seen.apply(message)
        cached = sum(owner == 1 for owner, _ in seen.pools["w1", KV_POOL])
        assert cached == made.serving.engine.loads().loads[0].cached_blocks > 0
        assert seen.owners == {}, "who has come and gone meanwhile is not mentioned"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nothing_is_kept_while_nobody_watches() -> None:
    async with pool(watch_interval_ms=10) as made:
        await made.worker()
        context = SlowContext()
        watching = BlockWatch(made.serving.engine)
        task = asyncio.create_task(watching.serve(control_pb2.WatchBlocksRequest(), context))
        await context.begun.wait()
        assert watching.num_pictures == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert watching.num_pictures == 0


async def test_too_many_watchers_are_refused() -> None:
    async with pool(max_watchers=1) as made:
        first = watch(made)
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError, match="which is the limit") as caught:
            await watch(made).read()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_a_truncated_request_is_an_invalid_argument() -> None:
    async with pool() as made:
        call = made.channel.unary_stream("/pagewire.v1.ControlService/WatchBlocks")(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_scheduler_that_stops_tells_its_watchers() -> None:
    async with pool(watch_interval_ms=10) as made:
        call = watch(made)
        await call.read()
        made.serving.engine.shut_down()
        assert await status_of(call) == (grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down")


async def test_a_watch_leaves_the_loop_to_others_when_pictures_take_long() -> None:
    async with pool(watch_interval_ms=10) as made:
        engine = made.serving.engine
        times = iter(range(0, 10**12, 5_000_000))  # each look at the clock is 5 ms after the one before
        engine.clock = lambda: next(times)
        watching, context = BlockWatch(engine), SlowContext()
        context.taken.set()
        task = asyncio.create_task(watching.serve(control_pb2.WatchBlocksRequest(), context))
        await context.begun.wait()
        assert watching.next_at >= 250_000_000
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.shut_down()
        with pytest.raises(Refusal):
            await watching.serve(control_pb2.WatchBlocksRequest(), context)
