"""Token ids to text, one id at a time, whole code points only, equal to the full decode of all ids when joined.

How a tokenizer makes text decides how that can be done exactly:

- byte-level BPE (GPT-2, Llama 3, Qwen): every token is a run of bytes, so an incremental UTF-8 decoder is exact.
- sentencepiece with byte fallback (Llama 2, Mistral, Gemma): a token is text, but tokens `<0x41>` are bytes. A run of
  those is decoded as a whole: if any of it is bad, each byte becomes U+FFFD. So a run is given out when it ends.
- anything else: decode a short window of ids with and without the newest ones and give out the difference.

Each takes amortised constant time per token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

REPLACEMENT = "\ufffd"

# A run of byte tokens longer than this is given out in parts; without a bound a stream of bytes would never be seen.
MAX_BYTE_RUN = 1024
# Ids after which the window gives out what it has, finished code point or not: no code point takes more tokens.
MAX_UNFINISHED = 16
# Ids of context that the window keeps in front, for spaces that a decoder puts between or in front of words.
WINDOW_CONTEXT = 4


class Detokenizer(Protocol):
    """State of one sequence's text."""

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is complete now."""
        ...

    def pending(self) -> str:
        """Text that is held although its code points are whole; it would come if the sequence ended now."""
        ...

    def flush(self) -> str:
        """The rest, at the end: what is no whole code point becomes U+FFFD. More may be pushed afterwards."""
        ...


class ByteLevelDetokenizer:
    """For decoders of type ByteLevel."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        """
        Args:
            token_bytes: an id's bytes; empty for special and unknown ids.
        """
        self._token_bytes = token_bytes
        # Python and Rust replace bad bytes alike: one U+FFFD per maximal part of a code point (Unicode 3.9, U+FFFD).
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ByteFallbackDetokenizer:
    """For decoders that replace, fall back to bytes, fuse, and perhaps strip spaces in front of the whole text."""

    def __init__(self, token_piece: Callable[[int], str | int | None], strip: str, strip_count: int) -> None:
        """
        Args:
            token_piece: an id's text, or its byte as a number, or None for special and unknown ids.
            strip: the character stripped in front of the whole text.
            strip_count: how many of it are stripped at most.
        """
        self._token_piece = token_piece
        self._strip = strip
        self._strip_left = strip_count
        self._run = bytearray()

    def push(self, token_id: int) -> str:
        piece = self._token_piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._run.append(piece)
            return self._give(self._take_run()) if len(self._run) >= MAX_BYTE_RUN else ""
        return self._give(self._take_run() + piece)

    def pending(self) -> str:
        try:
            return self._run.decode()
        except UnicodeDecodeError:
            return ""

    def flush(self) -> str:
        return self._give(self._take_run())

    def _take_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _give(self, text: str) -> str:
        while self._strip_left and text.startswith(self._strip):
            text = text[1:]
            self._strip_left -= 1
        if text:
            self._strip_left = 0
        return text


class WindowDetokenizer:
    """For any other decoder: what the newest ids add to the decode of a few ids before them."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], visible: Callable[[int], bool], after: Sequence[int] = ()
    ) -> None:
        """
        Args:
            decode: full decode of a list of ids.
            visible: False for ids that the decode leaves out (special, unknown).
            after: ids in front of the sequence, when its text continues theirs.
        """
        self._decode = decode
        self._visible = visible
        self._context = [token_id for token_id in after[-4 * WINDOW_CONTEXT :] if visible(token_id)][-WINDOW_CONTEXT:]
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        if not self._visible(token_id):
            return ""
        self._new.append(token_id)
        text = self._added()
        if text.endswith(REPLACEMENT) and len(self._new) < MAX_UNFINISHED:
            return ""
        return self._give(text)

    def pending(self) -> str:
        return ""

    def flush(self) -> str:
        return self._give(self._added()) if self._new else ""

    def _added(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._new)[len(before) :]

    def _give(self, text: str) -> str:
        self._context = (self._context + self._new)[-WINDOW_CONTEXT:]
        self._new = []
        return text


DetokenizerFactory = Callable[[Sequence[int]], Detokenizer]
"""Makes a detokenizer for a sequence whose text continues that of the given ids (none: it stands for itself)."""


def factory_for(tokenizer: Any) -> DetokenizerFactory:
    """Chooses how a `tokenizers.Tokenizer` can be followed exactly.

    Args:
        tokenizer: the backend tokenizer; its decoder and added tokens are read from its JSON form, once.
    """
    described = json.loads(tokenizer.to_str())
    special = frozenset(token["id"] for token in described.get("added_tokens") or () if token.get("special"))
    decoder = described.get("decoder") or {}
    if decoder.get("type") == "ByteLevel":
        token_bytes = _cached_token_bytes(tokenizer, special)
        return lambda after: ByteLevelDetokenizer(token_bytes)
    fallback = _byte_fallback_steps(decoder)
    if fallback is not None:
        replacements, strip, strip_count = fallback
        token_piece = _cached_token_piece(tokenizer, special, replacements)
        # A text that continues another is not the front of the whole text, where spaces are stripped.
        return lambda after: ByteFallbackDetokenizer(token_piece, strip, 0 if after else strip_count)

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def visible(token_id: int) -> bool:
        return token_id not in special and tokenizer.id_to_token(token_id) is not None

    return lambda after: WindowDetokenizer(decode, visible, after)


def token_bytes_for(tokenizer: Any) -> Callable[[int], bytes] | None:
    """What single ids add to a text that goes on, in bytes; None where only a decode of several ids says it.

    Args:
        tokenizer: the backend tokenizer, as for `factory_for`.
    """
    described = json.loads(tokenizer.to_str())
    special = frozenset(token["id"] for token in described.get("added_tokens") or () if token.get("special"))
    decoder = described.get("decoder") or {}
    if decoder.get("type") == "ByteLevel":
        return _cached_token_bytes(tokenizer, special)
    fallback = _byte_fallback_steps(decoder)
    if fallback is None:
        return None
    token_piece = _cached_token_piece(tokenizer, special, fallback[0])

    def piece_bytes(token_id: int) -> bytes:
        piece = token_piece(token_id)
        return bytes([piece]) if isinstance(piece, int) else (piece or "").encode()

    return piece_bytes


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table, Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for characters from U+0100 on.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in kept}
    others = [byte for byte in range(256) if byte not in kept]
    table.update({chr(0x100 + position): byte for position, byte in enumerate(others)})
    return table


BYTE_OF_CHAR = _byte_of_char()


def _cached_token_bytes(tokenizer: Any, special: frozenset[int]) -> Callable[[int], bytes]:
    @lru_cache(maxsize=1 << 18)
    def token_bytes(token_id: int) -> bytes:
        token = None if token_id in special else tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token stands for its own text
            return str(token).encode()

    return token_bytes


def _cached_token_piece(
    tokenizer: Any, special: frozenset[int], replacements: Sequence[tuple[str, str]]
) -> Callable[[int], str | int | None]:
    @lru_cache(maxsize=1 << 18)
    def token_piece(token_id: int) -> str | int | None:
        token: str | None = None if token_id in special else tokenizer.id_to_token(token_id)
        if token is None:
            return None
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return int(token[3:5], 16)
            except ValueError:
                return token
        return token

    return token_piece


def _byte_fallback_steps(decoder: dict[str, Any]) -> tuple[list[tuple[str, str]], str, int] | None:
    """(replacements, stripped character, how many) if it is replace*, byte fallback, fuse, strip?; else None."""
    if decoder.get("type") != "Sequence":
        return None
    steps = list(decoder.get("decoders") or ())
    replacements: list[tuple[str, str]] = []
    while steps and steps[0].get("type") == "Replace":
        step = steps.pop(0)
        pattern = (step.get("pattern") or {}).get("String")
        if pattern is None:
            return None
        replacements.append((pattern, step.get("content", "")))
    if [step.get("type") for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    rest = steps[2:]
    if not rest:
        return replacements, " ", 0
    last = rest[0]
    if len(rest) > 1 or last.get("type") != "Strip" or last.get("stop") or len(last.get("content", "")) != 1:
        return None
    return replacements, last["content"], int(last.get("start", 0))
