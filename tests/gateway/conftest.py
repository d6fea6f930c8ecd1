"""A gateway in this process with a scheduler that the test plays, and plain channels to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from gateway.config import GatewaySettings
from gateway.server import Gateway
from gateway.tokenizer import Tokenizer
from pagewire.runtime.errors import StartError
from pagewire.v1 import inference_pb2_grpc
from tests.gateway import tiny_tokenizers
from tests.gateway.fake_scheduler import LIMIT_S, FakeScheduler


@dataclass
class World:
    """A gateway, its scheduler and a client's channel."""

    scheduler: FakeScheduler
    gateway: Gateway
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        """InferenceService as a plain client sees it."""
        return inference_pb2_grpc.InferenceServiceStub(self.channel)


MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def make_world() -> AsyncIterator[MakeWorld]:
    """Makes a world; settings and the tokenizer (None: none) can be given."""
    worlds: list[World] = []

    async def make(tokenizer: Any = "byte-level", *, wait: bool = True, **settings: Any) -> World:
        scheduler = FakeScheduler()
        await scheduler.start()
        if tokenizer == "byte-level":
            tokenizer = tiny_tokenizers.as_transformers(tiny_tokenizers.byte_level())
        configured = GatewaySettings(
            scheduler=scheduler.address, listen="127.0.0.1:0", stop_grace_s=0.0, default_max_tokens=64, **settings
        )
        gateway = Gateway(configured, None if tokenizer is None else Tokenizer(tokenizer))
        try:
            await gateway.start()
        except StartError:
            await gateway.stop()
            await scheduler.stop()
            raise
        if wait:
            async with asyncio.timeout(LIMIT_S):
                await gateway.wait_ready()
        world = World(scheduler, gateway, grpc.aio.insecure_channel(gateway.address))
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        await world.channel.close()
        await world.gateway.stop()
        await world.scheduler.stop()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """A world with a byte-level tokenizer and default settings."""
    return await make_world()


MakeDoor = MakeWorld


@pytest.fixture
def make_door(make_world: MakeWorld) -> MakeDoor:
    """Makes a world whose gateway serves HTTP on a free port too."""

    async def make(tokenizer: Any = "byte-level", **settings: Any) -> World:
        return await make_world(tokenizer, **{"http_listen": "127.0.0.1:0", **settings})

    return make


@pytest.fixture
async def door(make_door: MakeDoor) -> World:
    """A world with all three doors, a byte-level tokenizer and default settings."""
    return await make_door()


def address(world: World) -> str:
    """Where the world's HTTP door is."""
    assert world.gateway.http_address is not None
    return world.gateway.http_address
