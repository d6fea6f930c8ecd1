"""The `pagewire` command.

Only the chosen command's module is imported, so that `--help` is quick and a scheduler's host needs neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from pagewire import __version__
from pagewire.runtime.errors import StartError, fail_start
from pagewire.runtime.parent import die_with_supervisor

COMMANDS = {
    "up": "Start scheduler, workers and gateways on this machine, and keep them running.",
    "scheduler": "Run one scheduler.",
    "worker": "Run one worker.",
    "gateway": "Run one gateway.",
    "generate": "Continue a prompt and stream the answer.",
    "chat": "Chat with the model.",
    "top": "Watch requests, block pools and workers, live.",
    "replay": "Execute a recorded run again and compare.",
    "bench": "Measure throughput, latency under load, and kernels.",
    "health": "Ask a server whether it serves.",
    "doctor": "Check this machine and say what to mend.",
}
"""Each is a module of `pagewire.commands` with a function `command`, which makes the typer command, or an application
with commands of its own."""

ENVIRONMENT = {
    # gRPC's own log is no part of ours; what matters of it reaches us as statuses.
    "GRPC_VERBOSITY": "NONE",
    # Nothing here forks once gRPC runs (children are started anew), so its fork handlers would only log.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # A gateway has transformers without torch on purpose.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # Its retries while a host is offline; that it cannot be reached is said once, in our own words.
    "HF_HUB_VERBOSITY": "error",
    # A worker shares its cores with the other roles. Threads that spin while they wait take the cores from those they
    # wait for: on two busy cores the bundled model made 40 tokens/s with spinning and 120 without.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of every process, unless it is set already."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 after success or a clean stop, 1 when a check or a request failed, 2 when the
    command line is wrong or a process cannot start."""
    die_with_supervisor()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    chosen = given[0] if given[0] in COMMANDS else None
    try:
        code = _application(chosen)(args=given, prog_name="pagewire", standalone_mode=False)
    except StartError as error:
        fail_start(chosen or "", error, _ready_fd(given))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # A wrong command line: unknown option, missing argument. One line, and where to read more.
        help_line = f"see pagewire {chosen} --help" if chosen else "see pagewire --help"
        fail_start(chosen or "", f"{message().rstrip('.')}; {help_line}", _ready_fd(given))
    sys.exit(code if isinstance(code, int) else 0)


def _application(chosen: str | None) -> typer.Typer:
    application = typer.Typer(
        name="pagewire",
        help="LLM serving built like an operating system: a scheduler, workers and gateways that speak gRPC.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    application.callback()(_root)
    for name, summary in COMMANDS.items():
        command = _load(name) if name == chosen else _not_loaded
        if isinstance(command, typer.Typer):
            application.add_typer(command, name=name, short_help=summary)
        else:
            application.command(name, short_help=summary)(command)
    return application


def _root(
    version: bool = typer.Option(False, "--version", callback=lambda value: _show_version(value), is_eager=True),
) -> None:
    """Root of all commands."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pagewire {__version__}")
        raise typer.Exit


def _load(name: str) -> Callable[..., Any] | typer.Typer:
    command: Callable[..., Any] | typer.Typer = importlib.import_module(f"pagewire.commands.{name}").command()
    return command


def _not_loaded() -> None:
    raise AssertionError("only the chosen command runs")


def _ready_fd(given: Sequence[str]) -> int | None:
    """The supervisor's descriptor, read without the command's parser, which may be what failed."""
    for flag, value in itertools.pairwise(given):
        if flag == "--ready-fd" and value.isdecimal():
            return int(value)
    return None


if __name__ == "__main__":
    main()
