"""The proof, at load time, that a decoder computes the same behind paged attention as on its own.

Two short sequences of random tokens go through the model's own eager attention, whole, and then through our path in
chunks and single tokens that share steps. Equal logits show that attention is the only place where tokens meet, that
positions are taken from outside, that scale, window and soft cap arrive, and that the output head was split off right.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from worker.models.base import ModelError
from worker.models.dense import DenseCache
from worker.models.transformers_model import Head, LayerAttention, Step, run_trunk
from worker.models.weights import one_line

NUM_TOKENS = 20
"""Tokens per sequence where no window asks for more."""

MAX_WINDOW = 512
"""Widest sliding window that is probed by running out of it, in tokens; wider ones are read off the mask alone."""

BEYOND_WINDOW = 8
"""Tokens that the probe goes beyond a window."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest root mean square difference of logits, relative to their spread. Rounding stays well below; leaving out a
window, cap or scale does not."""

ROUNDINGS = 3
"""So often the model's own attention is run once more with embeddings that are off by rounding. Where a router sends
tokens to experts, that alone may exceed the tolerance: a token whose second and third expert are about as good goes to
the other one."""

OVER_ROUNDING = 2
"""A difference of up to so many times that is none. Of 160 tiny models with experts none had 1.5 times as much."""


@dataclass(frozen=True)
class Expected:
    """What the model's own attention makes of the probe's sequences."""

    token_ids: torch.Tensor
    """int64 [2, T]."""
    positions: torch.Tensor
    """int64 [2, T]: the first sequence at the beginning of the context, the second at its end."""
    logits: torch.Tensor
    """float32 [2, T, vocab_size]."""
    rounding: float
    """Largest root mean square difference from them when the input embeddings are off by rounding."""


def eager(model: Any, max_model_len: int) -> Expected:
    """Run the probe's sequences through the model's own eager attention."""
    token_ids = _sequences(model.config, max_model_len).to(model.device)
    count = token_ids.shape[1]
    positions = torch.stack([torch.arange(count), torch.arange(max_model_len - count, max_model_len)]).to(model.device)
    before = model.config._attn_implementation

    @torch.no_grad()
    def run() -> torch.Tensor:
        rows = [
            model(input_ids=token_ids[[row]], position_ids=positions[[row]], use_cache=False).logits for row in range(2)
        ]
        return torch.cat(rows).float()

    try:
        model.set_attn_implementation("eager")
        logits = run()
        rounded = _off_by_rounding(model, run)
    except Exception as error:  # whatever a foreign model stumbles over
        raise ModelError(f"its own attention does not run: {one_line(error)}") from error
    finally:
        model.set_attn_implementation(before)
    return Expected(token_ids, positions, logits, max(_difference(each, logits) for each in rounded))


def _off_by_rounding(model: Any, run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` gives when every element of the input embeddings is a unit in its last place larger or smaller."""
    generator = torch.Generator().manual_seed(0)

    def jitter(_module: nn.Module, _inputs: Any, embeddings: torch.Tensor) -> torch.Tensor:
        signs = 2 * torch.randint(0, 2, embeddings.shape, generator=generator).to(embeddings) - 1
        return embeddings * (1 + torch.finfo(embeddings.dtype).eps * signs)

    hook = model.get_input_embeddings().register_forward_hook(jitter)
    try:
        return [run() for _ in range(ROUNDINGS)]
    finally:
        hook.remove()


@torch.no_grad()
def paged(trunk: nn.Module, head: Head, expected: Expected, max_model_len: int) -> tuple[LayerAttention, ...]:
    """Run the same sequences through our path and compare. Returns what each attention layer asked for."""
    count = expected.token_ids.shape[1]
    cache, done = DenseCache(), [0, 0]
    parts: list[list[torch.Tensor]] = [[], []]
    layers: tuple[LayerAttention, ...] | None = None
    for sizes in _schedule(count):
        spans = [(sequence, done[sequence], done[sequence] + size) for sequence, size in enumerate(sizes) if size]
        token_ids = torch.cat([expected.token_ids[sequence, start:end] for sequence, start, end in spans])
        positions = torch.cat([expected.positions[sequence, start:end] for sequence, start, end in spans])
        batch = cache.batch([(sequence, end - start) for sequence, start, end in spans])
        # Masks can be read off only where positions do not jump, so the first step is one sequence alone.
        step = Step(batch, max_model_len, layers)
        try:
            logits = head.logits(run_trunk(trunk, token_ids, positions, step))
        except ModelError:
            raise
        except Exception as error:  # whatever a foreign model stumbles over
            raise ModelError(f"it does not run behind paged attention: {one_line(error)}") from error
        layers = _same_layers(layers, tuple(step.seen))
        for (sequence, _, end), rows in zip(
            spans, torch.split(logits, [end - start for _, start, end in spans]), strict=True
        ):
            parts[sequence].append(rows)
            done[sequence] = end
    _compare(torch.stack([torch.cat(rows) for rows in parts]), expected, next(trunk.parameters()).dtype)
    assert layers is not None
    return layers


def _sequences(config: Any, max_model_len: int) -> torch.Tensor:
    """Two rows of seeded random tokens, int64 [2, T], long enough to leave a small sliding window."""
    count = NUM_TOKENS
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and window <= MAX_WINDOW:
        count = max(count, window + BEYOND_WINDOW)
    count = min(count, max_model_len)
    draw = random.Random(0)
    return torch.tensor([[draw.randrange(config.vocab_size) for _ in range(count)] for _ in range(2)])


def _schedule(count: int) -> list[tuple[int, int]]:
    """Tokens of each sequence by step: a first chunk alone, then steps that both share, single tokens among them."""
    chunk = max(1, count // 3)
    steps = [(chunk, 0)]
    left = [count - chunk, count]
    for sizes in ((1, chunk), (1, chunk), (count, 1), (0, 1), (0, count)):
        taken = (min(sizes[0], left[0]), min(sizes[1], left[1]))
        left = [left[0] - taken[0], left[1] - taken[1]]
        if any(taken):
            steps.append(taken)
    return steps


def _same_layers(
    before: tuple[LayerAttention, ...] | None, seen: tuple[LayerAttention, ...]
) -> tuple[LayerAttention, ...]:
    """The layers, if every step saw the same ones and all have heads of one shape, as the KV pool needs it."""
    if not seen:
        raise ModelError("it never calls the attention interface")
    if before is not None and len(before) != len(seen):
        raise ModelError("its number of attention calls differs between steps")
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in seen}
    if len(shapes) > 1:
        raise ModelError("its layers differ in heads or head size")
    return seen


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square."""
    return float((logits - expected).square().mean().sqrt())


def _compare(logits: torch.Tensor, expected: Expected, dtype: torch.dtype) -> None:
    """Raise ModelError unless the logits agree within the dtype's tolerance, or within what rounding does to the
    model's own."""
    spread = float(expected.logits.std())
    error = _difference(logits, expected.logits)
    if not error <= max(TOLERANCE[dtype] * spread, OVER_ROUNDING * expected.rounding):
        raise ModelError(
            f"behind paged attention its logits differ from those of its own attention (by {error:.2g}, "
            f"their spread is {spread:.2g})"
        )
