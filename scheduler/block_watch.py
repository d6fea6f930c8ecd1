"""WatchBlocks: who looks at the blocks, and how often a picture is taken for them.

Nothing runs here while nobody watches. All watchers share the newest picture. Each keeps the picture that it was told
last and gets what leads from there to the newest one as soon as gRPC has taken its last message: so a slow one holds
one old picture and one message, however much has happened since.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from pagewire.v1 import control_pb2
from scheduler import codec
from scheduler.block_picture import Painter, Picture, changes
from scheduler.duplex import Refusal
from scheduler.metrics import NS_PER_S

if TYPE_CHECKING:
    from scheduler.engine import Engine

LARGEST_SHARE = 0.02
"""Of the event loop's time that pictures may take."""
QUIET_NS = NS_PER_S
"""A watcher is told something at least that often, so that it can tell a quiet scheduler from a lost one."""


class BlockWatch:
    """Serves the streams of one scheduler."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._interval_ns = round(engine.settings.watch_interval_ms * 1e6)
        self._num_watchers = 0
        self._painter = Painter()
        self._newest: Picture | None = None
        self._taken_at = 0
        self._cost_ns = 0  # of the newest picture and of telling it so far
        self._told: tuple[Picture | None, Picture, control_pb2.WatchBlocksResponse] | None = None

    async def serve(self, request: control_pb2.WatchBlocksRequest, context: Any) -> None:
        """Writes messages until the watcher leaves or the scheduler stops. Raises Refusal."""
        limit = self._engine.settings.max_watchers
        if self._num_watchers >= limit:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._num_watchers} streams watch the blocks, which is the limit (max_watchers)",
                reason="TOO_MANY_WATCHERS",
            )
        self._num_watchers += 1
        try:
            await self._follow(request, context)
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                self._painter, self._newest, self._told = Painter(), None, None

    async def _follow(self, request: control_pb2.WatchBlocksRequest, context: Any) -> None:
        engine = self._engine
        own_interval_ns = min(request.min_interval_ms, 60_000) * 1_000_000
        before: Picture | None = None
        told_at = 0
        while not engine.shutting_down:
            now = engine.clock()
            picture = self._picture(now)
            message = self._message(before, picture)
            busy = message.pools or engine.live
            if before is None or busy or message.gone_workers or now - told_at >= QUIET_NS:
                response = control_pb2.WatchBlocksResponse()
                response.CopyFrom(message)
                response.loads.CopyFrom(engine.loads(request.max_requests))
                before, told_at = picture, now
                raw = response.SerializeToString()
                self._cost_ns += engine.clock() - now
                await context.write(raw)
            due = max(self.next_at, now + own_interval_ns)
            await asyncio.sleep(max(1_000_000, due - engine.clock()) / NS_PER_S)
        raise Refusal(grpc.StatusCode.UNAVAILABLE, "the scheduler is shutting down", reason="SHUTTING_DOWN")

    @property
    def num_pictures(self) -> int:
        """Pictures that are kept here; those that watchers were told last not counted."""
        return int(self._newest is not None)

    @property
    def next_at(self) -> int:
        """When the next picture may be taken."""
        return self._taken_at + max(self._interval_ns, round(self._cost_ns / LARGEST_SHARE))

    def _picture(self, now: int) -> Picture:
        """The newest picture; a new one if it is time."""
        if self._newest is None or now >= self.next_at:
            self._newest = self._painter.paint(self._engine.dispatcher.schedulers)
            self._taken_at, self._cost_ns = now, 0
        return self._newest

    def _message(self, before: Picture | None, picture: Picture) -> control_pb2.WatchBlocksResponse:
        """What leads from one picture to another. Watchers who keep up all ask for the same, which is made once."""
        if self._told is not None and self._told[0] is before and self._told[1] is picture:
            return self._told[2]
        message = codec.encode_block_changes(changes(before or Picture(), picture), snapshot=before is None)
        self._told = before, picture, message
        return message
