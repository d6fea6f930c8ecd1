"""One table of wrong requests, each written for all three protocols, with the one verdict that all of them must get.

Rows are made from fields times bad values where that is natural. A door that has no way to say a field is written as
`Unsaid`, with the reason and with the nearest thing that a client could try; what becomes of that is part of the row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.ceilings import CEILINGS
from pagewire.v1 import inference_pb2
from pagewire.v1 import open_inference_pb2 as oip
from tests.gateway.fake_scheduler import CONTEXT

NAN, INFINITY, DENORMAL = float("nan"), float("inf"), 1e-42
LARGEST = 2**32 - 1
VOCABULARY = 600
"""The fake scheduler's."""
TEXT_LIMIT = int(CEILINGS["prompt.text.bytes"].highest)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Unsaid:
    """A protocol that has no such field."""

    why: str
    attempt: Any = None
    """What a client could try; None: the protocol's own types keep it from being written (`why` says how)."""
    field: str = ""
    """The violation that the attempt gets; empty: it is ignored, and the request runs without it."""


@dataclass(frozen=True)
class Http:
    """A POST with JSON."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One wrong request at every door."""

    name: str
    native: inference_pb2.GenerateRequest | Unsaid
    kserve: oip.ModelInferRequest | Unsaid
    openai: Http | Unsaid
    fields: tuple[str, ...]
    """Paths of the violations in GenerateRequest; none: the verdict names no field."""
    params: tuple[str, ...]
    """OpenAI's names of them."""
    inputs: tuple[str, ...]
    """KServe's names of them."""
    code: str = "INVALID_ARGUMENT"
    reason: str = "INVALID_FIELD"
    own_words: bool = False
    """The descriptions differ, because the doors' own rules do."""


def native(**fields: Any) -> inference_pb2.GenerateRequest:
    if not {"text", "chat", "token_ids"} & fields.keys():
        fields["token_ids"] = inference_pb2.TokenIds(ids=[5])
    return inference_pb2.GenerateRequest(**fields)


def kserve(
    prompt: str | Sequence[int] = (5,), tensors: Mapping[str, tuple[str, Any]] | None = None, **parameters: Any
) -> oip.ModelInferRequest:
    """A ModelInferRequest.

    Args:
        prompt: text or token ids.
        tensors: (datatype, elements) of further inputs, by name.
        parameters: numbers, flags and strings as request parameters; `model` is the model's name. Lists and objects
            have no such form and go into the JSON of `sampling_parameters`.
    """
    request = oip.ModelInferRequest(id="row", model_name=parameters.pop("model", ""))
    if isinstance(prompt, str):
        _tensor(request, "text_input", "BYTES", [prompt.encode()])
    else:
        _tensor(request, "input_ids", "INT64", prompt)
    for name, (datatype, values) in (tensors or {}).items():
        _tensor(request, name, datatype, values)
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    structured = {name: value for name, value in parameters.items() if type(value) not in kinds}
    for name, value in parameters.items():
        if name not in structured:
            setattr(request.parameters[name], kinds[type(value)], value)
    if structured:
        _tensor(request, "sampling_parameters", "BYTES", [as_json(structured).encode()])
    return request


def as_json(value: Any) -> str:
    """JSON as clients in Python write it, NaN and Infinity included."""
    return json.dumps(value)


def _tensor(request: oip.ModelInferRequest, name: str, datatype: str, values: Sequence[Any]) -> None:
    tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
    field = {"BYTES": "bytes", "INT64": "int64", "UINT32": "uint", "FP64": "fp64", "BOOL": "bool"}[datatype]
    getattr(tensor.contents, f"{field}_contents").extend(values)


def http(prompt: Any = (5,), **body: Any) -> Http:
    return Http(COMPLETIONS, {"prompt": prompt, **body})


def shown(value: Any) -> str:
    """A value as it stands in a row's name."""
    text = "".join(char if " " <= char <= "~" else f"x{ord(char):02x}" for char in str(value))
    return text if len(text) <= 24 else f"{text[:12]}...{len(text)}"


FLOATS: dict[str, tuple[float, ...]] = {
    "temperature": (-1.0, -1e-3, 100.5, 1e300, -DENORMAL),
    "top_p": (0.0, -0.1, 1.5, 2.0, DENORMAL),
    "min_p": (-0.1, -1.0, 1.1, 100.0, DENORMAL),
    "repetition_penalty": (0.0, -1.0, 0.001, 101.0, DENORMAL),
    "presence_penalty": (-11.0, 11.0, 1e9, -1e9, DENORMAL),
    "frequency_penalty": (-11.0, 11.0, 1e9, -1e9, DENORMAL),
    "length_penalty": (-11.0, 11.0, 1e9, -1e9, DENORMAL),
}


def floats() -> Iterator[Row]:
    """Every float field with what no float field takes, and with what lies outside its own range."""
    for name, values in FLOATS.items():
        for place, value in enumerate((NAN, INFINITY, -INFINITY, *values)):
            # KServe has three places for a parameter: they take turns.
            asks = (
                kserve(**{name: value}),
                kserve(tensors={name: ("FP64", [value])}),
                kserve(tensors={"sampling_parameters": ("BYTES", [as_json({name: value}).encode()])}),
            )
            yield Row(
                f"{name}={value}",
                native(sampling=inference_pb2.SamplingParams(**{name: value})),
                asks[place % 3],
                http(**{name: value}),
                (f"sampling.{name}",),
                (name,),
                (name,),
            )


def combinations() -> Iterator[Row]:
    """Several wrong fields at once: all are named, in the same order."""
    worst = {name: values[1] for name, values in FLOATS.items()}
    for pair in itertools.combinations(worst, 2):
        both = {name: worst[name] for name in pair}
        yield Row(
            " and ".join(pair),
            native(sampling=inference_pb2.SamplingParams(**both)),
            kserve(**both),
            http(**both),
            tuple(f"sampling.{name}" for name in pair),
            pair,
            pair,
        )
    for name, value in worst.items():
        sampling = inference_pb2.SamplingParams(**{name: value})
        yield Row(
            f"{name} and min_tokens",
            native(sampling=sampling, stop=inference_pb2.StopParams(min_tokens=CONTEXT)),
            kserve(**{name: value}, min_tokens=CONTEXT),
            http(**{name: value}, min_tokens=CONTEXT),
            (f"sampling.{name}", "stop.min_tokens"),
            (name, "min_tokens"),
            (name, "min_tokens"),
        )
        yield Row(
            f"a token and {name} and logprobs",
            native(
                token_ids=inference_pb2.TokenIds(ids=[5, VOCABULARY]),
                sampling=sampling,
                output=inference_pb2.OutputOptions(logprobs=21),
            ),
            kserve([5, VOCABULARY], **{name: value}, logprobs=21),
            http([5, VOCABULARY], **{name: value}, logprobs=21),
            ("prompt.token_ids.ids[1]", f"sampling.{name}", "output.logprobs"),
            ("prompt[1]", name, "logprobs"),
            ("input_ids[1]", name, "logprobs"),
        )


def biases() -> Iterator[Row]:
    for key, value in [
        *((7, value) for value in (NAN, INFINITY, -INFINITY, -100.5, 101.0, 1e9, DENORMAL)),
        *((key, 1.0) for key in (VOCABULARY, VOCABULARY + 1, 65_536, 2**31, LARGEST)),
    ]:
        written = {str(key): value}
        at = f"logit_bias[{key}]"
        yield Row(
            f"{at}={value}",
            native(sampling=inference_pb2.SamplingParams(logit_bias={key: value})),
            kserve(logit_bias=written),
            http(logit_bias=written),
            (f"sampling.{at}",),
            (at,),
            (at,),
        )
    for count in (1025, 5000):
        many = dict.fromkeys(range(count), 0.5)
        written = {str(key): value for key, value in many.items()}
        yield Row(
            f"{count} biases",
            native(sampling=inference_pb2.SamplingParams(logit_bias=many)),
            kserve(logit_bias=written),
            http(logit_bias=written),
            ("sampling.logit_bias",),
            ("logit_bias",),
            ("logit_bias",),
        )


def counts() -> Iterator[Row]:
    for n in (129, 130, 1000, 2**31 - 1, 2**31, LARGEST):
        yield Row(
            f"n={n}",
            native(sampling=inference_pb2.SamplingParams(n=n)),
            kserve(n=n),
            http(n=n),
            ("sampling.n",),
            ("n",),
            ("n",),
        )
    for top in (21, 22, 100, 2**31, LARGEST):
        yield Row(
            f"logprobs={top}",
            native(output=inference_pb2.OutputOptions(logprobs=top)),
            kserve(logprobs=top) if top % 2 else kserve(tensors={"logprobs": ("UINT32", [top])}),
            http(logprobs=top),
            ("output.logprobs",),
            ("logprobs",),
            ("logprobs",),
        )
    for least, most in ((6, 5), (2, 1), (CONTEXT - 1, 7)):
        yield Row(
            f"min_tokens={least} max_tokens={most}",
            native(stop=inference_pb2.StopParams(min_tokens=least, max_tokens=most)),
            kserve(min_tokens=least, max_tokens=most),
            http(min_tokens=least, max_tokens=most),
            ("stop.min_tokens",),
            ("min_tokens",),
            ("min_tokens",),
        )
    for least in (CONTEXT, CONTEXT + 1, 2**31, LARGEST):
        yield Row(
            f"min_tokens={least}",
            native(stop=inference_pb2.StopParams(min_tokens=least)),
            kserve(min_tokens=least),
            http(min_tokens=least),
            ("stop.min_tokens",),
            ("min_tokens",),
            ("min_tokens",),
        )


def stops() -> Iterator[Row]:
    strings: list[tuple[list[str], str]] = [
        (["x"] * 17, ""),
        (["x"] * 1000, ""),
        (["x"] * 100_000, ""),
        ([""], "[0]"),
        (["ok", ""], "[1]"),
        ([*["ok"] * 15, ""], "[15]"),
        (["x" * 257], "[0]"),
        (["ok", "é" * 257], "[1]"),
        ([*["ok"] * 15, "x" * 10_000], "[15]"),
    ]
    for texts, at in strings:
        yield Row(
            f"{len(texts)} stop strings of up to {max(map(len, texts))}{at}",
            native(stop=inference_pb2.StopParams(stop=texts)),
            kserve(stop=texts) if at else kserve(tensors={"stop": ("BYTES", [text.encode() for text in texts])}),
            http(stop=texts),
            (f"stop.stop{at}",),
            (f"stop{at}",),
            (f"stop{at}",),
        )
    ids: list[tuple[list[int], str]] = [
        ([1] * 129, ""),
        ([1] * 1000, ""),
        ([1] * 100_000, ""),
        *(([value], "[0]") for value in (VOCABULARY, 65_536, 2**31, LARGEST)),
        *(([*[1] * 127, value], "[127]") for value in (VOCABULARY, LARGEST)),
    ]
    for values, at in ids:
        yield Row(
            f"{len(values)} stop ids, the last {values[-1]}",
            native(stop=inference_pb2.StopParams(stop_token_ids=values)),
            kserve(stop_token_ids=values) if at else kserve(tensors={"stop_token_ids": ("INT64", values)}),
            http(stop_token_ids=values),
            (f"stop.stop_token_ids{at}",),
            (f"stop_token_ids{at}",),
            (f"stop_token_ids{at}",),
        )


def names() -> Iterator[Row]:
    wrong = ("x" * 129, "x" * 10_000, "a\nb", "a\tb", "\x00", "\x7f", "\x1b[31m", "ü", "名", "a\u00a0b", "\U0001f600")
    for field in ("request_id", "tenant"):
        for value in wrong:
            yield Row(
                f"{field}={shown(value)}",
                native(**{field: value}),
                kserve(**{field: value}),
                http(**{field: value}),
                (field,),
                (field,),
                (field,),
            )
    for value in ("other", "../etc", "tiny\x00", "TINY", " ", "x" * 10_000, "tiny/1"):
        yield Row(
            f"model={shown(value)}",
            native(model=value),
            kserve(model=value),
            http(model=value),
            (),
            (),
            (),
            "NOT_FOUND",
            "MODEL_NOT_FOUND",
        )


def prompts() -> Iterator[Row]:
    long = "PROMPT_TOO_LONG"
    texts = [("", "INVALID_FIELD"), ("x" * (TEXT_LIMIT + 1), long), ("é" * (TEXT_LIMIT // 2 + 1), long)]
    texts += [("a b " * CONTEXT, long), ("x " * CONTEXT, long)]
    for text, reason in texts:
        yield Row(
            f"a text of {len(text)} characters",
            native(text=text),
            kserve(text),
            http(text),
            ("prompt.text",),
            ("prompt",),
            ("text_input",),
            reason=reason,
        )
    for length in (CONTEXT, CONTEXT + 1, 100_000):
        yield Row(
            f"a prompt of {length} tokens",
            native(token_ids=inference_pb2.TokenIds(ids=[5] * length)),
            kserve([5] * length),
            http([5] * length),
            ("prompt.token_ids",),
            ("prompt",),
            ("input_ids",),
            reason=long,
        )
    yield Row(
        "a prompt of no tokens",
        native(token_ids=inference_pb2.TokenIds()),
        kserve([]),
        http([[]]),
        ("prompt.token_ids",),
        ("prompt[0]",),
        ("input_ids",),
    )
    for before, value in itertools.product((0, 1, CONTEXT - 2), (VOCABULARY, VOCABULARY + 1, 2**31, LARGEST)):
        ids = [*[5] * before, value]
        yield Row(
            f"token {value} at {before}",
            native(token_ids=inference_pb2.TokenIds(ids=ids)),
            kserve(ids),
            http(ids),
            (f"prompt.token_ids.ids[{before}]",),
            (f"prompt[{before}]",),
            (f"input_ids[{before}]",),
        )


BEAMS = {"use_beam_search": True, "n": 2}


def beams() -> Iterator[Row]:
    """What a beam search cannot mean."""
    changes: list[tuple[str, Any]] = [
        *(("temperature", value) for value in (1e-4, 0.5, 1.0, 100.0)),
        *(("repetition_penalty", value) for value in (0.5, 1.5)),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-1.0, 0.5)),
    ]
    for name, value in changes:
        yield Row(
            f"beams with {name}={value}",
            native(sampling=inference_pb2.SamplingParams(n=2, beam_width=2, **{name: value})),
            kserve(**BEAMS, **{name: value}),
            http(**BEAMS, **{name: value}),
            (f"sampling.{name}",),
            (name,),
            (name,),
        )
    yield Row(
        "beams with logit_bias",
        native(sampling=inference_pb2.SamplingParams(n=2, beam_width=2, logit_bias={7: 1.0})),
        kserve(**BEAMS, logit_bias={"7": 1.0}),
        http(**BEAMS, logit_bias={"7": 1.0}),
        ("sampling.logit_bias",),
        ("logit_bias",),
        ("logit_bias",),
    )
    for width in (33, 34, 128, 2**31, LARGEST):
        yield Row(
            f"{width} beams",
            native(sampling=inference_pb2.SamplingParams(n=2, beam_width=width)),
            kserve(**BEAMS, best_of=width),
            http(**BEAMS, best_of=width),
            ("sampling.beam_width",),
            ("best_of",),
            ("best_of",),
        )
    yield Row(
        "33 of 33 beams",
        native(sampling=inference_pb2.SamplingParams(n=33, beam_width=33)),
        kserve(use_beam_search=True, n=33),
        http(use_beam_search=True, n=33),
        ("sampling.beam_width",),
        ("n",),
        ("n",),
    )
    for n in (3, 32):
        yield Row(
            f"{n} of 2 beams",
            native(sampling=inference_pb2.SamplingParams(n=n, beam_width=2)),
            kserve(use_beam_search=True, n=n, best_of=2),
            http(use_beam_search=True, n=n, best_of=2),
            ("sampling.n",),
            ("n",),
            ("n",),
        )


NO_CHATS = "the protocol has one prompt per request and no roles"


def chats() -> Iterator[Row]:
    """Conversations: KServe has none."""
    conversations: list[tuple[str, list[tuple[str, str]], str, str]] = [
        ("no messages", [], ".messages", "INVALID_FIELD"),
        ("1025 messages", [("user", "x")] * 1025, ".messages", "INVALID_FIELD"),
        ("no role", [("user", "x"), ("", "x")], ".messages[1].role", "INVALID_FIELD"),
        ("a long role", [("x" * 65, "x")], ".messages[0].role", "INVALID_FIELD"),
        ("an unknown role", [("robot", "x")], "", "CHAT_TEMPLATE_FAILED"),
    ]
    for name, conversation, at, reason in conversations:
        messages = [{"role": role, "content": content} for role, content in conversation]
        yield Row(
            f"a chat with {name}",
            native(
                chat=inference_pb2.ChatPrompt(
                    messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in conversation]
                )
            ),
            Unsaid(NO_CHATS, kserve(tensors={"messages": ("BYTES", [as_json(messages).encode()])}), "messages"),
            Http(CHAT, {"messages": messages}),
            (f"prompt.chat{at}",),
            (f"messages{at.removeprefix('.messages')}",),
            (),
            reason=reason,
        )


UNSIGNED = "the field is unsigned: generated code refuses the value"
TYPED = "the field is typed: generated code refuses the value"
ZERO = "0 stands for the server's default"


def untyped() -> Iterator[Row]:
    """What JSON and tensors can say and protobuf fields cannot: wrong types and signs."""
    wrong: list[tuple[str, Any, str, type[Any], str]] = [
        ("n", -1, "", inference_pb2.SamplingParams, UNSIGNED),
        ("min_tokens", -1, "", inference_pb2.StopParams, UNSIGNED),
        ("max_tokens", -5, "", inference_pb2.StopParams, UNSIGNED),
        ("logprobs", -1, "", inference_pb2.OutputOptions, UNSIGNED),
        ("stop_token_ids", [5, -1], "[1]", inference_pb2.StopParams, UNSIGNED),
        ("n", 1.5, "", inference_pb2.SamplingParams, TYPED),
        ("temperature", "hot", "", inference_pb2.SamplingParams, TYPED),
        ("top_p", [1], "", inference_pb2.SamplingParams, TYPED),
        ("seed", 0.5, "", inference_pb2.SamplingParams, TYPED),
        ("stop", ["x", 5], "[1]", inference_pb2.StopParams, TYPED),
        ("stop_token_ids", [5, "5"], "[1]", inference_pb2.StopParams, TYPED),
        ("logit_bias", {"cat": 1.0}, "", inference_pb2.SamplingParams, TYPED),
        ("ignore_eos", "maybe", "", inference_pb2.StopParams, TYPED),
    ]
    for name, value, at, message, why in wrong:
        yield Row(
            f"{name}={value!r}",
            Unsaid(why, (message, {name: value})),
            kserve(**{name: value}),
            http(**{name: value}),
            (),
            (f"{name}{at}",),
            (f"{name}{at}",),
            own_words=name == "max_tokens",  # OpenAI's takes 0, with echo
        )
    yield Row(
        "max_tokens=0",
        Unsaid(ZERO, native(stop=inference_pb2.StopParams(max_tokens=0))),
        kserve(max_tokens=0),
        http(max_tokens=0),
        (),
        ("max_tokens",),
        ("max_tokens",),
        own_words=True,
    )


def native_only() -> Iterator[Row]:
    """Fields that only the native protocol has."""
    for value in (86_401, LARGEST):
        yield Row(
            f"hold_seconds={value}",
            native(hold_seconds=value),
            Unsaid("parking is native; parameters that are not known are ignored", kserve(hold_seconds=value)),
            Unsaid("parking is native; fields that are not known are ignored", http(hold_seconds=value)),
            ("hold_seconds",),
            (),
            (),
        )
    for top in (21, LARGEST):
        yield Row(
            f"prompt_logprobs={top}",
            native(output=inference_pb2.OutputOptions(prompt_logprobs=top)),
            Unsaid("refused at any value", kserve(prompt_logprobs=1), "prompt_logprobs"),
            Unsaid("refused at any value; echo scores a prompt", http(prompt_logprobs=1), "prompt_logprobs"),
            ("output.prompt_logprobs",),
            (),
            (),
        )


ROWS = [
    *floats(),
    *combinations(),
    *biases(),
    *counts(),
    *stops(),
    *names(),
    *prompts(),
    *beams(),
    *chats(),
    *untyped(),
    *native_only(),
]
