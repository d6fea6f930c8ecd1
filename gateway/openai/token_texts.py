"""How single tokens are shown beside log-probabilities: their text and bytes, as they are in the middle of a text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gateway.tokenizer import Tokenizer


class TokenTexts:
    """The tokens of the served model."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """
        Args:
            tokenizer: None: tokens are shown by number.
        """
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The token's text; if it is not whole code points, its bytes as OpenAI writes them: `bytes:\\xe2\\x82`."""
        data = self.raw(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of many tokens, special ones left out; empty without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    def raw(self, token_id: int) -> bytes:
        """The token's bytes, special tokens by their name."""
        if self._tokenizer is None:
            return f"token_id:{token_id}".encode()
        return self._tokenizer.token_bytes(token_id) or self._tokenizer.token_text(token_id).encode()

    def added(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text: none for special tokens."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


class Offsets:
    """Where the tokens of one choice begin in its text, in characters."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._length
        self._length += len(self._decoder.decode(self._texts.added(token_id)))
        return offset
