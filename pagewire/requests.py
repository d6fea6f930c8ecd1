"""Makes protocol requests from Python arguments. Ranges are the server's to check: it has the one table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from pagewire.v1 import inference_pb2

Built = TypeVar("Built", bound=Any)

Prompt = str | Sequence[int]
"""Text, or token ids."""
Message = Mapping[str, str]
"""One turn of a chat: {"role": ..., "content": ...}."""


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `chat`. What is left out is the server's default (see inference.proto)."""

    model: str
    """Served name; default: the only model."""
    request_id: str
    """At most 128 printable ASCII characters; default: a random one."""
    max_tokens: int
    """Output tokens per sequence at most."""
    min_tokens: int
    """No end-of-sequence or stop token before that many output tokens."""
    temperature: float
    """0: greedy; default 1."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    """Makes sampling reproducible."""
    n: int
    """Sequences sampled from the one prompt; of a beam search, how many of the best answers to return."""
    beam_width: int
    """Above 1: a beam search with so many beams, whose answers come when it ends, best first."""
    length_penalty: float
    """Of a beam search: the exponent on the length by which log-probabilities are divided; default 1."""
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    """Stop strings; a single one may be given as it is."""
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    echo: bool
    logprobs: int
    """Top-N beside the chosen token; 0: the chosen token only."""
    prompt_logprobs: int
    token_ids_only: bool
    priority: int
    tenant: str
    hold_seconds: int
    """Keeps the KV for so long after a finish by STOP or LENGTH, for `continue_request`."""


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "beam_width",
    "length_penalty",
    "logit_bias",
)
_STOP = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop")
_OUTPUT = ("echo", "logprobs", "prompt_logprobs", "token_ids_only")
_REQUEST = ("model", "request_id", "priority", "tenant", "hold_seconds")


def generate_request(prompt: Prompt | Sequence[Message], options: Options) -> inference_pb2.GenerateRequest:
    """Builds a request.

    Args:
        prompt: text, token ids, or the messages of a chat.
        options: see `Options`.

    Raises:
        TypeError: an option is unknown or of a wrong type.
        ValueError: a number does not fit its field at all (a negative count, for example), or a text is not Unicode.
    """
    given = dict(options)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    unknown = given.keys() - {*_SAMPLING, *_STOP, *_OUTPUT, *_REQUEST}
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")

    def pick(names: Sequence[str]) -> dict[str, object]:
        return {name: given[name] for name in names if given.get(name) is not None}

    request = _message(inference_pb2.GenerateRequest, pick(_REQUEST))
    request.sampling.CopyFrom(_message(inference_pb2.SamplingParams, pick(_SAMPLING)))
    request.stop.CopyFrom(_message(inference_pb2.StopParams, pick(_STOP)))
    request.output.CopyFrom(_message(inference_pb2.OutputOptions, pick(_OUTPUT)))
    if isinstance(prompt, str):
        request.text = _text("the prompt", prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat_prompt(prompt))  # type: ignore[arg-type]
    else:
        request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]
    return request


def known_request(request_id: str, n: int) -> inference_pb2.GenerateRequest:
    """A request that the server has already, of `n` sequences: as much of it as a stream has to know to resume."""
    return inference_pb2.GenerateRequest(request_id=request_id, sampling=inference_pb2.SamplingParams(n=n))


def continue_request(
    request_id: str, more: Prompt | None, max_tokens: int | None, hold_seconds: int | None
) -> inference_pb2.ContinueRequest:
    """Builds the request that takes a parked or held one up again, behind `more` if that is given."""
    given = {"request_id": request_id, "max_tokens": max_tokens, "hold_seconds": hold_seconds}
    values = {name: value for name, value in given.items() if value is not None}
    request = _message(inference_pb2.ContinueRequest, values)
    if isinstance(more, str):
        request.text = _text("the input", more)
    elif more is not None:
        request.token_ids.CopyFrom(inference_pb2.TokenIds(ids=more))
    return request


def chat_prompt(messages: Sequence[Message]) -> inference_pb2.ChatPrompt:
    """Builds a chat. Raises TypeError for a message that is not {"role": ..., "content": ...}."""
    chat = inference_pb2.ChatPrompt()
    for message in messages:
        if set(message) != {"role", "content"}:
            raise TypeError(f'a chat message has "role" and "content", not {sorted(message)}')
        chat.messages.add(role=_text("a role", message["role"]), content=_text("a message", message["content"]))
    return chat


def _message(kind: type[Built], values: Mapping[str, object]) -> Built:
    """A message with these fields. What protobuf says of a value that does not fit is told with the field's name."""
    try:
        built: Built = kind(**values)
    except (TypeError, ValueError) as error:
        for name, value in values.items():
            try:
                kind(**{name: value})
            except UnicodeEncodeError:
                raise ValueError(f"{name} holds bytes that are not UTF-8") from None
            except (TypeError, ValueError) as wrong:
                raise type(error)(f"{name}: {wrong}") from None
        raise
    return built


def _text(what: str, value: str) -> str:
    """The text. Bytes that are no UTF-8 are in Python's command line and files as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds bytes that are not UTF-8") from None
    return value
