"""The two shapes of answers: completions and chat completions, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from gateway.errors import Reason, RequestError
from gateway.openai.token_texts import Offsets, TokenTexts
from gateway.openai.translate import Ask
from pagewire.v1 import inference_pb2

LEAST_LOGPROB = -9999.0
"""What stands for a probability of zero, because JSON has no infinity (OpenAI's value)."""

FINISH = inference_pb2.FinishReason
FINISH_REASONS = {
    FINISH.FINISH_REASON_STOP: "stop",
    FINISH.FINISH_REASON_LENGTH: "length",
    FINISH.FINISH_REASON_PARKED: "parked",  # OpenAI has no word for it
}


@dataclass
class Piece:
    """What one response adds to one choice."""

    index: int
    """The choice, counted through all prompts."""
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[inference_pb2.TokenLogprobs]
    finish_reason: str | None
    prompt: inference_pb2.PromptInfo | None
    """With the first piece of a choice."""
    first: bool


@dataclass
class Tally:
    """Usage of the whole request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Reader:
    """Turns the responses of an Ask's generations into pieces, and counts."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._prompts: dict[int, inference_pb2.PromptInfo] = {}
        self._begun: set[int] = set()
        self.tally = Tally()

    def read(self, place: int, response: inference_pb2.GenerateResponse) -> Piece:
        """The piece of one response.

        Args:
            place: which of the prompts it belongs to.
            response: the generation's next.

        Raises:
            RequestError: somebody cancelled the request by name; an answer that ends early would look complete.
        """
        if response.HasField("prompt"):
            self._prompts[place] = response.prompt
            self.tally.prompt_tokens += response.prompt.prompt_tokens
            self.tally.cached_tokens += response.prompt.cached_tokens
        reason: str | None = None
        if response.HasField("finish"):
            if response.finish.reason == FINISH.FINISH_REASON_CANCELLED:
                raise RequestError(grpc.StatusCode.CANCELLED, Reason.CANCELLED, "the request was cancelled")
            # Other reasons are followed by their error.
            reason = FINISH_REASONS.get(response.finish.reason)
            if not self._ask.prompt_only:
                self.tally.completion_tokens += response.finish.usage.completion_tokens
        index = place * self._ask.n + response.index
        first = index not in self._begun
        self._begun.add(index)
        shown = not self._ask.prompt_only
        return Piece(
            index=index,
            text=response.text if shown else "",
            token_ids=response.token_ids if shown else (),
            logprobs=response.logprobs if shown else (),
            finish_reason=reason if shown or reason is None else "length",
            prompt=self._prompts.get(place) if first else None,
            first=first,
        )


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Form:
    """What both shapes share."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, ask: Ask, texts: TokenTexts) -> None:
        self._ask = ask
        self._texts = texts
        self._head = {
            "id": f"{self.prefix}{ask.requests[0].request_id}",
            "created": int(time.time()),
            "model": ask.model,
        }
        self._choices: dict[int, _Choice] = {}

    # A whole answer.

    def add(self, piece: Piece) -> None:
        """Takes a piece of the whole answer."""
        choice = self._choices.setdefault(piece.index, _Choice())
        choice.text.append(piece.text)
        choice.token_ids.extend(piece.token_ids)
        if piece.prompt is not None:
            choice.prompt_token_ids.extend(piece.prompt.token_ids)
        if self._ask.logprobs:
            choice.logprobs.append(self._logprobs(piece))
        choice.finish_reason = piece.finish_reason or choice.finish_reason

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer made of all pieces."""
        choices = [self._whole_choice(index, self._choices[index]) for index in sorted(self._choices)]
        return {"object": self.kind, **self._head, "choices": choices, "usage": usage}

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        content = {
            "index": index,
            **self._body("".join(choice.text)),
            "logprobs": _joined(choice.logprobs) if self._ask.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self._ask.token_ids:
            content["token_ids"] = choice.token_ids
        return content

    # A stream.

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events for a piece; none if it has nothing that the client wants to see."""
        shown = piece.text or piece.finish_reason or self._ask.logprobs or (self._ask.token_ids and piece.token_ids)
        if not shown:
            return
        choice: dict[str, Any] = {
            "index": piece.index,
            **self._delta(piece.text),
            "logprobs": self._logprobs(piece) if self._ask.logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if self._ask.token_ids:
            choice["token_ids"] = list(piece.token_ids)
        yield self._chunk([choice])

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event with include_usage."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {"object": self.chunk_kind, **self._head, "choices": choices}
        if self._ask.include_usage:
            chunk["usage"] = None
        return chunk

    # What differs.

    def _body(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class CompletionForm(Form):
    """/v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, ask: Ask, texts: TokenTexts) -> None:
        super().__init__(ask, texts)
        self._offsets: dict[int, Offsets] = {}

    def _body(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _body

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        """Four lists in parallel, the prompt's tokens in front if it is echoed."""
        ids: list[int] = []
        entries: list[inference_pb2.TokenLogprobs | None] = []
        if piece.prompt is not None and piece.prompt.logprobs:
            ids += piece.prompt.token_ids
            entries += [None, *piece.prompt.logprobs[1:]]  # nothing precedes the first token
        ids += piece.token_ids
        entries += piece.logprobs
        offsets = self._offsets.setdefault(piece.index, Offsets(self._texts))
        return {
            "tokens": [self._texts.text(token_id) for token_id in ids],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                None if entry is None else self._top(token_id, entry)
                for token_id, entry in zip(ids, entries, strict=False)
            ],
            "text_offset": [offsets.next(token_id) for token_id in ids],
        }

    def _top(self, token_id: int, entry: inference_pb2.TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for top_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=False):
            top.setdefault(self._texts.text(top_id), finite(logprob))  # of tokens that look alike, the likelier
        top.setdefault(self._texts.text(token_id), finite(entry.logprob))
        return top


class ChatForm(Form):
    """/v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        if piece.first:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield from super().chunks(piece)

    def _body(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        content = [
            {
                **self._token(token_id, entry.logprob),
                "top_logprobs": [
                    self._token(top_id, logprob)
                    for top_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=False)
                ],
            }
            for token_id, entry in zip(piece.token_ids, piece.logprobs, strict=False)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._texts.raw(token_id)
        return {"token": self._texts.text(token_id), "logprob": finite(logprob), "bytes": list(data)}


def form_for(ask: Ask, texts: TokenTexts) -> Form:
    """The shape that an Ask's answer has."""
    return ChatForm(ask, texts) if ask.chat else CompletionForm(ask, texts)


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities of pieces as those of a whole."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, list):
                whole.setdefault(name, []).extend(value)
            else:
                whole[name] = value
    return whole
