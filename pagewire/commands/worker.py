"""`pagewire worker`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pagewire.commands.extras import imports
from pagewire.runtime.settings import role_command

if TYPE_CHECKING:
    from worker.config import WorkerSettings


def command() -> Callable[..., None]:
    """The command, with an option for each setting of a worker."""
    from worker.config import WorkerSettings

    return role_command(WorkerSettings, _serve)


def _serve(settings: WorkerSettings) -> None:
    with imports("worker"):
        from worker.main import run
    run(settings)
