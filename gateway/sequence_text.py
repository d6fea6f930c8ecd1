"""One sequence's output tokens to its text: detokenizer, stop strings, and the token that ended it left out.

Everything happens token by token, so which token a piece of text belongs to does not depend on how tokens arrive:
a client that attaches at token k gets exactly the text that came with the tokens from k on.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.detokenizer import Detokenizer
from gateway.stop_strings import StopMatcher


class SequenceText:
    """State of one output sequence."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        matcher: StopMatcher,
        stop_ids: frozenset[int],
        stop_token_text: Callable[[int], str] | None,
    ) -> None:
        """
        Args:
            detokenizer: of this sequence.
            matcher: of this sequence.
            stop_ids: tokens that may end it. Their text waits until it is known whether they did.
            stop_token_text: the text of the token that ended it, if that is wanted (include_stop); None: left out.
        """
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._stop_token_text = stop_token_text
        self._deferred: int | None = None
        self.num_tokens = 0
        """Tokens taken so far, those behind a stop string not counted."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the sequence at `num_tokens` tokens."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that it completed. Tokens behind a stop string are ignored."""
        if self._matcher.matched is not None:
            return ""
        text = self._take_deferred()
        if self._matcher.matched is not None:
            return text  # the token before this one completed the stop string
        self.num_tokens += 1
        if token_id in self._stop_ids:
            self._deferred = token_id
            return text
        return text + self._feed(token_id)

    def finish(self, ended_by_token: bool) -> str:
        """The rest of the text.

        Args:
            ended_by_token: the last token was an end-of-sequence or stop token that ended the sequence.
        """
        text = ""
        ending = self._deferred
        if not ended_by_token:
            text = self._take_deferred()
            ending = None
        if self._matcher.matched is not None:
            return text
        text += self._matcher.release() + self._detokenizer.flush()
        if ending is not None and self._stop_token_text is not None:
            text += self._stop_token_text(ending)
        self._deferred = None
        return text

    def _take_deferred(self) -> str:
        token_id, self._deferred = self._deferred, None
        return "" if token_id is None else self._feed(token_id)

    def _feed(self, token_id: int) -> str:
        text = self._matcher.push(self._detokenizer.push(token_id))
        # Whole text that the detokenizer still holds counts: if it completes a stop string, the sequence ends here.
        pending = "" if self._matcher.matched is not None else self._detokenizer.pending()
        if pending and self._matcher.would_match(pending):
            text += self._matcher.push(self._detokenizer.flush())
        return text
