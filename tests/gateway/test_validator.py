"""The validator: every field has a ceiling, nothing non-finite passes, and nothing makes it raise."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import validator
from gateway.ceilings import CEILINGS
from gateway.errors import Reason
from gateway.validator import ModelLimits, ResolvedRequest, validate
from pagewire.v1 import inference_pb2

MODEL = ModelLimits(name="tiny", vocab_size=100, max_model_len=50)
LARGEST = 2**32 - 1
DENORMAL = 1e-42


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    fields.setdefault("token_ids", inference_pb2.TokenIds(ids=[1, 2, 3]))
    return inference_pb2.GenerateRequest(**fields)


def paths(message: inference_pb2.GenerateRequest, *, has_tokenizer: bool = True) -> list[str]:
    result = validate(message, MODEL, has_tokenizer=has_tokenizer)
    return [] if isinstance(result, ResolvedRequest) else [violation.field for violation in result]


def sampling(**fields: Any) -> inference_pb2.GenerateRequest:
    return request(sampling=inference_pb2.SamplingParams(**fields))


def stop(**fields: Any) -> inference_pb2.GenerateRequest:
    return request(stop=inference_pb2.StopParams(**fields))


def output(**fields: Any) -> inference_pb2.GenerateRequest:
    return request(output=inference_pb2.OutputOptions(**fields))


FLOATS = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0101, 100.0),
    "presence_penalty": (-10.0, 10.0),
    "frequency_penalty": (-10.0, 10.0),
    "length_penalty": (-10.0, 10.0),
}


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_is_taken_at_both_ends_of_its_range_and_refused_beyond(name: str) -> None:
    lowest, highest = FLOATS[name]
    for good in (lowest, highest):
        assert paths(sampling(**{name: good})) == []
    for bad in (lowest - 0.5, highest + 0.01, math.nan, math.inf, -math.inf, -DENORMAL - 20, 3.4e38):
        assert paths(sampling(**{name: bad})) == [f"sampling.{name}"], bad


@pytest.mark.parametrize("name", [name for name in FLOATS if name != "temperature"])
def test_a_denormal_is_refused(name: str) -> None:
    assert f"sampling.{name}" in paths(sampling(**{name: DENORMAL}))


def test_temperatures_near_zero_count_as_zero() -> None:
    for value in (0.0, DENORMAL, 9e-6):
        resolved = validate(sampling(temperature=value), MODEL, has_tokenizer=True)
        assert isinstance(resolved, ResolvedRequest)
        assert resolved.sampling.temperature == 0.0
    assert paths(sampling(temperature=-DENORMAL)) == ["sampling.temperature"]


COUNTS = [
    ("sampling.n", lambda value: sampling(n=value), 128),
    ("sampling.beam_width", lambda value: sampling(beam_width=value), 32),
    ("output.logprobs", lambda value: output(logprobs=value), 20),
    ("output.prompt_logprobs", lambda value: output(prompt_logprobs=value), 20),
    ("stop.min_tokens", lambda value: stop(min_tokens=value), MODEL.max_model_len - 1),
]


@pytest.mark.parametrize(("path", "make", "highest"), COUNTS, ids=[path for path, _, _ in COUNTS])
def test_a_count_is_taken_at_its_ceiling_and_refused_above(path: str, make: Any, highest: int) -> None:
    assert paths(make(highest)) == []
    for value in (highest + 1, 2**31 - 1, LARGEST):
        assert paths(make(value)) == [path]


LISTS = [
    ("stop.stop", lambda count: stop(stop=["x"] * count), 16),
    ("stop.stop_token_ids", lambda count: stop(stop_token_ids=[1] * count), 128),
    ("prompt.token_ids", lambda count: request(token_ids=inference_pb2.TokenIds(ids=[1] * count)), 49),
]


@pytest.mark.parametrize(("path", "make", "highest"), LISTS, ids=[path for path, _, _ in LISTS])
def test_a_list_is_taken_at_its_ceiling_and_refused_above(path: str, make: Any, highest: int) -> None:
    assert paths(make(highest)) == []
    for count in (highest + 1, 100_000):
        assert paths(make(count)) == [path]


def test_logit_bias_is_limited_in_number_ids_and_values() -> None:
    assert paths(sampling(logit_bias=dict.fromkeys(range(100), 100.0))) == []
    assert paths(sampling(logit_bias=dict.fromkeys(range(1025), 0.5))) == ["sampling.logit_bias"]
    assert paths(sampling(logit_bias={100: 0.5})) == ["sampling.logit_bias[100]"]
    for bad in (math.nan, math.inf, 100.5, -100.5, DENORMAL):
        assert paths(sampling(logit_bias={7: bad})) == ["sampling.logit_bias[7]"]


def test_token_ids_must_be_below_the_vocabulary_and_the_first_wrong_one_is_named() -> None:
    assert paths(request(token_ids=inference_pb2.TokenIds(ids=[0, 99]))) == []
    assert paths(request(token_ids=inference_pb2.TokenIds(ids=[0, 99, 1, 100, LARGEST]))) == ["prompt.token_ids.ids[3]"]
    assert paths(stop(stop_token_ids=[5, 100])) == ["stop.stop_token_ids[1]"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"token_ids": None}, "prompt"),
        ({"token_ids": inference_pb2.TokenIds()}, "prompt.token_ids"),
        ({"token_ids": None, "text": ""}, "prompt.text"),
        ({"token_ids": None, "text": "x" * ((2 << 20) + 1)}, "prompt.text"),
        ({"token_ids": None, "text": "é" * ((1 << 20) + 1)}, "prompt.text"),
        ({"token_ids": None, "chat": inference_pb2.ChatPrompt()}, "prompt.chat.messages"),
        (
            {"token_ids": None, "chat": inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(content="x")])},
            "prompt.chat.messages[0].role",
        ),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "ü"}, "request_id"),
        ({"tenant": "\x00"}, "tenant"),
    ],
)
def test_prompts_and_names_that_are_none_are_refused(fields: dict[str, Any], path: str) -> None:
    assert paths(request(**fields)) == [path]


def test_names_of_128_printable_characters_are_taken() -> None:
    assert paths(request(request_id="~" * 128, tenant=" " * 128)) == []


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (stop(min_tokens=6, max_tokens=5), "stop.min_tokens"),
        (sampling(beam_width=4, temperature=0.5), "sampling.temperature"),
        (sampling(beam_width=4, n=5), "sampling.n"),
        (sampling(beam_width=4, presence_penalty=0.5), "sampling.presence_penalty"),
        (sampling(beam_width=4, repetition_penalty=0.5), "sampling.repetition_penalty"),
        (sampling(beam_width=4, logit_bias={5: 1.0}), "sampling.logit_bias"),
        (stop(stop=[""]), "stop.stop[0]"),
        (stop(stop=["ok", "x" * 257]), "stop.stop[1]"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(message: Any, path: str) -> None:
    assert paths(message) == [path]


def test_an_unset_temperature_of_a_beam_search_is_zero_and_penalties_that_change_nothing_pass() -> None:
    message = sampling(beam_width=4, n=4, repetition_penalty=1.0, frequency_penalty=0.0)
    resolved = validate(message, MODEL, has_tokenizer=True)
    assert isinstance(resolved, ResolvedRequest)
    assert resolved.sampling.temperature == 0.0


def test_all_wrong_fields_are_named_at_once() -> None:
    message = sampling(temperature=-1, n=1000)
    message.request_id = "\x7f"
    assert paths(message) == ["request_id", "sampling.temperature", "sampling.n"]


def test_stop_strings_need_a_tokenizer() -> None:
    assert paths(stop(stop=["x"]), has_tokenizer=False) == ["stop.stop"]


def test_defaults_are_filled_in() -> None:
    resolved = validate(sampling(top_k=LARGEST), MODEL, has_tokenizer=True)
    assert isinstance(resolved, ResolvedRequest)
    done = resolved.sampling
    assert (done.temperature, done.top_p, done.repetition_penalty, done.n, done.top_k) == (1.0, 1.0, 1.0, 1, 0)
    assert not done.HasField("seed")


@pytest.mark.parametrize(
    ("given_max", "given_min", "prompt", "expected"),
    [(0, 0, 10, (16, 0)), (0, 20, 10, (20, 20)), (0, 0, 45, (5, 0)), (LARGEST, 0, 10, (40, 0)), (0, 40, 45, (5, 5))],
)
def test_max_tokens_is_the_default_or_cut_to_the_context(
    given_max: int, given_min: int, prompt: int, expected: tuple[int, int]
) -> None:
    stops = inference_pb2.StopParams(max_tokens=given_max, min_tokens=given_min)
    done = validator.cut_to_context(stops, prompt, MODEL, 16)
    assert (done.max_tokens, done.min_tokens) == expected


def test_a_prompt_that_fills_the_context_has_its_own_reason() -> None:
    found = validator.prompt_violations("prompt.text", 50, MODEL)
    assert validator.reason_for(found) == Reason.PROMPT_TOO_LONG
    assert validator.prompt_violations("prompt.text", 49, MODEL) == []


wild_float = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, DENORMAL, 1e-6, 1.0, 100.0])
)
wild_count = st.one_of(st.integers(0, 300), st.sampled_from([2**31 - 1, LARGEST]))


@given(
    floats=st.dictionaries(st.sampled_from(sorted(FLOATS)), wild_float),
    n=wild_count,
    beam_width=wild_count,
    bias=st.dictionaries(wild_count, wild_float, max_size=5),
    limits=st.tuples(wild_count, wild_count),
    ids=st.lists(wild_count, max_size=60),
    name=st.text(max_size=5),
    stops=st.lists(st.text(max_size=300), max_size=20),
)
@settings(max_examples=500, deadline=None)
def test_nothing_raises_and_what_passes_is_finite_and_within_bounds(
    floats: dict[str, float],
    n: int,
    beam_width: int,
    bias: dict[int, float],
    limits: tuple[int, int],
    ids: list[int],
    name: str,
    stops: list[str],
) -> None:
    message = inference_pb2.GenerateRequest(
        request_id=name,
        token_ids=inference_pb2.TokenIds(ids=ids),
        sampling=inference_pb2.SamplingParams(n=n, beam_width=beam_width, logit_bias=bias, **floats),
        stop=inference_pb2.StopParams(max_tokens=limits[0], min_tokens=limits[1], stop=stops),
    )
    resolved = validate(message, MODEL, has_tokenizer=True)
    if isinstance(resolved, list):
        assert resolved
        assert all(violation.field and violation.description for violation in resolved)
        return
    done = resolved.sampling
    for field in FLOATS:
        value = getattr(done, field)
        assert math.isfinite(value)
        assert value == 0.0 or abs(value) > 1e-37
    assert 1 <= done.n <= 128
    assert all(math.isfinite(value) and token_id < 100 for token_id, value in done.logit_bias.items())
    assert all(token_id < 100 for token_id in ids)
    cut = validator.cut_to_context(resolved.stop, len(ids), MODEL, 16)
    assert 1 <= cut.max_tokens <= 50 - len(ids)
    assert cut.min_tokens <= cut.max_tokens


def documented(section: str) -> set[str]:
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    part = text.split(f"## {section}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)`", part, re.MULTILINE))


def test_the_documents_table_of_ceilings_is_the_one_in_use() -> None:
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    for path, ceiling in CEILINGS.items():
        assert f"| `{path}` | {ceiling.lowest:,.10g} to {ceiling.highest:,.10g} | {ceiling.reason} |" in text
    assert documented("Ceilings") == set(CEILINGS)
