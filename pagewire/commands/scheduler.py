"""`pagewire scheduler`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from pagewire.commands.extras import imports
from pagewire.runtime.settings import role_command

if TYPE_CHECKING:
    from scheduler.config import SchedulerSettings


def command() -> Callable[..., None]:
    """The command, with an option for each setting of a scheduler."""
    from scheduler.config import SchedulerSettings

    return role_command(SchedulerSettings, _serve)


def _serve(settings: SchedulerSettings) -> Coroutine[Any, Any, None]:
    with imports("scheduler"):
        from scheduler.server import serve
    return serve(settings)
