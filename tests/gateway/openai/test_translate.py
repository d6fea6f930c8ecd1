"""Bodies to GenerateRequests: whatever JSON holds, it is a request or a violation, never another exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ceilings import CEILINGS
from gateway.errors import RequestError
from gateway.openai import translate
from gateway.openai.fields import parse_object
from gateway.openai.translate import NOT_BUILT, Caller
from gateway.validator import FLOAT_FIELDS, ModelLimits

MODEL = ModelLimits(name="tiny", vocab_size=100, max_model_len=50)
CALLER = Caller(request_id="r", tenant=None)
NAMES = [
    *(FLOAT_FIELDS + tuple(NOT_BUILT)),
    *("model", "prompt", "messages", "n", "best_of", "suffix", "echo", "logprobs", "top_logprobs", "max_tokens"),
    *("max_completion_tokens", "min_tokens", "top_k", "seed", "stop", "stop_token_ids", "logit_bias", "priority"),
    *("stream", "stream_options", "request_id", "tenant", "cache_salt", "use_beam_search", "tools", "ignore_eos"),
    *("return_token_ids", "include_stop_str_in_output", "add_special_tokens", "add_generation_prompt", "whatever"),
]
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "5", "x", "tool_calls"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@given(
    body=st.dictionaries(st.sampled_from(NAMES), values, max_size=12), prompt=st.sampled_from(["x", [5], ["x", "y"]])
)
@settings(max_examples=400, deadline=None)
def test_any_json_is_a_request_or_a_violation(body: dict[str, Any], prompt: Any) -> None:
    data = parse_object(json.dumps({"prompt": prompt, "messages": [{"role": "user"}], **body}).encode())
    for translated in (translate.completion, translate.chat):
        refused: RequestError | None = None
        try:
            ask = translated(data, MODEL, CALLER)
        except RequestError as error:
            refused = error
        if refused is not None:
            assert refused.violations
        else:
            assert ask.requests
            assert ask.n >= 1


def test_long_lists_are_cut_one_behind_their_ceiling_so_that_the_validator_refuses_them_uncopied() -> None:
    body = {
        "prompt": [5],
        "stop": ["x"] * 1000,
        "stop_token_ids": [1] * 1000,
        "logit_bias": {str(token): 0 for token in range(5000)},
    }
    (request,) = translate.completion(body, MODEL, CALLER).requests
    assert len(request.stop.stop) == CEILINGS["stop.stop.entries"].highest + 1
    assert len(request.stop.stop_token_ids) == CEILINGS["stop.stop_token_ids.entries"].highest + 1
    assert len(request.sampling.logit_bias) == CEILINGS["sampling.logit_bias.entries"].highest + 1
    (chat,) = translate.chat({"messages": [{"role": "user"}] * 5000}, MODEL, CALLER).requests
    assert len(chat.chat.messages) == CEILINGS["prompt.chat.messages"].highest + 1


def test_a_prompt_of_a_million_ids_is_refused_by_its_length_alone() -> None:
    with pytest.raises(RequestError) as caught:
        translate.completion({"prompt": [0] + [object()] * 1_000_000}, MODEL, CALLER)
    assert caught.value.reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("name", sorted(NOT_BUILT))
def test_what_cannot_be_obeyed_is_refused_and_asking_for_nothing_is_not(name: str) -> None:
    for value in (None, *NOT_BUILT[name]):
        translate.chat({"messages": [{"role": "user"}], name: value}, MODEL, CALLER)
    for translated in (translate.completion, translate.chat):
        with pytest.raises(RequestError) as caught:
            translated({"prompt": "x", "messages": [{"role": "user"}], name: {"some": "thing"}}, MODEL, CALLER)
        assert [violation.field for violation in caught.value.violations] == [name]
