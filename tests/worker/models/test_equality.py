"""Every served model computes what transformers computes: tokens of `generate`, logits of a plain forward."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kernels.backend import twins_for
from tests.tiny_models import (
    KINDS,
    VOCAB_SIZE,
    make_tiny_model,
    reference_greedy,
    reference_logits,
    with_heads_of_16,
)
from tests.worker.models.steps import PagedCache, greedy, run_steps
from worker.models.dense import DenseCache
from worker.models.llama import ADDED_IN_PRODUCT, LlamaModel
from worker.models.loader import load_model
from worker.models.transformers_model import TransformersModel

UNSERVED = {"stablelm"}
FAMILY = ("llama", "mistral", "qwen2", "qwen3")
OURS = {kind for kind, fields in KINDS.items() if fields["model_type"] in FAMILY} - {"llama_gelu"}
SERVED = sorted(set(KINDS) - UNSERVED)

EXPERTS = {"mixtral", "qwen3_moe"}
"""In half precision rounding may send a token to another expert, which bounds nothing."""

TOLERANCE = 1e-4
"""Largest difference of float32 logits whose spread is about 1."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the model is computed; what it is compared with is computed on the CPU."""
    return torch.device(request.param)


def prompt_of(length: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(4, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("kind", SERVED)
def test_greedy_tokens_in_chunks_and_blocks_are_those_of_generate(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    folder = make_tiny_model(kind, tmp_path / "model")
    model = load_model(str(folder), device=device, dtype="float32")
    assert isinstance(model, LlamaModel if kind in OURS else TransformersModel)
    prompt = prompt_of(30)
    expected = reference_greedy(folder, prompt, 20)
    assert greedy(model, prompt, 20, chunk=7, block_size=4, device=device) == expected


@pytest.mark.parametrize("kind", SERVED)
def test_logits_of_steps_shared_by_sequences_are_those_of_each_alone(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    folder = make_tiny_model(kind, tmp_path / "model", seed=3)
    model = load_model(str(folder), device=device, dtype="float32")
    sequences = [prompt_of(33, seed=5), prompt_of(24, seed=6), prompt_of(9, seed=7)]
    steps = [
        [(0, 20)],
        [(0, 1), (1, 11), (2, 5)],
        [(0, 1), (2, 1), (1, 12)],
        [(0, 1), (1, 1), (2, 3)],
        [(0, 10)],
    ]
    expected = [reference_logits(folder, sequence) for sequence in sequences]
    paged = [PagedCache(model, block_size, device=device) for block_size in (16, 1)]
    for cache in (DenseCache(), *paged):
        for logits, alone in zip(run_steps(model, cache, sequences, steps, device), expected, strict=True):
            torch.testing.assert_close(logits, alone, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_logits_are_equal_up_to_the_last_position_of_the_context(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model", max_position_embeddings=96)
    sequence = prompt_of(96, seed=8)
    (logits,) = run_steps(load_model(str(folder)), DenseCache(), [sequence], [[(0, 50)], [(0, 46)]])
    torch.testing.assert_close(logits, reference_logits(folder, sequence), rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_logits_of_a_step_whose_products_add_to_the_residual_stream_themselves(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    folder = make_tiny_model(kind, tmp_path / "model", max_position_embeddings=2 * ADDED_IN_PRODUCT)
    sequence = prompt_of(ADDED_IN_PRODUCT + 20, seed=8)
    steps = [[(0, 20)], [(0, ADDED_IN_PRODUCT)]]
    model = load_model(str(folder), device=device, dtype="float32")
    (logits,) = run_steps(model, DenseCache(), [sequence], steps, device)
    torch.testing.assert_close(logits, reference_logits(folder, sequence), rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama_rope_linear", "llama_rope_yarn"])
def test_a_scaled_context_goes_beyond_max_position_embeddings_when_asked_for(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model", max_position_embeddings=64)
    model = load_model(str(folder), max_model_len=200)
    assert model.spec.max_model_len == 200
    sequence = prompt_of(150, seed=9)
    (logits,) = run_steps(model, DenseCache(), [sequence], [[(0, 150)]])
    torch.testing.assert_close(logits, reference_logits(folder, sequence), rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "bfloat16") for kind in SERVED if kind not in EXPERTS]
    + [(kind, "float16") for kind in ("llama", "qwen3", "gemma2", "gpt2")],
)
def test_half_precision_stays_close_to_float32(tmp_path: Path, device: torch.device, kind: str, dtype: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model", **with_heads_of_16(kind))
    model = load_model(str(folder), device=device, dtype=dtype)
    assert model.spec.dtype == getattr(torch, dtype)
    sequence = prompt_of(30)
    cache = PagedCache(model, block_size=16, device=device)
    assert not twins_for(cache.layout), "the kernels do not take such heads"
    (logits,) = run_steps(model, cache, [sequence], [[(0, 29)], [(0, 1)]], device)
    expected = reference_logits(folder, sequence)
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert error < (0.05 if dtype == "bfloat16" else 0.01)


def test_two_models_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    kinds = ["gemma2", "gpt2", "mistral", "phi3"]
    folders = [make_tiny_model(kind, tmp_path / kind) for kind in kinds]
    models = [load_model(str(folder)) for folder in folders]
    sequence = prompt_of(30)
    expected = [reference_logits(folder, sequence) for folder in folders]
    for model, logits in zip(models, expected, strict=True):
        (found,) = run_steps(model, DenseCache(), [sequence], [[(0, 30)]])
        torch.testing.assert_close(found, logits, rtol=0.0, atol=TOLERANCE)


def test_a_window_of_one_layer_only_reaches_that_layer(tmp_path: Path) -> None:
    folder = make_tiny_model("qwen2_window", tmp_path / "model")
    model = load_model(str(folder))
    assert isinstance(model, LlamaModel)
    assert model._shape.windows == (None, 16, 16)
    gemma = load_model(str(make_tiny_model("gemma2", tmp_path / "gemma")))
    assert isinstance(gemma, TransformersModel)
    assert [layer.window for layer in gemma._layers] == [16, None, 16, None]
