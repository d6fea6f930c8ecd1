"""`pagewire doctor`: looks at this machine and says, for each thing that is wrong, how to mend it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagewire.bundled import BUNDLED_MODEL
from pagewire.doctor import gpu, installation, machine, model
from pagewire.doctor.check import Check

PORTS = ((50051, "gRPC"), (8000, "HTTP"), (9090, "metrics"), (50052, "scheduler"))
PIPE_WIDTH = 240
"""A pipe has no width: lines that are not folded are easier to search and to report."""


def command() -> Callable[..., None]:
    """The command."""
    return doctor


def doctor(
    model: Annotated[str, typer.Option(help="Folder of a model to look at.")] = str(BUNDLED_MODEL),
    address: Annotated[str, typer.Option(help="HOST:PORT of a service to look at too.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this machine and say what to mend. Exits with code 1 if something will not work."""
    checks = list(run_checks(model, address))
    bad = sum(check.state == "bad" for check in checks)
    if as_json:
        print(json.dumps({"ok": not bad, "checks": [asdict(check) for check in checks]}))
    else:
        show(checks)
    if bad:
        sys.exit(1)


def show(checks: list[Check]) -> None:
    """A table, and the verdict."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found", "mend"):
        table.add_column(title, overflow="fold")
    styles = {"ok": "green", "note": "yellow", "bad": "red"}
    for check in checks:
        mark = Text(check.state, style=styles[check.state])
        table.add_row(mark, Text(check.name), Text(check.found), Text(check.mend))
    console.print(table)
    bad = sum(check.state == "bad" for check in checks)
    if bad:
        console.print(f"{bad} to mend", style="red")
    else:
        console.print("this machine can run Pagewire", style="green")


def run_checks(model_folder: str = str(BUNDLED_MODEL), address: str = "") -> Iterator[Check]:
    """All checks, in the order in which they build on each other."""
    yield installation.check_python()
    yield from installation.check_packages()
    yield installation.check_stubs()
    yield installation.check_line_editing()
    yield from gpu.check_gpu()
    yield machine.check_memory()
    yield machine.check_shared_memory()
    yield machine.check_temporary_folder()
    yield machine.check_descriptors()
    yield machine.check_clock()
    yield machine.check_proxy(os.environ)
    yield machine.check_fork_safety(os.environ)
    yield from model.check_model(model_folder, gpu.free_bytes() or machine.available_bytes())
    if address:
        yield from _check_service(address)
        return  # the ports are taken by what was asked for
    for port, what in PORTS:
        yield machine.check_port(port, what)


def _check_service(address: str) -> Iterator[Check]:
    try:
        from pagewire.doctor import service
    except Exception:  # the stubs do not import, which has been told already
        yield Check("service", "bad", "cannot be asked without the gRPC stubs", "mend those first")
        return
    yield from service.check_service(address)
