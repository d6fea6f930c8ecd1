"""A scheduler whose every word is said by the test: a real server on loopback with Session, Abort and GetServerInfo."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc.aio

from pagewire.runtime.channel import server_options
from pagewire.v1 import (
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    worker_pb2,
)

LIMIT_S = 20.0
EOS = 1
CONTEXT = 4096

Finish = tuple[int, int, inference_pb2.FinishReason]


def model_state(*, ready: bool = True, workers: int = 1, vocab_size: int = 600, **fields: Any) -> Any:
    """What the fake serves."""
    model = worker_pb2.ModelInfo(
        name="tiny", vocab_size=vocab_size, max_model_len=CONTEXT, dtype="float32", eos_token_ids=[EOS]
    )
    return scheduler_pb2.ModelState(model=model, block_size=16, kv_blocks=100, ready=ready, workers=workers, **fields)


class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer, control_pb2_grpc.ControlServiceServicer):
    """Plays one scheduler. Messages of gateways are taken with `expect`; steps are said with `step` and its like."""

    def __init__(self) -> None:
        self.address = ""
        self.state = model_state()
        self.live_ids: set[str] = set()
        self.aborted: list[str] = []
        self.hellos: list[scheduler_pb2.GatewayHello] = []
        self.credit_given = 0
        self._received: asyncio.Queue[scheduler_pb2.SessionRequest] = asyncio.Queue()
        self._outgoing: asyncio.Queue[scheduler_pb2.SessionResponse | None] = asyncio.Queue()
        self._opened = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> None:
        """Listens; a second start after `stop` takes the address of the first."""
        self._server = grpc.aio.server(options=server_options(internal=True))
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or address)
        self.address = self.address or f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Goes away; sessions break."""
        self._opened.clear()
        if self._server is not None:
            await self._server.stop(0)
        self._server = None

    def break_session(self) -> None:
        """Ends the open session with UNAVAILABLE; the gateway will come back."""
        self._opened.clear()
        self._outgoing.put_nowait(None)

    async def opened(self) -> None:
        """Returns when a session is open."""
        async with asyncio.timeout(LIMIT_S):
            await self._opened.wait()

    # What gateways call.

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[scheduler_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.SessionResponse]:
        first = await anext(request_iterator)
        assert first.WhichOneof("message") == "hello"
        self.hellos.append(first.hello)
        self._outgoing = asyncio.Queue()
        outgoing = self._outgoing
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            yield scheduler_pb2.SessionResponse(welcome=scheduler_pb2.SessionWelcome(session_id="s"))
            yield scheduler_pb2.SessionResponse(model_state=self.state)
            self._opened.set()
            while (message := await outgoing.get()) is not None:
                yield message
        finally:
            reader.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")

    async def _read(self, requests: AsyncIterator[scheduler_pb2.SessionRequest]) -> None:
        async for message in requests:
            if message.WhichOneof("message") == "credit":
                self.credit_given += message.credit.steps
            else:
                self._received.put_nowait(message)

    async def Abort(self, request: scheduler_pb2.AbortRequest, context: Any) -> Any:  # noqa: N802
        self.aborted.append(request.request_id)
        return scheduler_pb2.AbortResponse(found=request.request_id in self.live_ids)

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return control_pb2.GetServerInfoResponse(version="fake", protocol_version=1)

    # What the test does.

    async def expect(self, kind: str) -> Any:
        """The gateway's next message, which must be of this kind."""
        async with asyncio.timeout(LIMIT_S):
            message = await self._received.get()
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)

    def said_nothing_more(self) -> bool:
        """Whether everything the gateway has said was expected."""
        return self._received.empty()

    def say(self, **message: Any) -> None:
        """One message to the gateway."""
        self._outgoing.put_nowait(scheduler_pb2.SessionResponse(**message))

    def set_state(self, state: scheduler_pb2.ModelState) -> None:
        """Says a new model state, also to later sessions."""
        self.state = state
        self.say(model_state=state)

    def step(
        self,
        tokens: Sequence[tuple[int, int]] = (),
        *,
        admitted: Mapping[int, int] | None = None,
        finished: Sequence[Finish] = (),
        logprobs: Sequence[inference_pb2.TokenLogprobs] = (),
        **fields: Any,
    ) -> None:
        """One step message.

        Args:
            tokens: (stream, token id).
            admitted: prompt length by first stream.
            finished: (stream, tokens sent, reason).
            logprobs: one for each token, or none.
        """
        finishes = [
            scheduler_pb2.StreamFinished(
                stream=stream,
                num_tokens=count,
                finish=inference_pb2.Finish(
                    reason=reason, usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=count)
                ),
            )
            for stream, count, reason in finished
        ]
        admissions = [
            scheduler_pb2.StreamAdmitted(stream=stream, prompt=inference_pb2.PromptInfo(prompt_tokens=length))
            for stream, length in (admitted or {}).items()
        ]
        self.say(
            step=scheduler_pb2.SessionStep(
                streams=[stream for stream, _ in tokens],
                token_ids=[token_id for _, token_id in tokens],
                logprob_rows=range(len(logprobs)),
                logprobs=logprobs,
                admitted=admissions,
                finished=finishes,
                **fields,
            )
        )

    def fail(self, stream: int, code: grpc.StatusCode, reason: str, retry_after_ns: int = 0) -> None:
        """Ends a request with an error."""
        failed = scheduler_pb2.StreamFailed(
            stream=stream, code=code.value[0], reason=reason, message="said by the test", retry_after_ns=retry_after_ns
        )
        self.step(failed=[failed])

    def answer_attach(
        self, stream: int, request: scheduler_pb2.Submit, outputs: Sequence[Sequence[int]], finished: bool = False
    ) -> None:
        """Answers AttachStream with everything so far."""
        finish = inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_LENGTH)
        sequences = [
            scheduler_pb2.SequenceState(token_ids=output, finish=finish if finished else None) for output in outputs
        ]
        answer = scheduler_pb2.StreamAttached(
            stream=stream,
            request=request,
            prompt=inference_pb2.PromptInfo(prompt_tokens=len(request.token_ids)),
            sequences=sequences,
        )
        self.step(attached=[answer])
