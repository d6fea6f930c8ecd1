"""`pagewire generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from pagewire.commands import options as o
from pagewire.commands.extras import imports


def command() -> Callable[..., None]:
    """The command."""
    return generate


def generate(
    prompt: Annotated[str, typer.Argument(help='The text to continue; "-" reads it from standard input.')],
    address: o.Address = o.DEFAULT_ADDRESS,
    model: o.ModelName = "",
    max_tokens: o.MaxTokens = o.DEFAULT_MAX_TOKENS,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    beam_width: o.BeamWidth = None,
    length_penalty: o.LengthPenalty = None,
    stop: o.Stop = None,
    timeout: o.Timeout = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text only, not what it cost.")] = False,
) -> None:
    """Continue a prompt and stream the answer."""
    with imports("gateway"):
        from pagewire.client import Client
        from pagewire.commands.output import cost_line, errors_as_one_line, show, tell_break

    if prompt == "-":
        prompt = sys.stdin.read()
    given = o.sampling(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        beam_width=beam_width,
        length_penalty=length_penalty,
    )
    with errors_as_one_line("generate"), Client(address, on_break=tell_break) as client:
        _text, finish = show(lambda: client.generate(prompt, timeout=timeout, **given), Console())
    if finish is not None and not quiet:
        console = Console(stderr=True, highlight=False)
        console.print(cost_line(finish.usage, finish.reason), style="dim", soft_wrap=True)
