"""Stop strings are found wherever they lie, however the text is cut, and nothing else is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.detokenizer import factory_for
from gateway.sequence_text import SequenceText
from gateway.stop_strings import StopMatcher
from tests.gateway import tiny_tokenizers


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + ("" if matcher.matched else matcher.release()), matcher.matched


letters = st.text(alphabet="ab\n", max_size=30)


@given(text=letters, stop=st.text(alphabet="ab\n", min_size=1, max_size=5), cuts=st.lists(st.integers(0, 30)))
@settings(max_examples=500)
def test_one_stop_string_is_found_where_str_find_finds_it(text: str, stop: str, cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    at = text.find(stop)
    expected = (text, None) if at < 0 else (text[:at], stop)
    assert run(pieces, [stop]) == expected
    with_stop = (text, None) if at < 0 else (text[: at + len(stop)], stop)
    assert run(pieces, [stop], include=True) == with_stop


@given(
    text=letters,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30)),
)
@settings(max_examples=500)
def test_the_result_does_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    assert run(pieces, stops) == run(list(text), stops) == run([text], stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END", "stop"])
    assert matcher.push("the E") == "the "
    assert matcher.push("N") == ""
    assert matcher.push("x st") == "ENx "
    assert matcher.push("amp") == "stamp"
    assert matcher.release() == ""


def test_the_match_that_ends_first_wins_and_of_those_the_longest() -> None:
    assert run(["abcd"], ["abcd", "bc"]) == ("a", "bc")
    assert run(["abcd"], ["cd", "bcd"]) == ("a", "bcd")


def sequence(
    stops: list[str], *, include: bool = False, stop_ids: tuple[int, ...] = (1,), sentencepiece: bool = False
) -> SequenceText:
    make = tiny_tokenizers.sentencepiece_like if sentencepiece else tiny_tokenizers.byte_level
    tokenizer = make()
    text_of = lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)  # noqa: E731
    return SequenceText(
        factory_for(tokenizer)(()), StopMatcher(stops, include), frozenset(stop_ids), text_of if include else None
    )


def letter(char: str) -> int:
    return tiny_tokenizers.byte_level().token_to_id(char)


def test_the_token_that_completes_the_stop_string_is_the_last_that_counts() -> None:
    text = sequence(["bc"])
    shown = [text.push(letter(char)) for char in "abcd"]
    assert (shown, text.matched_stop, text.num_tokens) == (["a", "", "", ""], "bc", 3)


def test_held_text_comes_with_the_token_that_disproves_it_or_at_the_end() -> None:
    text = sequence(["bcd"])
    shown = [text.push(letter(char)) for char in "abcab"]
    assert shown == ["a", "", "", "bca", ""]
    assert text.finish(ended_by_token=False) == "b"


@pytest.mark.parametrize(("include", "expected"), [(False, "a"), (True, "a<eos>")])
def test_the_token_that_ended_the_sequence_is_left_out_unless_wanted(include: bool, expected: str) -> None:
    text = sequence([], include=include)
    shown = text.push(letter("a")) + text.push(1) + text.finish(ended_by_token=True)
    assert shown == expected
    assert text.num_tokens == 2


def test_a_stop_token_that_did_not_end_the_sequence_is_text_like_any_other() -> None:
    text = sequence([], stop_ids=(letter("b"),))
    shown = [text.push(letter(char)) for char in "abc"]
    assert (shown, text.finish(ended_by_token=False)) == (["a", "", "bc"], "")


def test_a_newline_as_byte_token_stops_at_once() -> None:
    tokenizer = tiny_tokenizers.sentencepiece_like()
    text = sequence(["\n"], sentencepiece=True)
    assert text.push(tokenizer.token_to_id("a")) == "a"
    text.push(tokenizer.token_to_id("<0x0A>"))
    assert (text.matched_stop, text.num_tokens) == ("\n", 2)


@given(
    ids=st.lists(st.integers(2, 399), max_size=40),
    stops=st.lists(st.text(alphabet="the cat\n", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_text_of_random_tokens_ends_where_the_stop_string_begins_in_the_full_decode(
    ids: list[int], stops: list[str]
) -> None:
    text = sequence(stops)
    shown = "".join(text.push(token_id) for token_id in ids) + text.finish(ended_by_token=False)
    whole = tiny_tokenizers.byte_level().decode(ids)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (shown, text.matched_stop, text.num_tokens) == (whole, None, len(ids))
        return
    assert text.matched_stop is not None
    assert shown + text.matched_stop == whole[: min(ends)]
    kept = tiny_tokenizers.byte_level().decode(ids[: text.num_tokens])
    before = tiny_tokenizers.byte_level().decode(ids[: text.num_tokens - 1])
    assert text.matched_stop in kept
    assert not any(stop in before.rstrip("\ufffd") for stop in stops)
