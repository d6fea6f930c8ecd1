"""The engine with a small Llama on every device there is: graphs equal eager steps, swaps lose no bit, nothing waits.

On the CPU, where there are no graphs, this holds the tests themselves to account.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from worker.config import WorkerSettings
from worker.executor import Executor
from worker.models.loader import load_model
from worker.start import check_kernels, make_executor
from worker.step import BlockMoves, Fork, NewSequence, Sampling, StepPlan, StepResult

PROMPTS = [[7, 3, 30, 11, 25, 2, 19, 8, 40, 13], [5] * 17, [9, 4], [31, 32, 33, 34, 35, 36]]
GREEDY = Sampling(temperature=0.0)
HOT = Sampling(temperature=1.1, top_k=40, top_p=0.9, seed=77)
PENALISED = Sampling(temperature=0.9, seed=5, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias=((6, 2.0),))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        pytest.importorskip("cupy")
        check_kernels(torch.device("cuda", 0))
        return torch.device("cuda", 0)
    return torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.make_tiny_model("llama", tmp_path / "model", head_dim=16, max_position_embeddings=128)


def make(model: Path, device: torch.device, *, dtype: str = "float32", graphs: bool = True) -> Executor:
    settings = WorkerSettings(
        block_size=4,
        num_blocks=120,
        host_blocks=40,
        max_num_seqs=6,
        token_budget=64,
        decode_graphs=graphs,
        chunk_graphs=graphs,
    )
    executor = make_executor(settings, load_model(str(model), device=device, dtype=dtype), device)
    executor.pool.device_blocks.fill_(float("nan"))
    return executor


class Steps:
    """Numbers plans; launches them two ahead of their results, as a scheduler does."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.step = 0
        self.results: list[StepResult] = []
        self._launched: list[Any] = []

    def run(self, **fields: Any) -> None:
        self.step += 1
        with no_waiting(self.executor):
            self._launched.append(self.executor.launch(StepPlan(epoch=1, step=self.step, **fields)))
        while len(self._launched) > 2:
            self.results.append(self._launched.pop(0).result())

    def finish(self) -> list[StepResult]:
        self.results += [launched.result() for launched in self._launched]
        self._launched.clear()
        self.executor.batch.check_integrity()
        return self.results


@contextlib.contextmanager
def no_waiting(executor: Executor) -> Iterator[None]:
    """torch raises for every operation that waits for the device."""
    if not executor.runtime.runs_ahead:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new(slot: int, tokens: list[int], **fields: Any) -> NewSequence:
    blocks = list(range(slot * 20, slot * 20 + 16))
    fields = {"prompt_tokens": len(tokens), "computed_tokens": 0, "sampling": GREEDY, **fields}
    return NewSequence(slot=slot, token_ids=tokens, blocks=fields.pop("blocks", blocks), **fields)


def play(executor: Executor) -> list[list[int]]:
    """Rows that come and go, in every mode: the tokens of each step."""
    steps = Steps(executor)
    lengths = [len(prompt) for prompt in PROMPTS]
    steps.run(
        new_sequences=[new(0, PROMPTS[0]), new(1, PROMPTS[1], sampling=HOT)],
        chunk_slots=[0, 1],
        chunk_tokens=lengths[:2],
    )
    steps.run(decode_add=[0])
    steps.run(decode_add=[1], new_sequences=[new(2, PROMPTS[2])], chunk_slots=[2], chunk_tokens=[lengths[2]])
    steps.run(decode_add=[2])
    for _ in range(3):
        steps.run()
    steps.run(
        decode_remove=[1],
        new_sequences=[new(3, PROMPTS[3], sampling=PENALISED, logprobs=2, prompt_logprobs=1)],
        chunk_slots=[3],
        chunk_tokens=[lengths[3]],
        forks=[Fork(3, 5, 1)],
    )
    steps.run(
        copies=BlockMoves([61], [119]),  # half full
        replace_slots=[5, 5],
        replace_indices=[1, 2],  # what both would write to from now on
        replace_blocks=[119, 118],
        decode_add=[3, 5],
    )
    for _ in range(3):
        steps.run()
    steps.run(release_slots=[3, 5])
    for _ in range(4):
        steps.run()
    results = steps.finish()
    assert not any(result.nonfinite_rows for result in results)
    assert len(results[7].prompt_logprobs[0].logprobs) == lengths[3] - 1
    assert all(result.timings.forward_ns > 0 for result in results)
    return [list(result.token_ids) for result in results]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_and_eager_steps_give_the_same_tokens(model: Path, device: torch.device, dtype: str) -> None:
    replayed = make(model, device, dtype=dtype)
    assert bool(replayed.decode._graphs) == (device.type == "cuda")
    assert play(replayed) == play(make(model, device, dtype=dtype, graphs=False))


def test_greedy_tokens_are_those_of_transformers(model: Path, device: torch.device) -> None:
    steps = Steps(make(model, device))
    count = 12
    slots = list(range(len(PROMPTS)))
    steps.run(
        new_sequences=[new(slot, PROMPTS[slot]) for slot in slots],
        chunk_slots=slots,
        chunk_tokens=[len(prompt) for prompt in PROMPTS],
    )
    for number in range(count - 1):
        steps.run(decode_add=slots if number == 0 else [])
    rows = zip(*(result.token_ids for result in steps.finish()), strict=True)
    assert [list(row) for row in rows] == [tiny_models.reference_greedy(model, prompt, count) for prompt in PROMPTS]


def test_a_swap_round_trip_beside_decode_keeps_every_bit_and_every_token(model: Path, device: torch.device) -> None:
    executor = make(model, device)
    steps = Steps(executor)
    pool = executor.pool.device_blocks
    expected = [tiny_models.reference_greedy(model, prompt, 12) for prompt in PROMPTS[:2]]
    steps.run(
        new_sequences=[new(0, PROMPTS[0]), new(1, PROMPTS[1])],
        chunk_slots=[0, 1],
        chunk_tokens=[len(PROMPTS[0]), len(PROMPTS[1])],
    )
    steps.run(decode_add=[0, 1])
    steps.run()
    tokens = [[result.token_ids[row] for result in steps.finish()] for row in range(2)]
    before = pool[20:26].clone()
    # Row 1 goes out in the step that hands its blocks to another row's chunk, and comes back to other blocks.
    steps.run(
        release_slots=[1],
        swap_out=BlockMoves(list(range(20, 26)), [9, 3, 30, 31, 32, 1]),
        new_sequences=[new(4, [6] * 24, blocks=list(range(20, 27)))],
        chunk_slots=[4],
        chunk_tokens=[24],
    )
    steps.run(release_slots=[4])
    back = [100, 101, 102, 107, 106, 105]
    resumed = new(
        2,
        PROMPTS[1] + tokens[1],
        prompt_tokens=len(PROMPTS[1]),
        computed_tokens=len(PROMPTS[1]) + 2,
        blocks=[*back, 108, 109],
    )
    steps.run(swap_in=BlockMoves([9, 3, 30, 31, 32, 1], back), new_sequences=[resumed], decode_add=[2])
    steps.run()
    results = steps.finish()
    tokens[0] += [result.token_ids[0] for result in results[3:]]
    tokens[1] += [result.token_ids[1] for result in results[5:]]
    assert tokens == [expected[0][:7], expected[1][:5]]
    # The last of the six blocks is not full: what is behind its tokens was written since.
    whole = (len(PROMPTS[1]) + 2) // 4
    torch.testing.assert_close(pool[back][:whole], before[:whole], atol=0, rtol=0, equal_nan=True)
    assert results[3].timings.swap_out_ns > 0
    assert results[5].timings.swap_in_ns > 0


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_beams_offer_what_transformers_finds_likeliest_and_change_no_row_beside_them(
    model: Path, device: torch.device, graphs: bool
) -> None:
    steps = Steps(make(model, device, graphs=graphs))
    prompt, other = PROMPTS[0], PROMPTS[1]
    steps.run(
        new_sequences=[new(0, prompt, logprobs=4), new(1, other)],
        chunk_slots=[0, 1],
        chunk_tokens=[len(prompt), len(other)],
    )
    # Positions 10 and 11 are in block 2 of each row: two children copy it, one keeps it.
    steps.run(
        beam_slots=[0, 2, 3],
        beam_parents=[0, 0, 0],
        beam_tokens=[50, 60, 70],
        copies=BlockMoves([2, 2], [42, 62]),
        replace_slots=[2, 3],
        replace_indices=[2, 2],
        replace_blocks=[42, 62],
        decode_add=[1, 0, 2, 3],
    )
    steps.run(decode_remove=[0, 2, 3])
    steps.run(
        beam_slots=[0, 3, 2],
        beam_parents=[2, 3, 2],
        beam_tokens=[80, 90, 100],
        copies=BlockMoves([42], [110]),
        replace_slots=[0],
        replace_indices=[2],
        replace_blocks=[110],
        decode_add=[0, 3, 2],
    )
    results = steps.finish()
    found = [(row, entry) for at in (0, 1, 3) for row, entry in enumerate(results[at].logprobs)]
    beams = [[], [50], [60], [70], [60, 80], [70, 90], [60, 100]]
    for (_, entry), beam in zip(found, beams, strict=True):
        expected = tiny_models.reference_logits(model, prompt + beam)[-1].log_softmax(-1).topk(4)
        assert list(entry.top_ids) == expected.indices.tolist()
        assert list(entry.top_logprobs) == pytest.approx(expected.values.tolist(), abs=1e-3)
    tokens = [results[0].token_ids[1], *(result.token_ids[0] for result in results[1:])]
    assert tokens == tiny_models.reference_greedy(model, other, 4)
