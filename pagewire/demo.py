"""`make demo`: the whole service on this machine, seen working once.

Starts scheduler, worker and gateway as processes on the bundled model and the CPU, streams a completion over gRPC to
the terminal, prints what it used, and stops everything. Exit code 0 says that all of it worked.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pagewire.client import Client
from pagewire.commands.output import show, tokens_per_s
from pagewire.errors import PagewireError
from pagewire.requests import Options
from pagewire.types import Finish, Model

START_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0
PROMPT = "The function returns"


def main() -> None:
    """Runs the demo and exits: 0 if it worked, 1 with a line if it did not."""
    arguments = _arguments()
    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="pagewire-demo-") as folder:
            _demo(console, Path(folder), arguments.prompt, arguments.max_tokens)
    except (DemoError, PagewireError) as error:
        print(f"pagewire demo: {error}", file=sys.stderr)
        sys.exit(1)


class DemoError(Exception):
    """The demo did not work; the message says what to look at."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pagewire.demo", description="See the whole service work once.")
    parser.add_argument("--prompt", default=PROMPT, help="what the model continues")
    parser.add_argument("--max-tokens", type=int, default=120, help="how much of it")
    return parser.parse_args()


def _demo(console: Console, folder: Path, prompt: str, max_tokens: int) -> None:
    console.print("Starting scheduler, worker and gateway (CPU, bundled model) ...", style="bold")
    with running(folder) as ready:
        with Client(ready["grpc"]) as client:
            (model,) = client.models()
            console.print(f"\nStreaming from {model.name} at {ready['grpc']} over gRPC:\n", style="bold", markup=False)
            console.file.write(prompt)
            options: Options = {"max_tokens": max_tokens, "temperature": 0.7, "top_p": 0.9, "seed": 2}
            text, finish = show(lambda: client.generate(prompt, **options), console)
            if finish is None or not text.strip():
                raise DemoError("the model answered nothing")
        console.print()
        console.print(_summary(finish, model))
        console.print("\nStopping ...", style="bold")
    console.print(
        'All processes have ended. Next: `make serve`, then `.venv/bin/pagewire generate "..."`.',
        markup=False,
        soft_wrap=True,
    )


@contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """`pagewire up` for the length of a `with` block; gives its ready file's content. Raises DemoError if it fails."""
    ready_file = folder / "ready.json"
    command = [sys.executable, "-m", "pagewire.cli", "up", "--device", "cpu", "--ready-file", str(ready_file)]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not ready_file.exists():
            if process.poll() is not None:
                raise DemoError("the service did not start: see the line above, or run `pagewire doctor`")
            if time.monotonic() > deadline:
                raise DemoError(f"the service was not ready within {START_LIMIT_S:g} s")
            time.sleep(0.05)
        yield json.loads(ready_file.read_text())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code != 0:
        raise DemoError(f"the service ended with exit code {code}")


def _summary(finish: Finish, model: Model) -> Table:
    usage = finish.usage
    tokens = usage.prompt_tokens + usage.completion_tokens
    blocks = -(-tokens // model.block_size)
    rate = tokens_per_s(usage)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("tokens", f"{usage.prompt_tokens} prompt + {usage.completion_tokens} generated ({finish.reason})")
    table.add_row("KV blocks", f"{blocks} of {model.kv_blocks}, {model.block_size} tokens each")
    table.add_row("time to first token", f"{usage.first_token_ns / 1e6:.1f} ms")
    table.add_row("decoding", "-" if rate is None else f"{rate:.1f} tokens/s")
    table.add_row("whole request", f"{usage.total_ns / 1e9:.2f} s")
    return table


if __name__ == "__main__":
    main()
