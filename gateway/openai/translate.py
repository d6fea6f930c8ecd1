"""OpenAI's request bodies as GenerateRequests, and the validator's paths as OpenAI's field names.

Fields beyond OpenAI's have the names and the meaning that they have in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway import validator
from gateway.ceilings import CEILINGS
from gateway.errors import RequestError, Violation, invalid
from gateway.openai.fields import UINT32, Fields, is_integer
from gateway.validator import ModelLimits
from pagewire.v1 import inference_pb2

COMPLETION_MAX_TOKENS = 16
"""Output tokens of /v1/completions when the request does not say (OpenAI's API reference)."""
INT32_MAX = (1 << 31) - 1
INT64_MIN, UINT64_MAX = -(1 << 63), (1 << 64) - 1

NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "truncate_prompt_tokens": (),
}
"""Fields that would change the answer if they were obeyed, with the values that ask for nothing. They are refused
rather than ignored: a client that asks for JSON must not get prose."""

NAMES = {
    "stop.include_stop": "include_stop_str_in_output",
    "output.prompt_logprobs": "logprobs",
    "prompt.chat.messages": "messages",
    "prompt.chat": "messages",
}
PREFIXES = ("sampling.", "stop.", "output.")


@dataclass(frozen=True)
class Ask:
    """What one HTTP request asks for."""

    requests: list[inference_pb2.GenerateRequest]
    """One per prompt."""
    model: str
    """The served name, for the answer."""
    n: int
    """Choices per prompt."""
    chat: bool
    stream: bool
    include_usage: bool
    """The last event of a stream says the usage."""
    logprobs: bool
    token_ids: bool
    """Token ids are wanted beside the text (vLLM's return_token_ids)."""
    prompt_only: bool
    """max_tokens was 0: the one token that is generated all the same is not shown."""
    batch: bool
    """The prompt was a list of prompts, so violations name the place."""

    def renamed(self, error: RequestError, place: int = 0) -> RequestError:
        """The error with its violations under OpenAI's field names."""
        return renamed(error, lambda path: self._name(path, place))

    def _name(self, path: str, place: int) -> str:
        at = f"prompt[{place}]" if self.batch else "prompt"
        if path == "output.logprobs":
            return "top_logprobs" if self.chat else "logprobs"
        if path == "sampling.beam_width":
            return width_name(self.requests[place])
        return field_name(path, {"prompt.token_ids.ids": at, "prompt.token_ids": at, "prompt.text": at})


def renamed(error: RequestError, name: Callable[[str], str]) -> RequestError:
    """The error with its violations under the names that `name` gives for their paths."""
    if not error.violations:
        return error
    mended = invalid([Violation(name(violation.field), violation.description) for violation in error.violations])
    mended.code, mended.reason = error.code, error.reason
    return mended


def width_name(request: inference_pb2.GenerateRequest) -> str:
    """The field that has said how many beams there are."""
    return "n" if request.sampling.beam_width == request.sampling.n else "best_of"


def field_name(path: str, prompts: Mapping[str, str]) -> str:
    """The flat name, as OpenAI's and vLLM's requests have it, of a path in GenerateRequest.

    Args:
        path: the validator's.
        prompts: names of the prompt's fields by path, longer ones first.
    """
    for prefix, name in {**prompts, **NAMES}.items():
        if path.startswith(prefix):
            return name + path.removeprefix(prefix)
    for prefix in PREFIXES:
        if path.startswith(prefix):
            return path.removeprefix(prefix)
    return path


@dataclass(frozen=True)
class Caller:
    """What is known of a request beside its body."""

    request_id: str
    """Name for the request in the scheduler, unless the body has one."""
    tenant: str | None
    """Of the API key; None: no keys are asked for."""


def completion(data: dict[str, Any], model: ModelLimits, caller: Caller) -> Ask:
    """A body of /v1/completions. Raises RequestError for wrong types and for what cannot be obeyed."""
    fields = Fields(data)
    common = read_common(fields, caller)
    if fields.raw("suffix") not in (None, ""):
        fields.wrong("suffix", "is not supported: the model completes text, it does not fill in")
    if fields.raw("tools"):
        fields.wrong("tools", "are not supported")
    if fields.raw("add_special_tokens") not in (None, True):
        fields.wrong("add_special_tokens", "must be true here: send token ids to decide about special tokens")
    echo = fields.flag("echo")
    logprobs = fields.integer("logprobs")
    max_tokens = fields.integer("max_tokens")
    if max_tokens == 0 and not echo:
        fields.wrong("max_tokens", "must be at least 1 without echo")
    prompts, batch = _prompts(fields, model)
    fields.check()
    prompt_only = max_tokens == 0
    common.stop.max_tokens = 1 if prompt_only else _max_tokens(max_tokens, common, COMPLETION_MAX_TOKENS)
    common.output.echo = echo
    if logprobs is not None:
        common.output.logprobs = logprobs
        if echo:
            common.output.prompt_logprobs = logprobs
    if prompt_only:
        # The echo is made from the ids alone, so that it ends where the prompt ends.
        common.output.token_ids_only = True
    requests: list[inference_pb2.GenerateRequest] = []
    for place, prompt in enumerate(prompts):
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(common)
        if batch:
            request.request_id = f"{common.request_id}-{place}"
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        requests.append(request)
    return Ask(
        requests=requests,
        model=model.name,
        n=max(1, common.sampling.n),
        chat=False,
        stream=fields.flag("stream"),
        include_usage=_include_usage(fields),
        logprobs=logprobs is not None,
        token_ids=fields.flag("return_token_ids"),
        prompt_only=prompt_only,
        batch=batch,
    )


def chat(data: dict[str, Any], model: ModelLimits, caller: Caller) -> Ask:
    """A body of /v1/chat/completions. Raises RequestError for wrong types and for what cannot be obeyed."""
    fields = Fields(data)
    request = read_common(fields, caller)
    if fields.raw("tools") and fields.raw("tool_choice") != "none":
        fields.wrong("tools", "are not supported")
    if fields.raw("add_generation_prompt") not in (None, True):
        fields.wrong("add_generation_prompt", "must be true")
    if fields.raw("add_special_tokens") not in (None, False):
        fields.wrong("add_special_tokens", "must be false: the chat template writes special tokens itself")
    if fields.flag("echo"):
        fields.wrong("echo", "is not supported in chats")
    fields.integer("n")
    logprobs = fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs")
    if top_logprobs is not None and not logprobs:
        fields.wrong("top_logprobs", "needs logprobs to be true")
    name = "max_completion_tokens" if fields.raw("max_completion_tokens") is not None else "max_tokens"
    max_tokens = fields.integer(name, lowest=1)
    _messages(fields, request.chat)
    fields.check()
    # OpenAI's chats run until the model ends them, or the context does.
    request.stop.max_tokens = _max_tokens(max_tokens, request, UINT32)
    if logprobs:
        request.output.logprobs = top_logprobs or 0
    return Ask(
        requests=[request],
        model=model.name,
        n=max(1, request.sampling.n),
        chat=True,
        stream=fields.flag("stream"),
        include_usage=_include_usage(fields),
        logprobs=logprobs,
        token_ids=fields.flag("return_token_ids"),
        prompt_only=False,
        batch=False,
    )


def read_common(fields: Fields, caller: Caller) -> inference_pb2.GenerateRequest:
    """What both kinds of request have. Reads every field, so that all wrong ones are named at once."""
    for name, harmless in NOT_BUILT.items():
        value = fields.raw(name)
        if value is not None and value not in harmless:
            fields.wrong(name, "is not supported")
    request = inference_pb2.GenerateRequest(
        request_id=fields.text("request_id") or caller.request_id,
        model=fields.text("model"),
        tenant=_tenant(fields, caller),
    )
    sampling, stop = request.sampling, request.stop
    for name in validator.FLOAT_FIELDS:
        value = fields.number(name)
        if value is not None:
            setattr(sampling, name, value)
    top_k = fields.integer("top_k", lowest=-1)
    sampling.top_k = max(0, top_k or 0)  # -1 is vLLM's old way to say: all
    sampling.n = fields.integer("n") or 0
    seed = fields.integer("seed", lowest=INT64_MIN, highest=UINT64_MAX)
    if seed is not None:
        sampling.seed = seed % (UINT64_MAX + 1)
    best_of = fields.integer("best_of", lowest=1)
    n = max(1, sampling.n)
    if fields.flag("use_beam_search"):
        # vLLM's old way to name a width beyond n.
        sampling.beam_width = best_of or n
        if best_of == 1 and n > 1:
            fields.wrong("best_of", "must not be below n")
        if not sampling.HasField("temperature"):
            sampling.temperature = 0.0
    elif best_of not in (None, n):
        fields.wrong("best_of", "must be equal to n: choosing among more samples is not supported")
    for token_id, bias in fields.biases("logit_bias").items():
        sampling.logit_bias[token_id] = bias
    stop.min_tokens = fields.integer("min_tokens") or 0
    stop.stop.extend(fields.texts("stop", "stop.stop.entries"))
    stop.stop_token_ids.extend(fields.integers("stop_token_ids", "stop.stop_token_ids.entries"))
    stop.ignore_eos = fields.flag("ignore_eos")
    stop.include_stop = fields.flag("include_stop_str_in_output")
    # vLLM runs lower numbers first, we run higher ones first.
    request.priority = -(fields.integer("priority", lowest=-INT32_MAX, highest=INT32_MAX) or 0)
    fields.flag("stream")
    fields.flag("return_token_ids")
    _include_usage(fields)
    return request


def _tenant(fields: Fields, caller: Caller) -> str:
    """The tenant: the API key's, or what the body says where no keys are asked for; split further by vLLM's salt."""
    named = fields.text("tenant")
    tenant = named if caller.tenant is None else caller.tenant
    salt = fields.text("cache_salt")
    return f"{tenant}/{salt}" if salt else tenant


def _include_usage(fields: Fields) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    wanted = options.flag("include_usage")
    fields.take(options)
    if fields.raw("stream") is not True:
        fields.wrong("stream_options", "needs stream to be true")
    return wanted


def _max_tokens(given: int | None, request: inference_pb2.GenerateRequest, default: int) -> int:
    return max(default, request.stop.min_tokens) if given is None else given


def _prompts(fields: Fields, model: ModelLimits) -> tuple[list[str | list[int]], bool]:
    """The prompts, and whether they came as a list of prompts."""
    value = fields.raw("prompt")
    if isinstance(value, str):
        return [value], False
    if not isinstance(value, list) or not value:
        fields.wrong("prompt", "is empty" if value == [] else "must be a string, token ids, or a list of either")
        return [], False
    if is_integer(value[0]):
        return [_token_ids(fields, "prompt", value, model)], False
    highest = int(CEILINGS["prompt.entries"].highest)
    if len(value) > highest:
        fields.wrong("prompt", f"must have at most {highest} entries")
        return [], True
    prompts: list[str | list[int]] = []
    for place, entry in enumerate(value):
        if isinstance(entry, list) and type(entry) is type(value[0]):
            prompts.append(_token_ids(fields, f"prompt[{place}]", entry, model))
        elif isinstance(entry, str) and type(entry) is type(value[0]):
            prompts.append(entry)
        else:
            fields.wrong(f"prompt[{place}]", "must be a string, or token ids, as the others are")
            break
    return prompts, True


def _token_ids(fields: Fields, name: str, ids: list[Any], model: ModelLimits) -> list[int]:
    """Token ids that GenerateRequest can carry. The length comes first: a long list is not looked through."""
    if violations := validator.prompt_violations("prompt.token_ids", len(ids), model):
        reason = validator.reason_for(violations)
        raise invalid([Violation(name, violation.description) for violation in violations], reason)
    for place, token_id in enumerate(ids):
        if not is_integer(token_id) or token_id < 0:
            fields.wrong(f"{name}[{place}]", "must be a whole number from 0")
            return []
    return [min(token_id, UINT32) for token_id in ids]


def _messages(fields: Fields, prompt: inference_pb2.ChatPrompt) -> None:
    prompt.SetInParent()
    for place, entry in enumerate(fields.entries("messages", "prompt.chat.messages")):
        if not isinstance(entry, dict):
            fields.wrong(f"messages[{place}]", "must be an object")
            return
        message = Fields(entry, f"messages[{place}].")
        role = message.text("role")
        if message.raw("tool_calls") or message.raw("function_call"):
            message.wrong("tool_calls", "are not supported")
        content = _content(message)
        fields.take(message)
        if message.violations:
            return
        prompt.messages.add(role=role, content=content)


def _content(message: Fields) -> str:
    """The text of a message: a string, or parts of text, which are joined by line breaks as vLLM does."""
    content = message.raw("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        message.wrong("content", "must be a string or a list of parts")
        return ""
    texts: list[str] = []
    for place, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            known = isinstance(part, dict) and part.get("type") == "text"
            where = f"content[{place}]" + (".text" if known else ".type" if isinstance(part, dict) else "")
            message.wrong(where, "must be a string" if known else "must be text: the model takes nothing else")
            break
    return "\n".join(texts)
