"""Options that the client commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    # Not at run time: it needs the generated stubs, whose absence is the command's to explain.
    from pagewire.requests import Options

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="PAGEWIRE_ADDRESS", help="HOST:PORT of a gateway.", show_default=True)
]
ModelName = Annotated[str, typer.Option(help="Served name of the model. Default: the only one.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate at most. 0: the server's default.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most likely token. Default: 1.", show_default=False)
]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this probability.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Keep this many of the most likely tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes the answer reproducible.")]
BeamWidth = Annotated[
    int | None, typer.Option(min=1, help="Search for the likeliest answer with this many beams; it comes at once.")
]
LengthPenalty = Annotated[float | None, typer.Option(help="Of a beam search: above 0 favours longer answers.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop at this text. May be given several times.")]
Timeout = Annotated[float | None, typer.Option(min=0.0, help="Seconds for the whole answer. Default: no limit.")]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MAX_TOKENS = 256


def sampling(
    *,
    model: str,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
    beam_width: int | None = None,
    length_penalty: float | None = None,
) -> Options:
    """What was given, as the client's options."""
    options: Options = {"model": model, "max_tokens": max_tokens}
    if beam_width is not None:
        options["beam_width"] = beam_width
    if length_penalty is not None:
        options["length_penalty"] = length_penalty
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if top_k is not None:
        options["top_k"] = top_k
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    return options
