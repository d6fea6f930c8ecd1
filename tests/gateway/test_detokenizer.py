"""Pieces of text joined equal the full decode, for any stream of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway import detokenizer
from gateway.detokenizer import factory_for
from tests.gateway import tiny_tokenizers

TOKENIZERS = {
    "byte-level": tiny_tokenizers.byte_level,
    "sentencepiece-like": tiny_tokenizers.sentencepiece_like,
    "word-piece": tiny_tokenizers.word_piece,
}


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    state = factory_for(tokenizer)(())
    return [*(state.push(token_id) for token_id in ids), state.flush()]


def test_each_family_is_followed_in_its_own_way() -> None:
    kinds = [type(factory_for(make())(())).__name__ for make in TOKENIZERS.values()]
    assert kinds == ["ByteLevelDetokenizer", "ByteFallbackDetokenizer", "WindowDetokenizer"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_token_streams_join_to_the_full_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]()
    beyond = tokenizer.get_vocab_size() + 5
    ids = data.draw(st.lists(st.integers(0, beyond), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece-like"])
@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_valid_text_never_shows_a_replacement_character_and_only_whole_code_points(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text).ids
    if 0 in ids:
        return  # the tokenizer itself could not express it
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(shown) or "\ufffd" in text
    for piece in shown:
        piece.encode()  # raises for half a surrogate pair


def test_a_code_point_split_over_tokens_appears_with_its_last_token() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    alphabet = [tokenizer.token_to_id(char) for char in "ðŁĴ©"]  # the bytes of one emoji
    assert None not in alphabet
    assert pieces(tokenizer, alphabet) == ["", "", "", "\U0001f4a9", ""]


def test_bad_bytes_are_shown_as_replacement_when_they_are_certain() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    lead, letter = tokenizer.token_to_id("ð"), tokenizer.token_to_id("a")
    assert pieces(tokenizer, [lead, letter]) == ["", "\ufffda", ""]
    assert pieces(tokenizer, [letter, lead]) == ["a", "", "\ufffd"]


def test_a_run_of_byte_tokens_is_given_out_when_it_ends() -> None:
    tokenizer = tiny_tokenizers.sentencepiece_like()
    newline, letter = tokenizer.token_to_id("<0x0A>"), tokenizer.token_to_id("a")
    state = factory_for(tokenizer)(())
    assert (state.push(newline), state.pending(), state.push(letter)) == ("", "\n", "\na")


def test_an_endless_run_of_byte_tokens_is_given_out_in_parts() -> None:
    tokenizer = tiny_tokenizers.sentencepiece_like()
    state = factory_for(tokenizer)(())
    byte = tokenizer.token_to_id("<0x41>")
    shown = [state.push(byte) for _ in range(detokenizer.MAX_BYTE_RUN)]
    assert shown[-1] == "A" * detokenizer.MAX_BYTE_RUN


def test_text_that_continues_a_prompt_keeps_its_first_space() -> None:
    tokenizer = tiny_tokenizers.sentencepiece_like()
    the, cat = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("cat")
    factory = factory_for(tokenizer)
    assert factory(()).push(the) == "the"
    assert factory([cat]).push(the) == " the"
