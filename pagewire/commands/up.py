"""`pagewire up`."""

from __future__ import annotations

from collections.abc import Callable

from pagewire.runtime.settings import role_command
from pagewire.supervisor import UpSettings, supervise


def command() -> Callable[..., None]:
    """The command, with an option for each setting of the supervisor."""
    return role_command(UpSettings, supervise)
