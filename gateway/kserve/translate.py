"""ModelInferRequest as GenerateRequest. Names are those of Triton's vLLM backend, sampling parameters those of vLLM.

A parameter may come in the JSON of the input `sampling_parameters`, as a request parameter, or as an input tensor of
its name; the later of these wins. Numbers and flags may be written as strings, as the backend's own client does.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway import validator
from gateway.errors import RequestError, Violation, invalid
from gateway.kserve import tensors
from gateway.openai import translate as flat
from gateway.openai.fields import UINT32, Fields, parse_object
from gateway.validator import ModelLimits
from pagewire.v1 import inference_pb2
from pagewire.v1 import open_inference_pb2 as oip

TEXT, TOKEN_IDS, SAMPLING = "text_input", "input_ids", "sampling_parameters"
LISTS = frozenset({"stop", "stop_token_ids"})
FLOATS = frozenset(validator.FLOAT_FIELDS)
INTEGERS = frozenset({"max_tokens", "min_tokens", "top_k", "n", "seed", "priority", "logprobs", "best_of", "timeout"})
FLAGS = frozenset({"stream", "exclude_input_in_output", "ignore_eos", "include_stop_str_in_output", "use_beam_search"})
NAMES = frozenset({"request_id", "tenant", "cache_salt"})
ACCEPTED = frozenset(
    {
        "return_finish_reason",
        "return_cumulative_logprob",
        "return_logprobs",
        "return_num_input_tokens",
        "return_num_output_tokens",
    }
)
"""Inputs of the vLLM backend that ask for outputs. Here `outputs` does, and without it all come but `SCORES`, for which
two of these ask."""
TENSORS = LISTS | FLOATS | INTEGERS | FLAGS | NAMES | ACCEPTED
OUTPUTS = {
    "text_output": "BYTES",
    "output_ids": "INT32",
    "finish_reason": "BYTES",
    "index": "INT32",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
    "logprobs": "BYTES",
    "cumulative_logprob": "FP32",
}
"""Output tensors and their datatypes."""
SCORES = frozenset({"logprobs", "cumulative_logprob"})
"""Outputs that come only to who asks for log-probabilities: for every token they are work on the worker."""
PROMPTS = {"prompt.token_ids.ids": TOKEN_IDS, "prompt.token_ids": TOKEN_IDS, "prompt.text": TEXT, "prompt": TEXT}
EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"


@dataclass(frozen=True)
class Ask:
    """What one ModelInferRequest asks for."""

    request: inference_pb2.GenerateRequest
    model: str
    """The served name."""
    id: str
    """The client's, for the answers; it need not be unique."""
    stream: bool | None
    """None: not said."""
    outputs: tuple[str, ...]
    raw: bool
    """Outputs go as raw contents."""
    empty_final: bool
    """The stream is to be ended by a response without outputs."""
    timeout_ns: int | None
    """From the request's own `timeout`, which is in microseconds."""


def read(message: oip.ModelInferRequest, model: ModelLimits) -> Ask:
    """What a message asks for. Raises RequestError for what GenerateRequest cannot carry."""
    inputs = tensors.read(message)
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for name, value in message.parameters.items()
    }
    fields = Fields(_merged(inputs, parameters))
    request = flat.read_common(fields, flat.Caller(request_id=uuid.uuid4().hex, tenant=None))
    request.model = message.model_name
    request.stop.max_tokens = fields.integer("max_tokens", lowest=1) or 0
    if (logprobs := fields.integer("logprobs")) is not None:
        request.output.logprobs = logprobs
    exclude = fields.flag("exclude_input_in_output") if fields.raw("exclude_input_in_output") is not None else True
    request.output.echo = not exclude
    timeout = fields.integer("timeout")
    scores_asked_for = [fields.flag("return_logprobs"), fields.flag("return_cumulative_logprob")]
    _prompt(fields, request, inputs, model)
    fields.check()
    outputs = tuple(output.name for output in message.outputs) or tuple(OUTPUTS)
    if unknown := [place for place, name in enumerate(outputs) if name not in OUTPUTS]:
        raise invalid([Violation(f"outputs[{unknown[0]}].name", f"must be one of {', '.join(OUTPUTS)}")])
    scored = request.output.HasField("logprobs")
    if not scored and (any(scores_asked_for) or any(output.name in SCORES for output in message.outputs)):
        request.output.logprobs = 0  # the output tokens' own, no others beside them
    elif not scored:
        outputs = tuple(name for name in outputs if name not in SCORES)
    if "text_output" not in outputs and not request.stop.stop:
        request.output.token_ids_only = True
    return Ask(
        request=request,
        model=model.name,
        id=message.id,
        stream=None if fields.raw("stream") is None else fields.flag("stream"),
        outputs=tuple(dict.fromkeys(outputs)),
        raw=bool(message.raw_input_contents),
        empty_final=parameters.get(EMPTY_FINAL) is True,
        timeout_ns=timeout * 1000 if timeout else None,
    )


def renamed(error: RequestError, request: inference_pb2.GenerateRequest) -> RequestError:
    """The error with its violations under the names of inputs and parameters."""
    names = {**PROMPTS, "sampling.beam_width": flat.width_name(request)}
    return flat.renamed(error, lambda path: flat.field_name(path, names))


def _merged(inputs: dict[str, Sequence[Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """Every parameter by its name."""
    merged: dict[str, Any] = {}
    if SAMPLING in inputs and (text := _text(SAMPLING, _one(SAMPLING, inputs[SAMPLING]))).strip():
        merged |= parse_object(text.encode())
    merged |= parameters
    for name, values in inputs.items():
        if name in (TEXT, TOKEN_IDS, SAMPLING):
            continue
        if name not in TENSORS:
            raise invalid([Violation(name, "is no input of this model: see ModelMetadata")])
        if name in LISTS:
            merged[name] = [_text(name, value) if isinstance(value, bytes) else value for value in values]
        else:
            value = _one(name, values)
            merged[name] = _text(name, value) if isinstance(value, bytes) else value
    return {name: _loosened(name, value) for name, value in merged.items()}


def _one(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise invalid([Violation(name, "must have one element: a request has one prompt")])
    return values[0]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, bytes):
        raise invalid([Violation(name, "must be of datatype BYTES")])
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise invalid([Violation(name, "must be UTF-8")]) from None


def _loosened(name: str, value: Any) -> Any:
    """A number or a flag that was written as a string; anything else as it is."""
    if not isinstance(value, str) or len(value) > 32:
        return value
    if name in FLAGS:
        return {"true": True, "false": False}.get(value.lower(), value)
    kinds: tuple[type, ...] = (int,) if name in INTEGERS else (float,) if name in FLOATS else ()
    for kind in kinds:
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _prompt(
    fields: Fields, request: inference_pb2.GenerateRequest, inputs: dict[str, Sequence[Any]], model: ModelLimits
) -> None:
    if (TEXT in inputs) == (TOKEN_IDS in inputs):
        fields.wrong(TEXT, f"is needed, or {TOKEN_IDS}, and not both")
    elif TEXT in inputs:
        request.text = _text(TEXT, _one(TEXT, inputs[TEXT]))
    else:
        ids = inputs[TOKEN_IDS]
        if violations := validator.prompt_violations("prompt.token_ids", len(ids), model):
            reason = validator.reason_for(violations)
            raise invalid([Violation(TOKEN_IDS, violation.description) for violation in violations], reason)
        for place, token_id in enumerate(ids):
            if type(token_id) is not int or token_id < 0:
                fields.wrong(f"{TOKEN_IDS}[{place}]", "must be a whole number from 0")
                return
        request.token_ids.ids.extend(min(token_id, UINT32) for token_id in ids)
