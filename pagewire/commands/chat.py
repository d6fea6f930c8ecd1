"""`pagewire chat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from pagewire.commands import options as o
from pagewire.commands.extras import imports

HELP = "Ctrl-C ends an answer, Ctrl-D or /exit ends the chat, /new starts over."


def command() -> Callable[..., None]:
    """The command."""
    return chat


def chat(
    address: o.Address = o.DEFAULT_ADDRESS,
    system: Annotated[str, typer.Option(help="System message that opens the chat.", show_default=False)] = "",
    model: o.ModelName = "",
    max_tokens: o.MaxTokens = o.DEFAULT_MAX_TOKENS,
    temperature: o.Temperature = None,
    top_p: o.TopP = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
) -> None:
    """Chat with the model.

    Ctrl-C ends an answer, Ctrl-D or /exit ends the chat, /new forgets what was said.
    """
    with imports("gateway"):
        from pagewire.client import Client
        from pagewire.commands.output import cost_line, errors_as_one_line, one_line, show, tell_break
        from pagewire.errors import PagewireError

    given = o.sampling(
        model=model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
    console = Console(highlight=False)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with errors_as_one_line("chat"), Client(address, on_break=tell_break) as client:
        served = ", ".join(entry.name for entry in client.models())
        console.print(f"Chatting with {served}. {HELP}", style="dim", markup=False, soft_wrap=True)
        while True:
            try:
                line = console.input("[bold]> [/bold]").strip()
            except EOFError:
                console.print()
                return
            except KeyboardInterrupt:  # as in a shell: what was being typed is thrown away
                console.print()
                continue
            if line == "/help":
                console.print(HELP, style="dim", markup=False)
                continue
            if line == "/exit":
                return
            if line == "/new":
                messages = list(opening)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            try:
                text, finish = show(client.chat(messages, **given), console)
            except KeyboardInterrupt:
                # The stream's `with` has cancelled the request; what was said last is taken back.
                messages.pop()
                console.print("\n(stopped)", style="dim")
                continue
            except PagewireError as error:
                # The chat goes on: the next try may succeed, or a shorter history.
                messages.pop()
                console.print(one_line(error), style="red", markup=False, soft_wrap=True)
                if getattr(error, "reason", "") == "PROMPT_TOO_LONG":
                    console.print("The chat has outgrown the model's context: /new starts over.", style="dim")
                continue
            messages.append({"role": "assistant", "content": text})
            if finish is not None:
                console.print(cost_line(finish.usage, finish.reason), style="dim", markup=False, soft_wrap=True)
