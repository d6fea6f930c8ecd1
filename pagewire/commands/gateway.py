"""`pagewire gateway`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from pagewire.commands.extras import imports
from pagewire.runtime.settings import role_command

if TYPE_CHECKING:
    from gateway.config import GatewaySettings


def command() -> Callable[..., None]:
    """The command, with an option for each setting of a gateway."""
    from gateway.config import GatewaySettings

    return role_command(GatewaySettings, _serve)


def _serve(settings: GatewaySettings) -> Coroutine[Any, Any, None]:
    with imports("gateway"):
        from gateway.server import serve
    return serve(settings)
