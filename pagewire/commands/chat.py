"""`pagewire chat`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from pagewire.commands import options as o
from pagewire.commands.extras import imports


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
    history: Annotated[bool, typer.Option(help="Keep what is typed for the next chat.")] = True,
) -> None:
    """Chat with the model.

    Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /help lists the commands.
    """
    with imports("gateway"):
        from pagewire.client import Client
        from pagewire.commands.output import errors_as_one_line, tell_break
        from pagewire.terminal.chat import Chat
        from pagewire.terminal.conversation import Conversation
        from pagewire.terminal.line_editor import history_file

    given = o.sampling(
        model=model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
    )
    with errors_as_one_line("chat"), Client(address, on_break=tell_break) as client:
        conversation = Conversation(given, system)
        Chat(client, conversation, Console(highlight=False), history_file() if history else None).run()
