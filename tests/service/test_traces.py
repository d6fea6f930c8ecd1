"""One request is one connected trace through client, gateway, scheduler and worker; and the logs of all of them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from opentelemetry.sdk.trace import TracerProvider

from pagewire import AsyncClient
from pagewire.bundled import BUNDLED_NAME
from pagewire.v1 import inference_pb2, inference_pb2_grpc, open_inference_pb2_grpc
from pagewire.v1 import open_inference_pb2 as oip
from tests.collector import Collected, Collector, collecting
from tests.service import service

LIMIT_S = 60
PROMPT = "zebra zebra zebra The function returns"
MAX_TOKENS = 8
CLIENT_SPAN = "b7ad6b7169203331"
GENERATE, TOKENIZE = "pagewire.gateway.generate", "pagewire.gateway.tokenize"
REQUEST, QUEUE, STEP = "pagewire.scheduler.request", "pagewire.scheduler.queue", "pagewire.worker.step"
ATTRIBUTES = Path(__file__).parents[2] / "docs" / "traces.md"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> AsyncIterator[service.Service]:
    folder = tmp_path_factory.mktemp("traces")
    arguments = ["--num-blocks", "64", "--max-num-seqs", "4", "--log-level", "debug"]
    tracing = ["--otlp-endpoint", collector.address, "--trace-sample-ratio", "0"]
    async with service.running(folder / "up", *arguments, *tracing) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def context(number: int, *, sampled: bool = True) -> tuple[str, str]:
    """A trace id, and the traceparent of a client's span in it."""
    trace_id = f"{number:032x}"
    return trace_id, f"00-{trace_id}-{CLIENT_SPAN}-0{int(sampled)}"


async def over_grpc(up: service.Service, traceparent: str) -> None:
    request = inference_pb2.GenerateRequest(
        text=PROMPT, stop=inference_pb2.StopParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    )
    async with up.channel() as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        await service.collect(stub.Generate(request, metadata=(("traceparent", traceparent),)))


async def over_http(up: service.Service, traceparent: str) -> None:
    async with AsyncOpenAI(base_url=f"http://{up.ready['http']}/v1", api_key="none", max_retries=0) as client:
        await client.completions.create(
            model=BUNDLED_NAME,
            prompt=PROMPT,
            max_tokens=MAX_TOKENS,
            extra_body={"ignore_eos": True},
            extra_headers={"traceparent": traceparent},
        )


async def over_kserve(up: service.Service, traceparent: str) -> None:
    request = oip.ModelInferRequest(id="a")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(PROMPT.encode())
    request.parameters["max_tokens"].int64_param = MAX_TOKENS
    request.parameters["ignore_eos"].bool_param = True
    async with up.channel() as channel:
        stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(request, metadata=(("traceparent", traceparent),))


def assert_connected(spans: list[Collected], client_span: str = CLIENT_SPAN) -> None:
    known = {span.span_id for span in spans} | {client_span}
    assert [span.name for span in spans if span.parent_id not in known] == []
    assert [span.name for span in spans if span.parent_id == client_span] == [GENERATE]


@pytest.mark.parametrize("door", [over_grpc, over_http, over_kserve])
async def test_a_request_is_one_connected_trace_over_every_door(
    up: service.Service, collector: Collector, door: Any
) -> None:
    trace_id, traceparent = context(100 + [over_grpc, over_http, over_kserve].index(door))
    async with asyncio.timeout(LIMIT_S):
        await door(up, traceparent)
        for name in (GENERATE, REQUEST, STEP):
            await collector.wait_for(trace_id, name)
        while len(collector.of(trace_id, STEP)) < MAX_TOKENS:
            await asyncio.sleep(0.01)
    spans = collector.of(trace_id)
    assert_connected(spans)
    services = {span.service for span in spans}
    assert services == {"pagewire-gateway", "pagewire-scheduler", "pagewire-worker"}
    (request,), (generate,), (queue,) = (collector.of(trace_id, name) for name in (REQUEST, GENERATE, QUEUE))
    (tokenize,) = collector.of(trace_id, TOKENIZE)
    assert request.parent_id == tokenize.parent_id == generate.span_id
    assert queue.parent_id == request.span_id
    assert request.about["pagewire.request_id"] == generate.about["pagewire.request_id"] != ""
    assert request.about["pagewire.completion_tokens"] == generate.about["pagewire.completion_tokens"] == MAX_TOKENS
    steps = collector.of(trace_id, STEP)
    assert {step.parent_id for step in steps} == {request.span_id}
    numbers = [step.about["pagewire.step"] for step in steps]
    assert numbers == sorted(set(numbers))
    assert steps[0].about["pagewire.chunk_tokens"] + request.about["pagewire.cached_tokens"] > 0
    assert all(step.about["pagewire.epoch"] > 0 and step.end_ns > step.begin_ns for step in steps)
    assert not any(span.failed for span in spans)


async def test_a_program_with_opentelemetry_finds_the_request_in_its_own_trace(
    up: service.Service, collector: Collector
) -> None:
    tracer = TracerProvider().get_tracer("a program")
    with tracer.start_as_current_span("its work") as span:
        trace_id, span_id = f"{span.get_span_context().trace_id:032x}", f"{span.get_span_context().span_id:016x}"
        async with AsyncClient(up.address) as client:
            async for _ in client.generate([5, 6, 7], max_tokens=2):
                pass
    async with asyncio.timeout(LIMIT_S):
        for name in (GENERATE, REQUEST):
            await collector.wait_for(trace_id, name)
    assert (await collector.wait_for(trace_id, GENERATE)).parent_id == span_id


async def test_a_refused_request_ends_its_trace_with_the_reason(up: service.Service, collector: Collector) -> None:
    trace_id, traceparent = context(200)
    wrong = inference_pb2.GenerateRequest(text=PROMPT, sampling=inference_pb2.SamplingParams(temperature=-1))
    async with up.channel() as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(Exception, match="temperature"):
            await service.collect(stub.Generate(wrong, metadata=(("traceparent", traceparent),)))
    async with asyncio.timeout(LIMIT_S):
        assert (await collector.wait_for(trace_id, GENERATE)).failed == "INVALID_FIELD"


async def test_what_is_not_sampled_is_not_sent_and_nothing_sent_holds_a_prompt(
    up: service.Service, collector: Collector
) -> None:
    """The ratio is 0, so only requests whose client says so are sampled."""
    unsampled, without = context(300, sampled=False)
    await over_grpc(up, without)
    await over_grpc(up, "no trace context")
    before = {span.trace_id for span in collector.spans}
    trace_id, traceparent = context(301)
    await over_grpc(up, traceparent)  # what is sent after the others comes after them
    async with asyncio.timeout(LIMIT_S):
        for name in (GENERATE, REQUEST, STEP):
            await collector.wait_for(trace_id, name)
    assert unsampled not in {span.trace_id for span in collector.spans}
    assert {span.trace_id for span in collector.spans} == before | {trace_id}
    sent = b"".join(collector.raw)
    assert b"zebra" not in sent
    assert not any(isinstance(value, list) for span in collector.spans for value in span.about.values())


async def test_the_document_lists_the_spans_and_their_attributes(collector: Collector) -> None:
    """What was sent by all tests before is documented, and all that is documented was sent."""
    rows = re.findall(r"^\| `(pagewire\.[a-z.]+)` \| \w+ \|(.*) \|$", ATTRIBUTES.read_text(), re.MULTILINE)
    documented = {name: {f"pagewire.{word}" for word in re.findall(r"`(\w+)`", words)} for name, words in rows}
    sent: dict[str, set[str]] = {}
    for span in collector.spans:
        sent.setdefault(span.name, set()).update(span.about.keys() - {"error.type"})
    assert sent == documented


async def test_every_role_logs_json_lines_with_request_epoch_and_step(up: service.Service) -> None:
    lines = [json.loads(line) for line in up.log.read_text().splitlines() if line.startswith("{")]
    known: dict[tuple[str, str], dict[str, Any]] = {(line["role"], line["event"]): line for line in lines}
    assert {role for role, _ in known} >= {"gateway", "scheduler", "worker"}
    assert all({"time", "level", "pid", "module"} <= line.keys() for line in lines)
    assert re.fullmatch(r"[\w-]{1,128}", known["scheduler", "request accepted"]["request_id"])
    assert re.fullmatch(r"[\w-]{1,128}", known["gateway", "request submitted"]["request_id"])
    epoch = known["worker", "joined"]["epoch"]
    for line in (known["scheduler", "plan sent"], known["worker", "step done"]):
        assert line["epoch"] == epoch
        assert line["step"] > 0
    assert "zebra" not in up.log.read_text()
