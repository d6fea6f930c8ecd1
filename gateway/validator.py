"""The one validator behind every front door: a GenerateRequest in, a resolved request or a list of violations out.

It raises nothing, looks at lengths before it looks at elements, and copies no list before its length is known to be
within bounds. Text is checked here for size only; `prompt_violations` checks its length once it has been tokenized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.ceilings import CEILINGS
from gateway.errors import Reason, Violation
from pagewire.v1 import inference_pb2

SMALLEST_NORMAL = 1.1754943508222875e-38
"""Smallest positive float32 that is not denormal (IEEE 754)."""
GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0 (contract of SamplingParams.temperature)."""

FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
)
NEUTRAL_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""The penalties, and their values that change nothing."""


@dataclass(frozen=True)
class ModelLimits:
    """What the validator must know of the served model."""

    name: str
    """The served name."""
    vocab_size: int
    """Token ids are below this."""
    max_model_len: int
    """Prompt and output together, in tokens."""
    eos_token_ids: frozenset[int] = frozenset()
    """They end a sequence unless ignore_eos."""


@dataclass(frozen=True)
class ResolvedRequest:
    """A request that has passed, with every default filled in except those that need the prompt's length."""

    request_id: str
    """Empty: to be made by the server."""
    sampling: inference_pb2.SamplingParams
    """temperature, top_p, repetition_penalty and n are set; seed only if the client set it."""
    stop: inference_pb2.StopParams
    """max_tokens as the client gave it; `cut_to_context` resolves it."""
    output: inference_pb2.OutputOptions
    priority: int
    tenant: str
    hold_seconds: int


def validate(
    request: inference_pb2.GenerateRequest, model: ModelLimits, *, has_tokenizer: bool
) -> ResolvedRequest | list[Violation]:
    """Checks everything that can be known before tokenizing.

    Args:
        request: as the client sent it, in any protocol; it is not changed.
        model: limits of the served model.
        has_tokenizer: without one, stop strings cannot be found and are refused.
    """
    found: list[Violation] = []
    found += identifier_violations("request_id", request.request_id)
    found += identifier_violations("tenant", request.tenant)
    found += _prompt(request, model)
    found += _sampling(request.sampling, model)
    found += _stop(request.stop, model, has_tokenizer)
    found += _output(request.output)
    found += seconds_violations("hold_seconds", request.hold_seconds)
    if request.hold_seconds and max(request.sampling.n, request.sampling.beam_width) > 1:
        found.append(Violation("hold_seconds", "needs a request of one sequence"))
    if found:
        return found
    return ResolvedRequest(
        request_id=request.request_id,
        sampling=_resolved_sampling(request.sampling, model),
        stop=request.stop,
        output=request.output,
        priority=request.priority,
        tenant=request.tenant,
        hold_seconds=request.hold_seconds,
    )


def seconds_violations(field: str, value: int, key: str = "hold_seconds") -> list[Violation]:
    """What is wrong with the time for which a request is to be held or parked."""
    highest = int(CEILINGS[key].highest)
    return [Violation(field, f"must be at most {highest}")] if value > highest else []


def prompt_violations(field: str, length: int, model: ModelLimits) -> list[Violation]:
    """What is wrong with a prompt of `length` tokens: it must leave room for at least one output token."""
    if length == 0:
        return [Violation(field, "is empty")]
    if length >= model.max_model_len:
        limit = model.max_model_len - 1
        return [Violation(field, f"has {length} tokens, but the model takes prompts of at most {limit}")]
    return []


def cut_to_context(
    stop: inference_pb2.StopParams, prompt_length: int, model: ModelLimits, default_max_tokens: int
) -> inference_pb2.StopParams:
    """A copy of `stop` with max_tokens set and cut to the context, and min_tokens no larger than it.

    An unset max_tokens is the default, or min_tokens if that is more.
    """
    room = model.max_model_len - prompt_length
    wanted = stop.max_tokens or max(default_max_tokens, stop.min_tokens)
    result = inference_pb2.StopParams()
    result.CopyFrom(stop)
    result.max_tokens = min(wanted, room)
    result.min_tokens = min(stop.min_tokens, result.max_tokens)
    return result


def reason_for(violations: Sequence[Violation]) -> Reason:
    """The ErrorInfo reason for a list of violations."""
    prompts = {"prompt.text", "prompt.token_ids", "prompt.chat"}
    if all(violation.field in prompts and "at most" in violation.description for violation in violations):
        return Reason.PROMPT_TOO_LONG
    return Reason.INVALID_FIELD


def identifier_violations(field: str, value: str) -> list[Violation]:
    """An id or tenant: short and printable, because it appears in logs."""
    limit = int(CEILINGS[f"{field}.length"].highest)
    if len(value) > limit or not all(" " <= char <= "~" for char in value):
        return [Violation(field, f"must be at most {limit} printable ASCII characters")]
    return []


def _prompt(request: inference_pb2.GenerateRequest, model: ModelLimits) -> list[Violation]:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return check_text("prompt.text", request.text)
    if kind == "chat":
        return check_chat("prompt.chat", request.chat)
    if kind == "token_ids":
        length = len(request.token_ids.ids)
        found = prompt_violations("prompt.token_ids", length, model)
        return found or check_token_ids("prompt.token_ids.ids", request.token_ids.ids, model.vocab_size)
    return [Violation("prompt", "is not set: give text, token_ids or chat")]


def check_text(field: str, text: str) -> list[Violation]:
    """A text to be tokenized: not empty, and not too large to try."""
    limit = int(CEILINGS["prompt.text.bytes"].highest)
    if not text:
        return [Violation(field, "is empty")]
    # One character is one to four bytes: encode only what can be within the limit.
    if len(text) > limit or (len(text) * 4 > limit and len(text.encode()) > limit):
        return [Violation(field, f"must have at most {limit} bytes")]
    return []


def check_chat(field: str, chat: inference_pb2.ChatPrompt) -> list[Violation]:
    """A conversation: messages with roles, and not too large to try."""
    count_limit = int(CEILINGS["prompt.chat.messages"].highest)
    byte_limit = int(CEILINGS["prompt.chat.bytes"].highest)
    role_limit = int(CEILINGS["prompt.chat.messages.role.length"].highest)
    if not chat.messages:
        return [Violation(f"{field}.messages", "is empty")]
    if len(chat.messages) > count_limit:
        return [Violation(f"{field}.messages", f"has more than {count_limit} messages")]
    found = [
        Violation(f"{field}.messages[{position}].role", f"must have 1 to {role_limit} characters")
        for position, message in enumerate(chat.messages)
        if not 1 <= len(message.role) <= role_limit
    ]
    if chat.ByteSize() > byte_limit:
        found.append(Violation(field, f"must have at most {byte_limit} bytes"))
    return found


def check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> list[Violation]:
    """Ids below the vocabulary size; the first wrong one is named. Call it after the length check."""
    if not ids or max(ids) < vocab_size:
        return []
    position = next(position for position, token_id in enumerate(ids) if token_id >= vocab_size)
    return [Violation(f"{field}[{position}]", f"must be below the vocabulary size {vocab_size}")]


def _number(field: str, value: float, key: str | None = None) -> list[Violation]:
    """A float within its ceiling: finite, and not so small that it only can be a mistake (denormal)."""
    ceiling = CEILINGS[key or field]
    if not math.isfinite(value) or not ceiling.lowest <= value <= ceiling.highest:
        return [Violation(field, f"must be a number from {ceiling.lowest:g} to {ceiling.highest:g}")]
    if value != 0.0 and abs(value) < SMALLEST_NORMAL and field != "sampling.temperature":
        return [Violation(field, "is too close to zero to be a normal float32: give 0 instead")]
    return []


def _count(field: str, value: int, key: str | None = None) -> list[Violation]:
    highest = int(CEILINGS[key or field].highest)
    if value <= highest:
        return []
    is_list = key is not None and key.endswith(".entries")
    return [Violation(field, f"must have at most {highest} entries" if is_list else f"must be at most {highest}")]


def _sampling(sampling: inference_pb2.SamplingParams, model: ModelLimits) -> list[Violation]:
    found: list[Violation] = []
    for name in FLOAT_FIELDS:
        if sampling.HasField(name):
            found += _number(f"sampling.{name}", getattr(sampling, name))
    if sampling.HasField("top_p") and sampling.top_p == 0.0:
        found.append(Violation("sampling.top_p", "must be above 0"))
    found += _count("sampling.n", sampling.n)
    found += _count("sampling.beam_width", sampling.beam_width)
    if sampling.beam_width > 1:
        if sampling.n > sampling.beam_width:
            found.append(Violation("sampling.n", "must not be larger than beam_width"))
        if sampling.HasField("temperature") and sampling.temperature >= GREEDY_BELOW:
            found.append(Violation("sampling.temperature", "must be 0 or unset with beam_width above 1"))
        # Beams are compared by log-probabilities, which are raw: what changes logits has no say.
        for name, neutral in NEUTRAL_PENALTIES.items():
            if sampling.HasField(name) and getattr(sampling, name) != neutral:
                found.append(Violation(f"sampling.{name}", f"must be {neutral:g} or unset with beam_width above 1"))
        if sampling.logit_bias:
            found.append(Violation("sampling.logit_bias", "must be empty with beam_width above 1"))
    found += _logit_bias(sampling, model)
    return found


def _logit_bias(sampling: inference_pb2.SamplingParams, model: ModelLimits) -> list[Violation]:
    too_many = _count("sampling.logit_bias", len(sampling.logit_bias), "sampling.logit_bias.entries")
    if too_many:
        return too_many
    found: list[Violation] = []
    for token_id, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        if token_id >= model.vocab_size:
            found.append(Violation(field, f"must be below the vocabulary size {model.vocab_size}"))
        found += _number(field, bias, "sampling.logit_bias.value")
        if found:
            break  # one wrong entry says enough; a list of a thousand says less
    return found


def _stop(stop: inference_pb2.StopParams, model: ModelLimits, has_tokenizer: bool) -> list[Violation]:
    found: list[Violation] = []
    if stop.max_tokens and stop.min_tokens > stop.max_tokens:
        found.append(Violation("stop.min_tokens", "must not be larger than max_tokens"))
    if stop.min_tokens >= model.max_model_len:
        found.append(Violation("stop.min_tokens", f"must be below the model's context of {model.max_model_len} tokens"))
    found += _stop_strings(stop.stop, has_tokenizer)
    too_many = _count("stop.stop_token_ids", len(stop.stop_token_ids), "stop.stop_token_ids.entries")
    return found + (too_many or check_token_ids("stop.stop_token_ids", stop.stop_token_ids, model.vocab_size))


def _stop_strings(strings: Sequence[str], has_tokenizer: bool) -> list[Violation]:
    too_many = _count("stop.stop", len(strings), "stop.stop.entries")
    if too_many or not strings:
        return too_many
    if not has_tokenizer:
        return [Violation("stop.stop", "cannot be searched for: this gateway has no tokenizer; use stop_token_ids")]
    limit = int(CEILINGS["stop.stop.length"].highest)
    return [
        Violation(f"stop.stop[{position}]", f"must have 1 to {limit} characters")
        for position, string in enumerate(strings)
        if not 1 <= len(string) <= limit
    ]


def _output(output: inference_pb2.OutputOptions) -> list[Violation]:
    found = _count("output.logprobs", output.logprobs)
    return found + _count("output.prompt_logprobs", output.prompt_logprobs)


def _resolved_sampling(sampling: inference_pb2.SamplingParams, model: ModelLimits) -> inference_pb2.SamplingParams:
    """Fills in defaults and gives equal meanings one form, so that nobody behind has to know them."""
    result = inference_pb2.SamplingParams()
    result.CopyFrom(sampling)
    if not result.HasField("temperature"):
        result.temperature = 0.0 if result.beam_width > 1 else 1.0
    if result.temperature < GREEDY_BELOW:
        result.temperature = 0.0
    if not result.HasField("top_p"):
        result.top_p = 1.0
    if not result.HasField("repetition_penalty"):
        result.repetition_penalty = 1.0
    if result.top_k >= model.vocab_size:
        result.top_k = 0  # all: and no number beyond int32 goes further
    result.n = result.n or 1
    return result
