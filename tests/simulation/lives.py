"""The core's random lives, recorded: beams, parks, preemptions, lost workers and unruly results in one file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

from pagewire.v1 import inference_pb2, scheduler_pb2, worker_pb2
from scheduler import codec
from scheduler.dispatcher import Continuation, Dispatcher, Resumed, Submitted
from scheduler.draft import StepOutput
from scheduler.policy import SchedulerConfig, TransferRates, WorkerCapacity
from scheduler.recorder import RecordedDispatcher, Recorder
from scheduler.sequence import Request
from scheduler.step_plan import StepPlan, StepResult
from tests.core.simulated_worker import VOCABULARY, Behaviour
from tests.core.test_simulation import Simulation

NS_PER_S = 1_000_000_000
MODEL = worker_pb2.ModelInfo(
    name="simulated", fingerprint="abc", vocab_size=VOCABULARY, max_model_len=10**6, dtype="float32"
)


def _for_the_wire(request: Request) -> Request:
    """The request with a Submit as its payload, in which the simulated model's behaviour hides."""
    submit = scheduler_pb2.Submit(
        request_id=request.request_id,
        token_ids=request.prompt,
        sampling=inference_pb2.SamplingParams(
            temperature=0, n=request.n, beam_width=request.beam_width, length_penalty=request.length_penalty
        ),
        stop=inference_pb2.StopParams(
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=sorted(request.stop_ids),
            ignore_eos=True,
        ),
        output=inference_pb2.OutputOptions(logprobs=request.logprobs, prompt_logprobs=request.prompt_logprobs),
        priority=request.priority,
        tenant=request.tenant,
        hold_seconds=request.hold_ns // NS_PER_S,
        traceparent=json.dumps(dataclasses.asdict(request.payload)),  # type: ignore[call-overload]
    )
    return replace(request, payload=submit, hold_ns=request.hold_ns // NS_PER_S * NS_PER_S)


def _for_the_worker(request: Request) -> Request:
    if isinstance(request.payload, Behaviour):
        return request
    assert isinstance(request.payload, scheduler_pb2.Submit)
    return replace(request, payload=Behaviour(**json.loads(request.payload.traceparent)))


class _Core(Dispatcher):
    """Under the recorder: the simulated worker's requests inside, the wire's outside."""

    plan: StepPlan | None = None
    """The last one, as the worker wants it."""

    def submit(self, request: Request, now: int) -> Submitted:
        return super().submit(_for_the_worker(request), now)

    def schedule(self, worker_id: str, now: int) -> StepPlan | None:
        self.plan = plan = super().schedule(worker_id, now)
        if plan is None:
            return None
        rows = [row._replace(request=_for_the_wire(row.request)) for row in plan.new_sequences]
        return replace(plan, new_sequences=rows)


class _Recorded(RecordedDispatcher, _Core):
    """Over the recorder: what the simulation sees."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config, self._hello)
        self._said: tuple[WorkerCapacity, TransferRates]

    def _hello(self, worker_id: str) -> worker_pb2.WorkerHello:
        capacity, rates = self._said
        assert not rates.chunk_steps
        return worker_pb2.WorkerHello(
            protocol_version=1,
            worker_id=worker_id,
            model=MODEL,
            capacity=worker_pb2.WorkerCapacity(**dataclasses.asdict(capacity)),
            swap_out_bytes_per_second=rates.swap_out_bytes_per_second,
            swap_in_bytes_per_second=rates.swap_in_bytes_per_second,
            prefill_tokens_per_second=rates.prefill_tokens_per_second,
        )

    def add_worker(self, worker_id: str, capacity: WorkerCapacity, rates: TransferRates, epoch: int, now: int) -> None:
        self._said = (capacity, rates)
        super().add_worker(worker_id, capacity, rates, epoch, now)

    def submit(self, request: Request, now: int) -> Submitted:
        return super().submit(_for_the_wire(request), now)

    def resume(self, request_id: str, what: Continuation, now: int) -> Resumed:
        return super().resume(request_id, replace(what, max_model_len=MODEL.max_model_len), now)

    def schedule(self, worker_id: str, now: int) -> StepPlan | None:
        super().schedule(worker_id, now)
        return self.plan

    def apply(self, worker_id: str, result: StepResult, now: int) -> StepOutput:
        return super().apply(worker_id, codec.decode_result(codec.encode_result(result)), now)


class RecordedLife(Simulation):
    """A life of the core whose calls go to a file. That its outputs are right is tested elsewhere."""

    def __init__(self, seed: int, path: Path) -> None:
        super().__init__(seed)
        self.dispatcher = dispatcher = _Recorded(self.config)
        dispatcher.recorder = self.recorder = Recorder(path, self.config, {}, max_buffered=1 << 30)

    def record(self) -> None:
        """Lives it, and closes the file."""
        try:
            self.run()
        finally:
            self.recorder.stop()

    def check_end(self) -> None:
        """Log-probabilities have been rounded on the wire, so other beams may have won."""
