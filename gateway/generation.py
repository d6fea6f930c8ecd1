"""One request's stream of responses: tokens from the session in, responses for a client out.

What arrives while the client is not ready is put together, one response per sequence. The buffer is bounded: a client
that does not read loses its stream, nobody else notices.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

import grpc

from gateway.errors import Reason, RequestError, Violation, invalid, unavailable
from gateway.sequence_text import SequenceText
from gateway.stop_strings import StopMatcher
from gateway.tokenizer import Tokenizer
from pagewire.runtime.tracing import Span
from pagewire.v1 import inference_pb2, scheduler_pb2

# A response holds at most this many tokens, so that a long snapshot does not become one message of megabytes.
TOKENS_PER_RESPONSE = 1024
# Rough bytes of a response's own fields, and of one top-N entry.
RESPONSE_BYTES = 64
LOGPROB_BYTES = 16

FINISH = inference_pb2.FinishReason


class Link(Protocol):
    """What a generation needs of the session."""

    def detach(self, listener: Generation) -> None: ...

    def stop(self, listener: Generation, index: int, num_tokens: int, matched_stop: str) -> None: ...


class _Output:
    """State of one sequence."""

    def __init__(self, text: SequenceText | None, echo: str, wanted: int) -> None:
        self.text = text
        """None: the client wants none and there is nothing to search in it."""
        self.echo = echo
        """Text of the prompt, to be put in front of the first response."""
        self.wanted = wanted
        """First token position that the client wants."""
        self.position = 0
        """Tokens that the present session has told, counted from the sequence's beginning."""
        self.taken = 0
        """Tokens taken; those told again after a break lie below."""
        self.kept = 0
        """Tokens that count: `taken` without those behind a stop string."""
        self.turn_start = 0
        """Tokens of earlier turns, which `text` has not seen."""
        self.logprob_sum = 0.0
        self.matched_stop: str | None = None
        self.finished = False
        self.unsent: inference_pb2.GenerateResponse | None = None
        """The response that more can still be added to."""
        self.size_place = 0
        """Its place among all responses of the stream, from 0."""


class Generation:
    """One client's view of one request."""

    def __init__(
        self,
        link: Link,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        buffer_bytes: int,
        *,
        request_id: str,
        submit: scheduler_pb2.Submit | None = None,
        time_left_ns: Callable[[], int] | None = None,
        positions: Mapping[int, int] | None = None,
        span: Span | None = None,
        resume: scheduler_pb2.ContinueStream | None = None,
    ) -> None:
        """
        Args:
            link: the session.
            tokenizer: None: text stays empty.
            eos_token_ids: the model's.
            buffer_bytes: undelivered bytes that make the client a slow consumer.
            request_id: the request's name.
            submit: the request, if it is started here; None: it is attached to.
            time_left_ns: time to the client's deadline; None: there is none.
            positions: first token wanted by index, for an attach; None: from the beginning.
            span: ends with `close`; None: the request is not traced.
            resume: what a parked request goes on with here, from its next token on; None: it is not continued.
        """
        self._link = link
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._buffer_bytes = buffer_bytes
        self._submit = submit
        self._time_left_ns = time_left_ns
        self._positions = dict(positions or {})
        self._resume = resume
        self._request: scheduler_pb2.Submit | None = None
        self._outputs: list[_Output] = []
        self._prompt: inference_pb2.PromptInfo | None = None
        self._prompt_sent = False
        self._ready: deque[inference_pb2.GenerateResponse] = deque()
        self._sizes: deque[int] = deque()
        self._undelivered = 0
        self._taken_responses = 0
        self._in_snapshot = False
        self._in_earlier_turn = False
        self._error: RequestError | None = None
        self._changed = asyncio.Event()
        self._abandoned = False
        self._span = span
        self.on_overflow: Callable[[], None] | None = None
        """Called when the client turns out to be too slow, because it may be stuck in a write."""
        self.request_id = request_id
        self.acknowledged = False
        """The scheduler has said something about the request."""
        self._failed = False
        if submit is not None:
            self._set_request(submit)

    # The consumer's side.

    async def next(self) -> inference_pb2.GenerateResponse | None:
        """The next response; None at the end. Raises RequestError if the request has failed, after what came before."""
        while not self._ready:
            if self._error is not None and (self.done or self._abandoned):
                raise self._error
            if self.done:
                return None
            self._changed.clear()
            await self._changed.wait()
        response = self._ready.popleft()
        output = self._outputs[response.index]
        if output.unsent is response:
            output.unsent = None
        self._undelivered -= self._sizes.popleft()
        self._taken_responses += 1
        if not self._prompt_sent:
            self._prompt_sent = True
            if self._span is not None:
                self._span.event("first response")
            response.prompt.CopyFrom(self._prompt_info())
        return response

    def close(self) -> None:
        """The client has gone. A detached request is still followed, for its stop strings; any other is dropped."""
        if self._span is not None:
            self._end_span(self._span)
        if self._abandoned:
            return
        self._abandon()
        if not self.done and not self._detached:
            self._link.detach(self)

    @property
    def done(self) -> bool:
        """Nothing more will come from the scheduler."""
        if self._failed:
            return True
        return bool(self._outputs) and all(output.finished for output in self._outputs)

    @property
    def n(self) -> int:
        """Sequences; 0 while an attach is unanswered."""
        return len(self._outputs)

    # The session's side (gateway.session.Listener).

    def to_submit(self) -> scheduler_pb2.Submit | None:
        """The message that starts the request, with the time that is left."""
        if self._submit is None:
            return None
        message = scheduler_pb2.Submit()
        message.CopyFrom(self._submit)
        if self._time_left_ns is not None:
            message.timeout_ns = max(0, self._time_left_ns())
        return message

    def to_resume(self) -> scheduler_pb2.ContinueStream | None:
        """The message that takes a parked request up again, with the time that is left; None for any other."""
        if self._resume is None:
            return None
        message = scheduler_pb2.ContinueStream()
        message.CopyFrom(self._resume)
        if self._time_left_ns is not None:
            message.timeout_ns = max(0, self._time_left_ns())
        return message

    def attached(self, answer: scheduler_pb2.StreamAttached) -> None:
        """Everything so far: of a request of somebody else, or of our own after a break."""
        if self._request is None:
            if self._resume is not None:
                self._positions = {index: len(state.token_ids) for index, state in enumerate(answer.sequences)}
            self._set_request(answer.request, len(answer.sequences))
            if violations := self._position_violations(answer):
                self.failed(invalid(violations))
                self._link.detach(self)
                return
        elif self._submit is not None and not self.acknowledged and not _same_request(self._submit, answer.request):
            # Our submit was refused because the name was taken, and the break swallowed the refusal.
            message = "a request with this id is live"
            self.failed(RequestError(grpc.StatusCode.ALREADY_EXISTS, Reason.REQUEST_EXISTS, message))
            self._link.detach(self)
            return
        if answer.HasField("prompt"):
            self.admitted(answer.prompt)
        self._in_snapshot = True
        for index, state in enumerate(answer.sequences[: self.n]):
            output = self._outputs[index]
            output.position = 0
            with_logprobs = len(state.logprobs) == len(state.token_ids)
            turns = deque(turn for turn in state.turns if turn.num_tokens > output.taken)
            self._in_earlier_turn = bool(turns)
            for position, token_id in enumerate(state.token_ids):
                self.token(index, token_id, state.logprobs[position] if with_logprobs else None)
                while turns and turns[0].num_tokens == position + 1:
                    self._end_turn(index, output, turns.popleft())
                    self._in_earlier_turn = bool(turns)
            if state.HasField("finish"):
                self.finished(index, state.finish)
            elif output.matched_stop is not None:
                self._link.stop(self, index, output.kept, output.matched_stop)
        self._in_snapshot = False

    def admitted(self, prompt: inference_pb2.PromptInfo) -> None:
        """The request runs; goes out with the first tokens."""
        if self._prompt is None:
            self._prompt = inference_pb2.PromptInfo()
            self._prompt.CopyFrom(prompt)

    def token(self, index: int, token_id: int, logprobs: inference_pb2.TokenLogprobs | None) -> None:
        """One more output token of a sequence."""
        output = self._outputs[index]
        output.position += 1
        if output.position <= output.taken or output.finished:
            return  # told again after a break
        output.taken += 1
        if output.matched_stop is not None:
            return  # behind a stop string
        text = ""
        if output.text is not None:
            text = output.text.push(token_id)
            if (
                output.turn_start + output.text.num_tokens == output.kept
            ):  # the token before has turned out to complete a stop string
                self._add(index, output, None, text, None)
                self._stopped(index, output)
                return
        output.kept += 1
        if logprobs is not None:
            output.logprob_sum += logprobs.logprob
        self._add(index, output, token_id, text, logprobs)
        if output.text is not None and output.text.matched_stop is not None:
            self._stopped(index, output)

    def finished(self, index: int, finish: inference_pb2.Finish) -> None:
        """A sequence has ended."""
        output = self._outputs[index]
        if output.finished:
            return
        output.finished = True
        text = ""
        if output.matched_stop is None and output.text is not None:
            by_token = finish.reason == FINISH.FINISH_REASON_STOP and not finish.matched_stop
            text = output.text.finish(by_token)
            output.matched_stop = output.text.matched_stop
        result = inference_pb2.Finish()
        result.CopyFrom(finish)
        result.usage.completion_tokens = output.kept
        if output.matched_stop is not None and finish.matched_stop != output.matched_stop:
            # The sequence had ended otherwise before our stop arrived; its tokens behind the stop string do not count.
            result.reason = FINISH.FINISH_REASON_STOP
            result.matched_stop = output.matched_stop
            result.matched_token_id = 0
            result.cumulative_logprob = output.logprob_sum
        self._add(index, output, None, text, None, result)
        self._note_reason(result.reason)

    def _end_turn(self, index: int, output: _Output, turn: scheduler_pb2.EarlierTurn) -> None:
        """An earlier turn of a request that has been continued since ends here: the text after it begins anew."""
        if output.text is None:
            return
        finish = turn.finish
        if output.matched_stop is None:
            text = output.text.finish(finish.reason == FINISH.FINISH_REASON_STOP and not finish.matched_stop)
            if output.kept > output.wanted:
                self._add(index, output, None, text, None)
        output.matched_stop = None
        output.kept = output.turn_start = turn.num_tokens
        assert self._request is not None
        output.text = self._sequence_text(self._request, [])

    def failed(self, error: RequestError) -> None:
        """The request has ended with an error."""
        if error.code is grpc.StatusCode.NOT_FOUND and self._submit is not None:
            error = unavailable(Reason.REQUEST_LOST, "the scheduler has lost this request; submit it again")
        self._error = error
        self._failed = True

    def wake(self) -> None:
        """Lets the consumer look."""
        self._changed.set()

    # Inside.

    @property
    def _detached(self) -> bool:
        own = self._submit or self._resume
        return own is not None and own.detached

    def _set_request(self, request: scheduler_pb2.Submit, n: int = 0) -> None:
        self._request = request
        count = n or max(1, request.sampling.n)
        prompt = list(request.token_ids) if request.output.echo else []
        echo = ""
        if prompt and self._tokenizer is not None and not request.output.token_ids_only:
            echo = self._tokenizer.decode(prompt)
        for index in range(count):
            wanted = self._positions.get(index, 0)
            text = self._sequence_text(request, prompt)
            self._outputs.append(_Output(text, echo if wanted == 0 else "", wanted))

    def _sequence_text(self, request: scheduler_pb2.Submit, after: list[int]) -> SequenceText | None:
        wants_text = self._tokenizer is not None and not request.output.token_ids_only
        if self._tokenizer is None or not (wants_text or request.stop.stop):
            return None
        stop_ids = frozenset(request.stop.stop_token_ids)
        if not request.stop.ignore_eos:
            stop_ids |= self._eos
        return SequenceText(
            self._tokenizer.detokenizer(after),
            StopMatcher(request.stop.stop, request.stop.include_stop),
            stop_ids,
            self._tokenizer.token_text if request.stop.include_stop else None,
        )

    def _position_violations(self, answer: scheduler_pb2.StreamAttached) -> list[Violation]:
        """Positions that can never come."""
        found: list[Violation] = []
        for place, (index, first) in enumerate(self._positions.items()):
            if index >= self.n:
                found.append(Violation(f"positions[{place}].index", f"must be below {self.n}, the number of sequences"))
                continue
            state = answer.sequences[index]
            limit = len(state.token_ids) if state.HasField("finish") else answer.request.stop.max_tokens
            if first > limit:
                description = f"must be at most {limit}, where the sequence ends"
                found.append(Violation(f"positions[{place}].first_token", description))
        return found

    def _stopped(self, index: int, output: _Output) -> None:
        assert output.text is not None
        output.matched_stop = output.text.matched_stop
        if self._in_earlier_turn:
            return  # the scheduler has known for long
        self._link.stop(self, index, output.kept, output.matched_stop or "")

    def _note_reason(self, reason: inference_pb2.FinishReason) -> None:
        """Reasons that end the call with a status as well."""
        if self._error is not None:
            return
        if reason == FINISH.FINISH_REASON_ERROR:
            message = "the server could not finish this request"
            self._error = RequestError(grpc.StatusCode.INTERNAL, Reason.GENERATION_FAILED, message)
        elif reason == FINISH.FINISH_REASON_DEADLINE and (self._submit or self._resume) is not None:
            message = "the call's deadline has passed"
            self._error = RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED, message)

    def _prompt_info(self) -> inference_pb2.PromptInfo:
        info = self._prompt or inference_pb2.PromptInfo()
        request = self._request
        assert request is not None
        if not info.prompt_tokens:
            info.prompt_tokens = len(request.token_ids)
        wants_ids = request.output.echo or request.output.HasField("prompt_logprobs")
        if wants_ids and not info.token_ids:
            info.token_ids.extend(request.token_ids)
        return info

    def _add(
        self,
        index: int,
        output: _Output,
        token_id: int | None,
        text: str,
        logprobs: inference_pb2.TokenLogprobs | None,
        finish: inference_pb2.Finish | None = None,
    ) -> None:
        """Adds to the sequence's unsent response, unless the client has it already or is gone."""
        if self._abandoned or (token_id is not None and output.kept <= output.wanted):
            return
        assert self._request is not None
        if self._request.output.token_ids_only:
            text = ""
        if token_id is None and not text and finish is None:
            return
        if output.echo:
            text, output.echo = output.echo + text, ""
        response = output.unsent
        size = 4 + len(text)
        if response is None or len(response.token_ids) >= TOKENS_PER_RESPONSE:
            first = output.kept - (token_id is not None)
            response = inference_pb2.GenerateResponse(request_id=self.request_id, index=index, first_token=first)
            output.unsent = response
            self._ready.append(response)
            self._sizes.append(0)
            output.size_place = self._taken_responses + len(self._ready) - 1
            size += RESPONSE_BYTES
        if token_id is not None:
            response.token_ids.append(token_id)
        if logprobs is not None:
            response.logprobs.append(logprobs)
            size += LOGPROB_BYTES * (1 + len(logprobs.top_ids))
        if text:
            response.text += text
        if finish is not None:
            response.finish.CopyFrom(finish)
        if not self._in_snapshot and self._request.sampling.beam_width <= 1:
            self._count(output, size)

    def _count(self, output: _Output, size: int) -> None:
        """Accounts undelivered bytes to the sequence's unsent response. What comes all at once, a snapshot or a beam
        search's answers, is as long as it is: it does not say that the client is slow."""
        self._sizes[output.size_place - self._taken_responses] += size
        self._undelivered += size
        if self._undelivered > self._buffer_bytes:
            self._overflow()

    def _overflow(self) -> None:
        """The client does not read: its stream ends. A detached request goes on."""
        message = "the stream was not read fast enough; resume with Attach"
        self._error = RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_CONSUMER, message)
        self._abandon()
        if not self._detached:
            self._failed = True
            self._link.detach(self)
        self._changed.set()
        if self.on_overflow is not None:
            self.on_overflow()

    def _end_span(self, span: Span) -> None:
        span.set(completion_tokens=sum(output.kept for output in self._outputs))
        gone = "" if self.done else str(Reason.CANCELLED)
        span.end(error=str(self._error.reason) if self._error is not None else gone)
        self._span = None

    def _abandon(self) -> None:
        self._abandoned = True
        self._ready.clear()
        self._sizes.clear()
        for output in self._outputs:
            output.unsent = None


def _same_request(ours: scheduler_pb2.Submit, theirs: scheduler_pb2.Submit) -> bool:
    return (
        list(ours.token_ids) == list(theirs.token_ids)
        and ours.sampling == theirs.sampling
        and ours.stop == theirs.stop
        and ours.tenant == theirs.tenant
    )
