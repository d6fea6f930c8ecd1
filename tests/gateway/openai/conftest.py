"""A gateway with its HTTP door open."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.conftest import MakeWorld, World

MakeDoor = MakeWorld


@pytest.fixture
def make_door(make_world: MakeWorld) -> MakeDoor:
    """Makes a world whose gateway serves HTTP on a free port."""

    async def make(tokenizer: Any = "byte-level", **settings: Any) -> World:
        return await make_world(tokenizer, **{"http_listen": "127.0.0.1:0", **settings})

    return make


@pytest.fixture
async def door(make_door: MakeDoor) -> World:
    """With a byte-level tokenizer and default settings."""
    return await make_door()


def address(world: World) -> str:
    """Where the world's HTTP door is."""
    assert world.gateway.http_address is not None
    return world.gateway.http_address
