"""What the client gives back: plain frozen values, made from the protocol's messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pagewire.v1 import inference_pb2

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error", "parked", "unspecified"]
_PREFIX = "FINISH_REASON_"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position, natural logarithm, of the raw distribution."""

    logprob: float
    """The chosen token's own."""
    rank: int
    """Its rank, 1 = most likely."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, as many as asked for."""


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What the server made of the prompt."""

    prompt_tokens: int
    """Its length in tokens."""
    cached_tokens: int
    """How many of them the prefix cache had."""
    token_ids: tuple[int, ...]
    """The prompt's tokens, if echo or prompt_logprobs asked for them."""
    logprobs: tuple[TokenLogprobs, ...]
    """One per prompt token if asked for; the first is meaningless, since nothing precedes it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost. Times are in nanoseconds from acceptance."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    preemptions: int
    swapped_bytes: int
    recomputed_tokens: int
    queue_ns: int
    first_token_ns: int
    total_ns: int


@dataclass(frozen=True, slots=True)
class Finish:
    """How one sequence ended."""

    reason: FinishReason
    matched_stop: str
    """The stop string that ended it, or empty."""
    matched_token_id: int
    """The end-of-sequence or stop token that ended it; 0 also if none did."""
    usage: Usage
    cumulative_logprob: float
    """Sum over the output tokens; 0 unless log-probabilities were asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one sequence's output, as it arrived."""

    request_id: str
    index: int
    """Which of the n sequences."""
    first_token: int
    """Position of `token_ids[0]` among the sequence's output tokens: no gap, no repeat, also across a resume."""
    token_ids: tuple[int, ...]
    text: str
    """Whole code points only; may lag behind the tokens."""
    logprobs: tuple[TokenLogprobs, ...]
    prompt: PromptInfo | None
    """In the first piece of the stream only."""
    finish: Finish | None
    """In the last piece of each index."""


@dataclass(frozen=True, slots=True)
class Model:
    """A served model and its limits."""

    name: str
    max_model_len: int
    """Context in tokens, prompt and output together."""
    vocab_size: int
    dtype: str
    block_size: int
    """Tokens per KV block."""
    kv_blocks: int
    """Blocks over all workers."""
    ready: bool
    """Whether a worker is there to run it."""


def _logprobs(messages: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(message.logprob, message.rank, tuple(zip(message.top_ids, message.top_logprobs, strict=True)))
        for message in messages
    )


def _finish(message: inference_pb2.Finish) -> Finish:
    usage = message.usage
    name = inference_pb2.FinishReason.Name(message.reason).removeprefix(_PREFIX).lower()
    return Finish(
        reason=name,  # type: ignore[arg-type]
        matched_stop=message.matched_stop,
        matched_token_id=message.matched_token_id,
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            preemptions=usage.preemptions,
            swapped_bytes=usage.swapped_bytes,
            recomputed_tokens=usage.recomputed_tokens,
            queue_ns=usage.queue_ns,
            first_token_ns=usage.first_token_ns,
            total_ns=usage.total_ns,
        ),
        cumulative_logprob=message.cumulative_logprob,
    )


def piece_from(message: inference_pb2.GenerateResponse) -> Piece:
    """The value of one response."""
    prompt = message.prompt
    return Piece(
        request_id=message.request_id,
        index=message.index,
        first_token=message.first_token,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_logprobs(message.logprobs),
        prompt=PromptInfo(
            prompt.prompt_tokens, prompt.cached_tokens, tuple(prompt.token_ids), _logprobs(prompt.logprobs)
        )
        if message.HasField("prompt")
        else None,
        finish=_finish(message.finish) if message.HasField("finish") else None,
    )


def model_from(message: inference_pb2.Model) -> Model:
    """The value of one listed model."""
    return Model(
        name=message.name,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        dtype=message.dtype,
        block_size=message.block_size,
        kv_blocks=message.kv_blocks,
        ready=message.ready,
    )
