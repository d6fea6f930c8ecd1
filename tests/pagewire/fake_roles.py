"""`pagewire up` with stand-ins for the roles: what the supervisor does, without models.

    python -m tests.pagewire.fake_roles up FLAGS ...        the supervisor, whose children are:
    python -m tests.pagewire.fake_roles worker FLAGS ...    a role that does what FAKE_WORKER says

A stand-in does one thing: `ready` (then waits for SIGTERM), `refuse` (cannot start), `crash` (a defect before it is
ready), `stubborn` (ready, and ignores SIGTERM), `slow` (never ready, and ignores SIGTERM). It writes its flags to
FAKE_FOLDER, a file per process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pagewire import supervisor
from pagewire.runtime.errors import StartError, run_role
from pagewire.runtime.parent import die_with_supervisor
from pagewire.runtime.ready import announce
from pagewire.runtime.settings import role_command

COMMAND = (sys.executable, "-m", "tests.pagewire.fake_roles")
READY = {
    "scheduler": {"grpc": "unix:scheduler", "metrics": "127.0.0.1:9999"},
    "worker": {"worker_id": "fake"},
    "gateway": {"grpc": "127.0.0.1:7777", "http": None},
}


def up() -> None:
    """Runs the real supervisor over the stand-ins."""

    async def supervise(settings: supervisor.UpSettings) -> None:
        await supervisor.Supervisor(settings, Path(os.environ["FAKE_FOLDER"]), COMMAND).run()

    import typer

    application = typer.Typer(add_completion=False)
    application.command()(role_command(supervisor.UpSettings, supervise))
    application(args=sys.argv[2:])


def role(name: str) -> None:
    """Plays one role."""
    die_with_supervisor()
    flags = sys.argv[2:]
    ready_fd = int(flags[flags.index("--ready-fd") + 1])
    folder = Path(os.environ["FAKE_FOLDER"])
    temporary = folder / f".{os.getpid()}"
    temporary.write_text(json.dumps({"role": name, "flags": flags}))
    temporary.rename(folder / f"{os.getpid()}.json")
    behaviour = os.environ.get(f"FAKE_{name.upper()}", "ready")

    def play() -> None:
        if behaviour == "refuse":
            raise StartError("no config.json in /nowhere: name another --model")
        if behaviour == "crash":
            os._exit(1)
        if behaviour in ("stubborn", "slow"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if behaviour != "slow":
            announce(ready_fd, **READY[name])
        while True:
            signal.pause()

    run_role(name, play, ready_fd)


if __name__ == "__main__":
    up() if sys.argv[1] == "up" else role(sys.argv[1])
