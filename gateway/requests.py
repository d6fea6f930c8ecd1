"""The path of a request through the gateway, the same for every front door: check, tokenize, submit, follow.

Front doors parse their protocol into a GenerateRequest, call this, and write out what the Generation gives them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence

import grpc

from gateway import validator
from gateway.ceilings import CEILINGS
from gateway.chat import ChatTemplate
from gateway.config import GatewaySettings
from gateway.errors import RETRY_SOON_NS, Reason, RequestError, Violation, invalid, unavailable
from gateway.generation import Generation
from gateway.session import SchedulerLink
from gateway.tokenizer import Tokenizer
from gateway.validator import ModelLimits
from pagewire.runtime.logs import get_logger
from pagewire.runtime.tracing import Span, Tracer
from pagewire.v1 import inference_pb2, scheduler_pb2

log = get_logger(__name__)

# A cancel may overtake the submit that it is meant for: look again this often, this many times.
CANCEL_RETRY_S = 0.05
CANCEL_RETRIES = 20


class RequestPath:
    """What front doors call. Raises RequestError for whatever a client must be told."""

    def __init__(
        self,
        settings: GatewaySettings,
        link: SchedulerLink,
        tokenizer: Tokenizer | None,
        chat: ChatTemplate | None,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings
        self._link = link
        self._tokenizer = tokenizer
        self._chat = chat
        self._tracer = tracer
        self._preparing: dict[str, bool] = {}
        """Requests being checked and tokenized, by id; True: cancelled meanwhile."""

    def model(self, name: str = "") -> ModelLimits:
        """The served model's limits. Raises RequestError for another name, or while no model is known."""
        state = self._link.state
        if state is None or not state.HasField("model"):
            if self._settings.served_model_name not in ("", name) and name:
                raise self._no_such_model(self._settings.served_model_name)
            raise self._not_ready()
        served = self._settings.served_model_name or state.model.name
        if name not in ("", served):
            raise self._no_such_model(served)
        return ModelLimits(
            name=served,
            vocab_size=state.model.vocab_size,
            max_model_len=state.model.max_model_len,
            eos_token_ids=frozenset(state.model.eos_token_ids),
        )

    async def generate(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_ns: int | None = None,
        detached: bool = False,
        traceparent: str = "",
    ) -> Generation:
        """Starts a request.

        Args:
            request: as the client sent it.
            timeout_ns: nanoseconds to the client's deadline; None: there is none.
            detached: it lives on without a client, beyond the call's deadline too.
            traceparent: W3C trace context of the call; empty: none.
        """
        if self._tracer is None:
            return await self._start(request, timeout_ns, detached, traceparent, None)
        span = self._tracer.start("pagewire.gateway.generate", traceparent, served=True)
        try:
            return await self._start(request, timeout_ns, detached, span.traceparent, span)
        except RequestError as error:
            span.end(error=str(error.reason))
            raise
        except asyncio.CancelledError:
            span.end(error=str(Reason.CANCELLED))
            raise
        except Exception:
            span.end(error=str(Reason.INTERNAL))
            raise

    async def _start(
        self,
        request: inference_pb2.GenerateRequest,
        timeout_ns: int | None,
        detached: bool,
        traceparent: str,
        span: Span | None,
    ) -> Generation:
        """As `generate`; what becomes of the request is told to `span`."""
        deadline_ns = None if timeout_ns is None else time.monotonic_ns() + timeout_ns
        model = self.model(request.model)
        resolved = validator.validate(request, model, has_tokenizer=self._tokenizer is not None)
        if isinstance(resolved, list):
            raise invalid(resolved, validator.reason_for(resolved))
        if not self._link.ready:
            raise self._not_ready()
        self._check_room()
        request_id = resolved.request_id or uuid.uuid4().hex
        if span is not None:
            span.set(request_id=request_id, model=model.name, n=resolved.sampling.n, detached=detached)
        if request_id in self._preparing:
            message = "a request with this id is live"
            raise RequestError(grpc.StatusCode.ALREADY_EXISTS, Reason.REQUEST_EXISTS, message)
        self._preparing[request_id] = False
        try:
            tokenizing = None if span is None else span.child("pagewire.gateway.tokenize")
            token_ids = await self._prompt_ids(request, model)
            if span is not None and tokenizing is not None:
                tokenizing.end()
                span.set(prompt_tokens=len(token_ids))
        finally:
            cancelled = self._preparing.pop(request_id)
        submit = self._submit(request_id, token_ids, resolved, model, detached, traceparent)
        generation = Generation(
            self._link,
            self._tokenizer,
            model.eos_token_ids,
            self._settings.stream_buffer_bytes,
            request_id=request_id,
            submit=submit,
            time_left_ns=_time_left(deadline_ns, detached),
            span=span,
        )
        if cancelled:
            self._end_cancelled(generation, submit)
        else:
            self._link.submit(generation)
            log.debug("request submitted", request_id=request_id, prompt_tokens=len(token_ids))
        return generation

    def attach(self, request: inference_pb2.AttachRequest) -> Generation:
        """Continues the stream of a live or recently finished request."""
        violations = _request_id_violations(request.request_id)
        highest = int(CEILINGS["attach.positions"].highest)
        if len(request.positions) > highest:
            violations.append(Violation("positions", f"must have at most {highest} entries"))
        positions = {position.index: position.first_token for position in request.positions[:highest]}
        if not violations and len(positions) != len(request.positions):
            violations.append(Violation("positions", "must name each index once"))
        if violations:
            raise invalid(violations)
        if not self._link.connected:
            raise self._not_ready()
        model = self.model()
        generation = Generation(
            self._link,
            self._tokenizer,
            model.eos_token_ids,
            self._settings.stream_buffer_bytes,
            request_id=request.request_id,
            positions=positions,
        )
        self._link.attach(generation)
        return generation

    async def park(self, request: inference_pb2.ParkRequest) -> inference_pb2.ParkResponse:
        """Takes a live request off the worker until it is continued."""
        violations = _request_id_violations(request.request_id)
        violations += validator.seconds_violations("ttl_seconds", request.ttl_seconds, "park.ttl_seconds")
        if violations:
            raise invalid(violations)
        answer = await self._link.park(request.request_id, request.ttl_seconds)
        return inference_pb2.ParkResponse(positions=answer.positions, ttl_seconds=answer.ttl_seconds)

    async def resume(
        self, request: inference_pb2.ContinueRequest, *, timeout_ns: int | None = None, detached: bool = False
    ) -> Generation:
        """Takes a parked or held request up again.

        Args:
            request: as the client sent it.
            timeout_ns: nanoseconds to the client's deadline; None: there is none.
            detached: it lives on without a client, beyond the call's deadline too.
        """
        deadline_ns = None if timeout_ns is None else time.monotonic_ns() + timeout_ns
        violations = _request_id_violations(request.request_id)
        violations += validator.seconds_violations("hold_seconds", request.hold_seconds)
        if violations:
            raise invalid(violations)
        if not self._link.ready:
            raise self._not_ready()
        model = self.model()
        token_ids = await self._input_ids(request, model)
        self._check_room()
        message = scheduler_pb2.ContinueStream(
            request_id=request.request_id,
            token_ids=token_ids,
            max_tokens=request.max_tokens,
            detached=detached,
            hold_seconds=request.hold_seconds,
        )
        generation = Generation(
            self._link,
            self._tokenizer,
            model.eos_token_ids,
            self._settings.stream_buffer_bytes,
            request_id=request.request_id,
            resume=message,
            time_left_ns=_time_left(deadline_ns, detached),
        )
        self._link.resume(generation)
        return generation

    async def _input_ids(self, request: inference_pb2.ContinueRequest, model: ModelLimits) -> Sequence[int]:
        """What is appended: at least one token, or nothing if nothing is given."""
        kind = request.WhichOneof("input")
        if kind is None:
            return []
        field = f"input.{kind}"
        ids: Sequence[int]
        if kind == "token_ids":
            field, ids = "input.token_ids.ids", request.token_ids.ids
        else:
            text_violations = validator.check_text(field, request.text)
            if text_violations:
                raise invalid(text_violations, validator.reason_for(text_violations))
            ids = await self._need_tokenizer(field).encode(request.text, add_special_tokens=False)
        violations = validator.prompt_violations(field, len(ids), model)
        if not violations:
            violations = validator.check_token_ids(field, ids, model.vocab_size)
        if violations:
            raise invalid(violations, validator.reason_for(violations))
        return ids

    def _check_room(self) -> None:
        """Raises RequestError when this gateway holds as many requests as it may."""
        if self._link.live_requests + len(self._preparing) >= self._settings.max_live_requests:
            message = f"this gateway holds {self._settings.max_live_requests} requests already"
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.GATEWAY_FULL, message, retry_after_ns=RETRY_SOON_NS
            )

    async def cancel(self, request_id: str) -> bool:
        """Ends a request by name, in whatever state it is. Returns whether it was live."""
        if violations := _request_id_violations(request_id):
            raise invalid(violations)
        if request_id in self._preparing:
            self._preparing[request_id] = True
            return True
        for _ in range(CANCEL_RETRIES):
            if await self._link.abort(request_id):
                return True
            if not self._link.is_live(request_id):
                return False
            await asyncio.sleep(CANCEL_RETRY_S)
        return False

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> Sequence[int]:
        """Token ids of a text or a chat, however many."""
        self._check_name(request.model)
        kind = request.WhichOneof("input")
        if kind == "text":
            return await self._encode_text("input.text", request.text, empty_allowed=True)
        if kind == "chat":
            return await self._encode_chat("input.chat", request.chat)
        raise invalid([Violation("input", "is not set: give text or chat")])

    def detokenize(self, request: inference_pb2.DetokenizeRequest) -> str:
        """Text of token ids, special tokens left out."""
        self._check_name(request.model)
        highest = int(CEILINGS["detokenize.token_ids"].highest)
        if len(request.token_ids) > highest:
            raise invalid([Violation("token_ids", f"must have at most {highest} entries")])
        tokenizer = self._need_tokenizer("token_ids")
        if violations := validator.check_token_ids("token_ids", request.token_ids, self.model().vocab_size):
            raise invalid(violations)
        return tokenizer.decode(list(request.token_ids))

    def models(self) -> list[inference_pb2.Model]:
        """The served model; none while no worker has ever been seen."""
        state = self._link.state
        if state is None or not state.HasField("model"):
            return []
        info = state.model
        return [
            inference_pb2.Model(
                name=self._settings.served_model_name or info.name,
                max_model_len=info.max_model_len,
                vocab_size=info.vocab_size,
                dtype=info.dtype,
                block_size=state.block_size,
                kv_blocks=state.kv_blocks,
                ready=self._link.ready,
            )
        ]

    # Inside.

    def _submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        resolved: validator.ResolvedRequest,
        model: ModelLimits,
        detached: bool,
        traceparent: str,
    ) -> scheduler_pb2.Submit:
        sampling = inference_pb2.SamplingParams()
        sampling.CopyFrom(resolved.sampling)
        if not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)
        return scheduler_pb2.Submit(
            request_id=request_id,
            token_ids=token_ids,
            sampling=sampling,
            stop=validator.cut_to_context(resolved.stop, len(token_ids), model, self._settings.default_max_tokens),
            output=resolved.output,
            priority=resolved.priority,
            tenant=resolved.tenant,
            detached=detached,
            traceparent=traceparent,
            hold_seconds=resolved.hold_seconds,
        )

    async def _prompt_ids(self, request: inference_pb2.GenerateRequest, model: ModelLimits) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind == "token_ids":
            return request.token_ids.ids
        field = f"prompt.{kind}"
        ids = await (
            self._encode_text(field, request.text) if kind == "text" else self._encode_chat(field, request.chat)
        )
        if violations := validator.prompt_violations(field, len(ids), model):
            raise invalid(violations, validator.reason_for(violations))
        if max(ids) >= model.vocab_size:
            message = "has text that the model has no token for: the gateway's tokenizer is not the model's"
            raise invalid([Violation(field, message)])
        return ids

    async def _encode_text(self, field: str, text: str, *, empty_allowed: bool = False) -> Sequence[int]:
        violations = validator.check_text(field, text)
        if violations and not (empty_allowed and not text):
            raise invalid(violations, validator.reason_for(violations))
        return await self._need_tokenizer(field).encode(text)

    async def _encode_chat(self, field: str, chat: inference_pb2.ChatPrompt) -> Sequence[int]:
        violations = validator.check_chat(field, chat)
        if violations:
            raise invalid(violations)
        tokenizer = self._need_tokenizer(field)
        if self._chat is None:
            description = "the model has no chat template: send prompt.text or prompt.token_ids instead"
            raise invalid([Violation(field, description)], Reason.NO_CHAT_TEMPLATE)
        text = await self._chat.render([(message.role, message.content) for message in chat.messages], field)
        # The template writes the special tokens itself.
        return await tokenizer.encode(text, add_special_tokens=False)

    def _need_tokenizer(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            description = "cannot be used: this gateway has no tokenizer; send prompt.token_ids"
            raise invalid([Violation(field, description)], Reason.NO_TOKENIZER)
        return self._tokenizer

    def _check_name(self, name: str) -> None:
        if name:
            self.model(name)

    def _not_ready(self) -> RequestError:
        state = self._link.state
        if not self._link.connected or state is None:
            return unavailable(Reason.NO_SCHEDULER, "the scheduler cannot be reached")
        if state.draining:
            return unavailable(Reason.DRAINING, "the service is draining and takes no new requests")
        return unavailable(Reason.NO_WORKER, "no worker is ready")

    @staticmethod
    def _no_such_model(served: str) -> RequestError:
        message = f"model: there is no such model here; {served!r} is served"
        return RequestError(grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, message)

    @staticmethod
    def _end_cancelled(generation: Generation, submit: scheduler_pb2.Submit) -> None:
        """Ends a request that was cancelled before it was submitted, as one that was cancelled in the queue ends."""
        usage = inference_pb2.Usage(prompt_tokens=len(submit.token_ids))
        finish = inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_CANCELLED, usage=usage)
        for index in range(generation.n):
            generation.finished(index, finish)
        generation.wake()


def _request_id_violations(request_id: str) -> list[Violation]:
    if not request_id:
        return [Violation("request_id", "is empty")]
    return validator.identifier_violations("request_id", request_id)


def _time_left(deadline_ns: int | None, detached: bool) -> Callable[[], int] | None:
    """What tells how many nanoseconds a request has left. None: it has no deadline, or is detached: not bound to the
    call, whose deadline does not end it then."""
    return None if deadline_ns is None or detached else lambda: max(1, deadline_ns - time.monotonic_ns())
