"""What only a GPU can show: real sizes, captured graphs, other streams, many launches."""

from __future__ import annotations

import pytest
import torch

from kernels import attention, cache, linear_tall, reference, sampling, step, swap
from kernels import compile as kernel_compile

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16


class Problem:
    """Random keys and values for sequences of given lengths in randomly placed blocks of a pool of two layers."""

    def __init__(
        self, context_lens: list[int], new: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(len(context_lens))
        blocks = [-(-n // BLOCK) for n in context_lens]
        places = torch.randperm(sum(blocks) + 1, generator=generator, device=device).to(torch.int32)
        self.pool = torch.randn(
            (sum(blocks) + 1, 2, 2, KV_HEADS, BLOCK, HEAD_DIM), generator=generator, device=device, dtype=dtype
        )
        self.tables = torch.full((len(blocks), max(blocks)), 2**30, dtype=torch.int32, device=device)
        used = 0
        for row, (count, length) in enumerate(zip(blocks, context_lens, strict=True)):
            self.tables[row, :count] = places[used : used + count]
            used += count
            if length % BLOCK:
                self.pool[places[used - 1].item(), :, :, :, length % BLOCK :] = float("nan")
        self.layer = self.pool[:, 1]
        self.lengths = torch.tensor(context_lens, dtype=torch.int32, device=device)
        self.query = torch.randn(
            (len(context_lens) * new, HEADS, HEAD_DIM), generator=generator, device=device, dtype=dtype
        )
        self.starts = torch.arange(0, len(context_lens) * new + 1, new, dtype=torch.int32, device=device)
        self.new = new
        self.scale = HEAD_DIM**-0.5

    def decode(self) -> torch.Tensor:
        return attention.paged_attention_decode(self.query, self.layer, self.tables, self.lengths, self.scale)

    def prefill(self) -> torch.Tensor:
        return attention.paged_attention_prefill(
            self.query, self.layer, self.tables, self.lengths, self.starts, self.scale
        )

    def simple(self) -> torch.Tensor:
        """The same by the simple kernel, in float32 arithmetic on the same bits."""
        out = torch.empty_like(self.query)
        attention._simple(
            self.query, out, self.layer, self.tables, self.lengths, self.starts, 0, self.scale, None, None
        )
        return out


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("batch", "context"), [(1, 1024), (1, 8192), (1, 65536), (8, 16384), (64, 512), (64, 4096), (256, 2048)]
)
def test_decode_of_the_measured_sizes_agrees_with_the_simple_kernel(
    cuda: torch.device, batch: int, context: int
) -> None:
    problem = Problem([context] * batch, 1, cuda)
    out = problem.decode()
    assert error(out, problem.simple()) < 5e-3
    for _ in range(20):
        assert torch.equal(problem.decode(), out)


def test_decode_of_very_uneven_lengths_agrees_with_the_simple_kernel(cuda: torch.device) -> None:
    lengths = [1 + (i * 7919) % 3000 for i in range(200)] + [30000, 1, 17]
    problem = Problem(lengths, 1, cuda)
    assert error(problem.decode(), problem.simple()) < 5e-3


def test_more_sequences_than_one_launch_takes_are_split(cuda: torch.device) -> None:
    problem = Problem([1 + i % 40 for i in range(attention.MAX_SEQUENCES + 300)], 1, cuda)
    assert error(problem.decode(), problem.simple()) < 5e-3


@pytest.mark.parametrize(("batch", "new", "context"), [(1, 512, 512), (1, 2048, 2048), (4, 512, 2048), (16, 256, 1024)])
def test_prefill_of_the_measured_sizes_agrees_with_the_simple_kernel(
    cuda: torch.device, batch: int, new: int, context: int
) -> None:
    problem = Problem([context] * batch, new, cuda)
    out = problem.prefill()
    assert error(out, problem.simple()) < 5e-3
    for _ in range(5):
        assert torch.equal(problem.prefill(), out)


def test_one_captured_graph_serves_any_lengths(cuda: torch.device) -> None:
    problem = Problem([3000] * 32, 1, cuda)
    problem.decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = problem.decode()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 2999, (32,), generator=generator, dtype=torch.int32)
        problem.lengths.copy_(lengths)
        problem.query.normal_()
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, problem.decode())
        assert error(replayed, problem.simple()) < 5e-3


def test_a_launch_on_another_stream_runs_in_that_stream_s_order(cuda: torch.device) -> None:
    problem = Problem([2000] * 8, 1, cuda)
    wanted = problem.decode()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        held = problem.query.clone()
        problem.query.zero_()
        problem.query.copy_(held)
        out = problem.decode()
    stream.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "spread"),
    [(0.8, 50, 0.95, 3.0), (1.0, 0, 0.95, 3.0), (1.0, 0, 0.9, 0.05), (0.1, 50, 1.0, 3.0), (1.0, 0, 1.0, 3.0)],
)
def test_tokens_sampled_from_a_large_vocabulary_are_the_twin_s(
    cuda: torch.device, temperature: float, top_k: int, top_p: float, spread: float
) -> None:
    rows, size = 64, 128256
    logits = torch.randn(rows, size, device=cuda, generator=torch.Generator(device=cuda).manual_seed(1)) * spread
    seeds = torch.arange(rows, device=cuda)
    arguments = (
        torch.full((rows,), temperature, device=cuda),
        torch.full((rows,), top_k, device=cuda),
        torch.full((rows,), top_p, device=cuda),
        torch.zeros(rows, device=cuda),
        seeds,
        torch.zeros_like(seeds),
        torch.zeros_like(seeds),
    )
    actual = sampling.sample(logits, *arguments)
    # Two sums, or two ends of a nucleus, within rounding of one another may swap; of 64 rows at most one should.
    assert (actual != reference.sample(logits, *arguments)).sum() <= 1
    for _ in range(10):
        assert torch.equal(sampling.sample(logits, *arguments), actual)


def test_logprobs_of_a_large_vocabulary_are_the_twin_s(cuda: torch.device) -> None:
    logits = torch.randn(16, 128256, device=cuda) * 3
    chosen = torch.randint(0, 128256, (16,), device=cuda)
    actual, wanted = (f.token_logprobs(logits, chosen, 20) for f in (sampling, reference))
    assert torch.equal(actual.ranks, wanted.ranks)
    assert torch.equal(actual.top_ids, wanted.top_ids)
    torch.testing.assert_close(actual.top_logprobs, wanted.top_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_elements", [4096, 1 << 20])
def test_blocks_swapped_to_pinned_memory_and_back_are_bit_exact(cuda: torch.device, block_elements: int) -> None:
    pool = torch.randn(64, block_elements, device=cuda, dtype=torch.bfloat16)
    wanted = pool.clone()
    arena = torch.empty(64, block_elements, dtype=torch.bfloat16, pin_memory=True)
    there, back = torch.randperm(64), torch.randperm(64)
    swap.swap_blocks(pool, arena, torch.arange(64), there)
    pool.zero_()
    swap.swap_blocks(arena, pool, there, back)
    torch.cuda.synchronize()
    assert torch.equal(pool[back.to(cuda)], wanted)


def test_a_step_s_words_do_not_wait_for_swaps(cuda: torch.device) -> None:
    pool = torch.empty(512, 1 << 20, device=cuda, dtype=torch.bfloat16)
    arena = torch.empty(512, 1 << 20, dtype=torch.bfloat16, pin_memory=True)
    words = torch.arange(100)
    there, back = words.pin_memory(), torch.zeros_like(words).pin_memory()
    on_device = torch.zeros_like(words, device=cuda)
    step.copy_words(there, on_device)  # compiles
    ids = torch.arange(512)
    torch.cuda.synchronize()
    streams, ends = [torch.cuda.Stream(cuda) for _ in range(2)], []
    for stream, moved in zip(streams, ((arena, pool), (pool, arena)), strict=True):
        with torch.cuda.stream(stream):
            for _ in range(4):  # tens of milliseconds of the bus, both ways
                swap.swap_blocks(*moved, ids, ids)
            ends.append(stream.record_event())
    step.copy_words(there, on_device)
    step.copy_words(on_device, back)
    torch.cuda.current_stream(cuda).synchronize()
    assert not any(end.query() for end in ends), "words are there while swaps still run"
    assert torch.equal(back, words)
    torch.cuda.synchronize()


def test_mapped_host_memory_is_copied_bit_exactly_by_the_kernel(cuda: torch.device) -> None:
    pool = torch.randn(8, 1 << 18, device=cuda, dtype=torch.bfloat16)
    arena = torch.empty(8, 1 << 18, dtype=torch.bfloat16, pin_memory=True)
    ids = torch.arange(8, device=cuda)
    cache.launch_copies(pool, arena, ids, ids.flip(0).contiguous())
    torch.cuda.synchronize()
    assert torch.equal(arena.flip(0), pool.cpu())


@pytest.mark.parametrize("tokens", [224, 256, 320, 512, 513, 700, 1024, 2100])
def test_gate_and_up_projection_of_a_large_model_agrees_with_float64(cuda: torch.device, tokens: int) -> None:
    if not kernel_compile.limits(cuda).wgmma:
        pytest.skip("needs compute capability 9.0")
    generator = torch.Generator(device=cuda).manual_seed(tokens)
    x, gate_up = (
        torch.randn(rows, 4096, generator=generator, device=cuda, dtype=torch.bfloat16) for rows in (tokens, 28672)
    )
    gate_up /= 64
    out = linear_tall.linear_gated(x, gate_up)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=1)
    assert error(out, gate * torch.sigmoid(gate) * up) < 2.5e-3
