"""Greedy output through gateway, scheduler and worker processes equals transformers' `generate` token for token."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests import tiny_models
from tests.service import service

CONTEXT = 128
"""Context of the tiny models, in tokens."""

NUM_REQUESTS = 32

ARCHITECTURES = {
    # kind: (token budget, block size). Blocks of 16 are left to the test below: of so small an arena they make two.
    "llama": (64, 1),
    "mistral": (7, 4),
    "qwen2": (64, 4),
    "qwen3": (7, 1),
    "opt": (64, 1),
    "gpt2": (64, 4),
    "gpt_neox": (7, 4),
    "gemma2": (64, 1),
    "phi": (64, 4),
}

SMALL_ARENA = 32
"""Tokens in a swap arena that is soon full, so that some groups are swapped and others recomputed."""
MOST_ROUNDS = 5
"""So often the requests are sent until the pool was too small for them."""


@pytest.fixture(autouse=True)
def without_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    """New requests take what room there is, so that a small pool preempts. The processes read their environment."""
    monkeypatch.setenv("PAGEWIRE_HEADROOM", "0")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The workers'; what their output is compared with is computed on the CPU."""
    return request.param


def mixed_requests(seed: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """`NUM_REQUESTS` pairs of (prompt, max_tokens) of mixed lengths; a third of them share a prefix of 24 tokens."""
    generator = random.Random(seed)
    shared = [generator.randrange(4, vocab_size) for _ in range(24)]
    requests = []
    for number in range(NUM_REQUESTS):
        own = [generator.randrange(4, vocab_size) for _ in range(generator.randint(1, 40))]
        requests.append((shared + own if number % 3 == 0 else own, generator.randint(1, 32)))
    return requests


async def check_equality(
    folder: Path, device: str, kind: str, budget: int, block_size: int, modes: set[str], arena_tokens: int = 256
) -> None:
    """Runs 32 requests at once in a pool that holds a third of those that could run, and compares every token."""
    model = tiny_models.make_tiny_model(kind, folder / "model", max_position_embeddings=CONTEXT)
    vocab_size = tiny_models.VOCAB_SIZE
    requests = mixed_requests(seed=11, vocab_size=vocab_size)
    expected = [tiny_models.reference_greedy(model, prompt, length) for prompt, length in requests]
    arguments = ["--model", str(model), "--token-budget", str(budget), "--block-size", str(block_size)]
    pool_tokens = 224 if budget > 16 else 112  # a budget of 7 tokens runs at most 7 sequences
    arguments += ["--num-blocks", str(pool_tokens // block_size), "--host-blocks", str(arena_tokens // block_size)]
    arguments += [
        "--preemption-mode",
        "swap" if "swap" in modes else "recompute",
        "--max-num-seqs",
        "16",
        "--dtype",
        "float32",
    ]
    if arena_tokens == SMALL_ARENA:
        arguments.append("--no-host-prefix-cache")  # what one plan keeps there, the same plan's swaps find no room for
    async with service.running(folder / "up", *arguments, device=device) as up, up.channel() as channel:
        for _ in range(MOST_ROUNDS):  # on a busy machine requests come one after another, and few run at once
            calls = [service.generate(channel, service.greedy(prompt, length)) for prompt, length in requests]
            completions = await asyncio.gather(*calls)
            for (prompt, _), completion, tokens in zip(requests, completions, expected, strict=True):
                assert completion.token_ids == tokens, f"prompt of {len(prompt)} tokens"
            load = await service.wait_until_idle(channel)
            preemptions = {"swap": load.preemptions_swap, "recompute": load.preemptions_recompute}
            if all(preemptions[mode] for mode in modes):
                break
        else:
            pytest.fail(f"the pool was not small enough to preempt by {modes}: {load}")
        assert load.prefix_cache_hits > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
async def test_greedy_output_equals_transformers_while_groups_are_swapped_and_recomputed(
    tmp_path: Path, device: str, kind: str
) -> None:
    budget, block_size = ARCHITECTURES[kind]
    await check_equality(tmp_path, device, kind, budget, block_size, {"swap", "recompute"}, SMALL_ARENA)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("budget", [7, 64])
async def test_greedy_output_does_not_depend_on_budget_block_size_or_preemption(
    tmp_path: Path, device: str, budget: int, block_size: int, mode: str
) -> None:
    await check_equality(tmp_path, device, "llama", budget, block_size, {mode})
