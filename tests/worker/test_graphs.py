"""What surrounds CUDA graphs and streams, on a stand-in for torch.cuda that notes and replays: when graphs are captured
and used, and who waits for which copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scheduler.codec import rates_of
from tests.worker.test_executor import GREEDY, PROMPT, new
from tests.worker.toy import Steps, ToyModel, make_executor
from worker import chunk_graphs, decode, swapper
from worker.chunk_graphs import ChunkStep, Size
from worker.config import WorkerSettings
from worker.decode import DecodeStep, Mode
from worker.executor import Executor
from worker.main import make_hello
from worker.start import capture_graphs
from worker.step import BlockMoves, Fork, Sampling
from worker.upload import Upload


class Stream:
    """Notes what it is told to wait for."""

    def __init__(self, *_: object) -> None:
        self.waits: list[Any] = []

    def wait_stream(self, stream: Stream) -> None:
        self.waits.append(stream)

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)


class Event:
    """An event that passes when the test says so."""

    passed = False

    def query(self) -> bool:
        return self.passed


class Graph:
    """Replays the step that ran while it was captured."""

    steps: list[Callable[[], object]]
    replays = 0

    def capture_begin(self, pool: object) -> None:
        assert pool == "memory"

    def capture_end(self) -> None:
        self.step = self.steps[-1]

    def replay(self) -> None:
        type(self).replays += 1
        self.step()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda for `worker.decode` and `worker.swapper`."""
    current = Stream()
    steps: list[Callable[[], object]] = []

    class Captured(Graph):
        pass

    Captured.steps = steps
    fake = SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Captured,
        current=current,
        current_stream=lambda *_: current,
        stream=lambda stream: contextlib.nullcontext(),
        graph_pool_handle=lambda: "memory",
        empty_cache=lambda: None,
        synchronize=lambda *_: None,
    )
    run = DecodeStep.run

    def noted(self: DecodeStep, count: int, columns: int, mode: Mode, *, shared: bool = False) -> torch.Tensor:
        steps.append(lambda: run(self, count, columns, mode, shared=shared))
        return run(self, count, columns, mode, shared=shared)

    run_chunks = ChunkStep.run

    def noted_chunks(self: ChunkStep, size: Size) -> torch.Tensor:
        hidden = run_chunks(self, size)
        steps.append(lambda: hidden.copy_(run_chunks(self, size)))
        return hidden

    monkeypatch.setattr(DecodeStep, "run", noted)
    monkeypatch.setattr(ChunkStep, "run", noted_chunks)
    for module in (decode, swapper, chunk_graphs):
        monkeypatch.setattr(module, "torch", FakeTorch(fake))
    return fake


class FakeTorch:
    """torch with another `cuda`."""

    def __init__(self, cuda: SimpleNamespace) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def captured(model: ToyModel) -> Executor:
    executor = make_executor(model, buckets=(1, 2, 4, 8))
    executor.batch.block_tables.fill_(999)  # whatever padding would read there is not in the pool
    capture_graphs(executor)
    executor.batch.block_tables.zero_()
    assert executor.pool.device_blocks.isnan().all(), "capturing wrote to the pool"
    return executor


def test_decode_steps_are_replayed_and_give_the_tokens_of_called_ones(cuda: SimpleNamespace) -> None:
    model = ToyModel()
    executor = captured(model)
    steps = Steps(executor)
    hot = Sampling(temperature=0.9, seed=3, top_k=9)
    tokens: dict[bool, list[list[int]]] = {}
    for replayed in (True, False):
        if not replayed:
            executor.decode._graphs.clear()
        rows = [
            new(0, PROMPT, [0, 1, 2, 3]),
            new(2, PROMPT[:7], [4, 5, 6, 7], sampling=hot),
            new(5, [9], [8, 9], logprobs=1),
        ]
        before = cuda.CUDAGraph.replays
        results = [steps.run(new_sequences=rows, chunk_slots=[0, 2, 5], chunk_tokens=[10, 7, 1])]
        results.append(steps.run(decode_add=[0]))  # greedy
        results.append(steps.run(decode_add=[2]))  # one row draws
        results.append(steps.run(decode_add=[5]))  # one row wants log-probabilities
        results += [steps.run(), steps.run(decode_remove=[5])]
        assert cuda.CUDAGraph.replays - before == (5 if replayed else 0)
        tokens[replayed] = [list(result.token_ids) for result in results]
        assert [len(result.logprobs) for result in results] == [1, 0, 0, 1, 1, 0]
        steps.run(release_slots=[0, 2, 5])
    assert tokens[True] == tokens[False]
    assert [row[0] for row in tokens[True]] == model.greedy(PROMPT, 6)


def test_steps_with_chunks_are_replayed_and_give_the_tokens_of_called_ones(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_graphs, "ROWS", (4, 16, 1024))
    monkeypatch.setattr(chunk_graphs, "DECODE_ROWS", (2,))
    monkeypatch.setattr(chunk_graphs, "MOST_CHUNKS", 3)
    model = ToyModel()
    executor = make_executor(model, buckets=(1, 2, 4, 8), max_step_tokens=32)
    executor.batch.block_tables.fill_(999)  # whatever padding would read there is not in the pool
    capture_graphs(executor, chunks=True)
    measured = executor.chunk_graphs.measure(executor.runtime)
    executor.batch.block_tables.zero_()
    assert executor.pool.device_blocks.isnan().all(), "capturing or measuring wrote to the pool"
    graphs = executor.chunk_graphs
    assert list(measured) == [32, 16, 4]
    assert all(ns > 0 for ns in measured.values())
    assert [(size.more_decode_than, size.decode, size.rows) for size in graphs._graphs] == [
        *((-1, 0, 32), (0, 2, 32), (2, 8, 32)),
        *((-1, 0, 16), (0, 2, 16), (2, 8, 16)),
        *((-1, 0, 4), (0, 2, 4), (2, 4, 4)),
    ]
    steps = Steps(executor)
    answers = []
    for replayed in (True, False):
        if not replayed:
            graphs._graphs.clear()
        before = cuda.CUDAGraph.replays
        results = [
            steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2, 3])], chunk_slots=[0], chunk_tokens=[3]),
            steps.run(chunk_slots=[0], chunk_tokens=[7]),
        ]
        with_forks = [
            new(2, PROMPT[:7], [4, 5, 10], prompt_logprobs=1, logprobs=2),
            new(4, [9, 8], [8, 9], sampling=Sampling(temperature=0.9, seed=3)),
        ]
        forks = [Fork(2, 5, 1)]
        results += [
            steps.run(decode_add=[0], new_sequences=with_forks, chunk_slots=[2, 4], chunk_tokens=[7, 2], forks=forks),
            steps.run(
                replace_slots=[5, 5], replace_indices=[1, 2], replace_blocks=[7, 11], copies=BlockMoves([5], [7])
            ),
            steps.run(decode_add=[2, 4, 5], new_sequences=[new(1, [3] * 20, list(range(20, 26)))]),
            steps.run(chunk_slots=[1], chunk_tokens=[20]),
            steps.run(decode_add=[1]),
        ]
        answers.append([(list(r.token_ids), r.logprobs, r.prompt_logprobs) for r in results])
        assert cuda.CUDAGraph.replays - before == (7 if replayed else 3), "decode steps are graphs in either case"
        steps.run(release_slots=[0, 1, 2, 4, 5])
    assert answers[0] == answers[1]
    assert [answers[0][step][0][0] for step in range(1, 7)] == model.greedy(PROMPT, 6)


def test_a_scheduler_hears_what_each_size_of_steps_with_chunks_takes(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_graphs, "ROWS", (4, 16))
    executor = make_executor(ToyModel(), buckets=(8,), max_step_tokens=32)
    capture_graphs(executor, chunks=True)
    rates = rates_of(make_hello(WorkerSettings(), executor.model.spec, executor))
    assert {step.rows: step.ns for step in rates.chunk_steps} == executor.chunk_graphs._ns
    assert [step.rows for step in rates.chunk_steps] == [32, 16, 4]


def test_a_step_takes_the_fastest_size_that_holds_it(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graphs, "ROWS", (4, 16, 32))
    monkeypatch.setattr(chunk_graphs, "DECODE_ROWS", (2,))
    executor = make_executor(ToyModel(), buckets=(8,), max_step_tokens=32)
    capture_graphs(executor, chunks=True)
    graphs, steps = executor.chunk_graphs, Steps(executor)
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2, 3])], chunk_slots=[0], chunk_tokens=[10])
    executor.batch.change_decode_set([], [0])
    executor.batch.add([new(1, [3] * 20, list(range(4, 10)))], Upload(executor.runtime))

    def size_of(tokens: int) -> Size | None:
        return graphs.size(executor.batch.lay_out([1], [tokens], 32))

    assert [size_of(3), size_of(4)] == [Size(0, 2, 4), Size(0, 2, 16)], "the smallest, as long as none is measured"
    graphs._ns.update({4: 7, 16: 9, 32: 8})
    assert [size_of(3), size_of(4)] == [Size(0, 2, 4), Size(0, 2, 32)]


def test_a_step_of_more_chunks_or_tokens_than_any_graph_takes_is_launched_kernel_by_kernel(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_graphs, "MOST_CHUNKS", 2)
    model = ToyModel()
    executor = make_executor(model, buckets=(8,), max_step_tokens=64)
    capture_graphs(executor, chunks=True)
    before = cuda.CUDAGraph.replays
    rows = [new(slot, PROMPT, list(range(4 * slot, 4 * slot + 3))) for slot in range(3)]
    result = Steps(executor).run(new_sequences=rows, chunk_slots=[0, 1, 2], chunk_tokens=[10, 10, 10])
    assert list(result.token_ids) == [model.greedy(PROMPT, 1)[0]] * 3
    assert cuda.CUDAGraph.replays == before


def test_a_graph_is_captured_for_every_bucket_and_mode_largest_first(cuda: SimpleNamespace) -> None:
    executor = make_executor(ToyModel(), buckets=(1, 3, 8))
    assert list(executor.decode.capture()) == [(done, 9) for done in range(1, 10)]
    assert list(executor.decode._graphs)[::3] == [(size, Mode.GREEDY, False) for size in (8, 3, 1)]


def test_a_model_that_cannot_be_captured_decodes_eagerly(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: Graph) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda.CUDAGraph, "capture_end", refuse)
    model = ToyModel()
    executor = make_executor(model)
    capture_graphs(executor)
    steps = Steps(executor)
    steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[10])
    assert list(steps.run(decode_add=[0]).token_ids) == model.greedy(PROMPT, 2)[1:]


class StreamedSwaps:
    """An executor whose swaps go to two streams, and whose marks are events."""

    def __init__(self, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = ToyModel()
        self.executor = make_executor(self.model)
        self.steps = Steps(self.executor)
        swaps = self.executor.swapper
        self.out, self.back = swapper._Lane(Stream()), swapper._Lane(Stream())  # type: ignore[arg-type]
        swaps._lanes = (self.out, self.back)
        self.current = cuda.current
        self.marks: list[Event] = []
        monkeypatch.setattr(self.executor.runtime, "mark", self.mark)
        monkeypatch.setattr(self.executor.runtime, "elapsed_ns", lambda start, end: 5)
        self.executor.swap_rates = (1_000_000_000, 1_000_000_000)

    def mark(self) -> Event:
        self.marks.append(Event())
        return self.marks[-1]

    def waits(self) -> list[Any]:
        """What the computing stream was told to wait for since the last call."""
        found = list(self.current.waits)
        self.current.waits.clear()
        return found


def test_a_forward_pass_waits_for_the_copies_whose_blocks_it_needs_and_no_others(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps = StreamedSwaps(cuda, monkeypatch)
    run = swaps.steps.run
    run(
        new_sequences=[new(0, PROMPT, [0, 1, 2, 3, 20]), new(1, PROMPT[:6], [4, 5])],
        chunk_slots=[0, 1],
        chunk_tokens=[10, 6],
    )
    run(decode_add=[0, 1])
    assert swaps.waits() == []
    # Row 1 goes out; row 0 decodes on beside the copy.
    swaps.marks.clear()
    result = run(release_slots=[1], swap_out=BlockMoves([4, 5], [7, 8]))
    (out_end,) = swaps.out.ends.values()
    begin, *_, end, _, last = swaps.marks
    assert swaps.out.stream.waits == [begin], "the copy waits for the forward pass before it"
    assert out_end is last, "and is enqueued behind the step's own"
    assert swaps.executor._last_end is not None
    assert swaps.executor._last_end.mark is end
    assert swaps.waits() == []
    assert result.timings.swap_out_ns == 2 * swaps.executor.pool.layout.block_bytes, "at the measured rate"
    run()
    assert swaps.waits() == []
    # Block 5 is given to a new sequence: its chunk overwrites what the copy may still read.
    run(new_sequences=[new(2, [3, 4], [5])], chunk_slots=[2], chunk_tokens=[2])
    assert swaps.waits() == [out_end]
    # Row 1 comes back, to other blocks; the copy in waits for the copy out, the forward pass for the copy in.
    back = new(1, [*PROMPT[:6], 1, 1], [10, 11, 12], prompt_tokens=6, computed_tokens=7)
    run(swap_in=BlockMoves([7, 8], [10, 11]), new_sequences=[back], decode_add=[1])
    (in_end,) = swaps.back.ends.values()
    assert swaps.back.stream.waits == [swaps.current, out_end]
    assert swaps.waits() == [in_end]
    run()
    assert swaps.waits() == []
    # Copies that are over are forgotten.
    out_end.passed = in_end.passed = True
    run(release_slots=[2], swap_out=BlockMoves([5], [7]))
    assert list(swaps.out.ends) == [2]
    assert not swaps.back.ends


def test_a_copy_of_what_the_step_itself_overwrites_is_enqueued_before_it(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps = StreamedSwaps(cuda, monkeypatch)
    swaps.steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2])], chunk_slots=[0], chunk_tokens=[10])
    swaps.steps.run(
        release_slots=[0],
        swap_out=BlockMoves([1, 2], [7, 8]),
        new_sequences=[new(1, PROMPT[:6], [5, 2])],
        chunk_slots=[1],
        chunk_tokens=[6],
    )
    assert swaps.out.stream.waits == [swaps.current]
    assert swaps.waits() == list(swaps.out.ends.values())


def test_a_copy_within_the_pool_waits_for_the_copy_out_of_the_block_it_writes(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps = StreamedSwaps(cuda, monkeypatch)
    swaps.steps.run(new_sequences=[new(0, PROMPT, [0, 1, 2], sampling=GREEDY)], chunk_slots=[0], chunk_tokens=[10])
    swaps.steps.run(swap_out=BlockMoves([9], [0]), copies=BlockMoves([2], [9]))
    assert swaps.waits() == list(swaps.out.ends.values())
