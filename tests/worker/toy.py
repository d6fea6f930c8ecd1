"""A tiny model behind the executor's seam, the dense computation it must equal, and plans made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kernels.kv_layout import KvLayout
from worker.executor import Executor
from worker.kv_pool import KvPool
from worker.models.base import ModelSpec, PagedAttention
from worker.step import StepPlan, StepResult

VOCAB = 41
HIDDEN = 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LAYERS = 2
SCALE = 1 / math.sqrt(HEAD_DIM)
MAX_MODEL_LEN = 64


class ToyModel:
    """Two attention layers with a residual stream. Weights are seeded and wide: the best token leads clearly."""

    def __init__(self, sliding_window: int | None = None) -> None:
        generator = torch.Generator().manual_seed(5)

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

        self.sliding_window = sliding_window
        self.tokens = torch.randn(VOCAB, HIDDEN, generator=generator)
        self.places = torch.randn(MAX_MODEL_LEN, HIDDEN, generator=generator)
        self.query = [weight(HEADS * HEAD_DIM, HIDDEN) for _ in range(LAYERS)]
        self.key_value = [weight(2, KV_HEADS * HEAD_DIM, HIDDEN) for _ in range(LAYERS)]
        self.output = [weight(HIDDEN, HEADS * HEAD_DIM) * 2 for _ in range(LAYERS)]
        self.head = weight(VOCAB, HIDDEN)
        self.logit_rows: list[int] = []
        """Rows of every call of `logits`."""
        self.forward_rows: list[int] = []
        """Rows of every forward pass."""
        self.memory_rows = 1 << 20
        """Rows that a forward pass has memory for."""
        self.poisoned_token: int | None = None
        """A token whose hidden state is NaN."""

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            architecture="Toy",
            num_layers=LAYERS,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=VOCAB,
            max_model_len=MAX_MODEL_LEN,
            dtype=torch.float32,
            eos_token_ids=(1,),
            fingerprint="toy",
        )

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedAttention) -> torch.Tensor:
        self.forward_rows.append(token_ids.shape[0])
        if token_ids.shape[0] > self.memory_rows:
            raise torch.OutOfMemoryError(f"no memory for {token_ids.shape[0]} rows")
        hidden = self.tokens[token_ids] + self.places[positions]
        for layer in range(LAYERS):
            query = (hidden @ self.query[layer].T).view(-1, HEADS, HEAD_DIM)
            key, value = (torch.einsum("th,kdh->ktd", hidden, self.key_value[layer])).view(2, -1, KV_HEADS, HEAD_DIM)
            attended = batch.attend(layer, query, key, value, scale=SCALE, sliding_window=self.sliding_window)
            hidden = hidden + attended.flatten(1) @ self.output[layer].T
        if self.poisoned_token is not None:
            hidden[token_ids == self.poisoned_token] = float("nan")
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.logit_rows.append(hidden.shape[0])
        return hidden @ self.head.T

    def dense_logits(self, tokens: list[int]) -> torch.Tensor:
        """float64 logits [len(tokens), VOCAB] with plain causal attention and no cache."""
        count = len(tokens)
        hidden = (self.tokens[torch.tensor(tokens)] + self.places[:count]).double()
        distance = torch.arange(count).unsqueeze(1) - torch.arange(count)
        unseen = (distance < 0) | (distance >= (self.sliding_window or count))
        for layer in range(LAYERS):
            query = (hidden @ self.query[layer].double().T).view(count, HEADS, HEAD_DIM).transpose(0, 1)
            weights = self.key_value[layer].double()
            key, value = ((hidden @ w.T).view(count, KV_HEADS, HEAD_DIM).transpose(0, 1) for w in weights)
            key, value = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in (key, value))
            scores = (query @ key.transpose(1, 2) * SCALE).masked_fill(unseen, float("-inf"))
            attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
            hidden = hidden + attended @ self.output[layer].double().T
        return hidden @ self.head.double().T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The `count` likeliest tokens after the prompt, one after another."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.dense_logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def make_executor(
    model: ToyModel,
    *,
    block_size: int = 4,
    num_blocks: int = 40,
    host_blocks: int = 20,
    max_slots: int = 8,
    max_step_tokens: int = 64,
    buckets: Sequence[int] = (1, 3, 8),
) -> Executor:
    """An executor whose pool and arena are full of NaN, and whose decode sets are padded as on a GPU."""
    layout = KvLayout(LAYERS, KV_HEADS, block_size, HEAD_DIM, torch.float32)
    pool = KvPool(
        layout,
        torch.full(layout.pool_shape(num_blocks), float("nan")),
        torch.full(layout.pool_shape(host_blocks), float("nan")),
    )
    return Executor(
        model,
        pool,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        max_model_len=MAX_MODEL_LEN,
        buckets=buckets,
    )


class Steps:
    """Numbers plans, executes them, and checks the batch after each."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.step = 0

    def run(self, **fields: Any) -> StepResult:
        """Executes a plan of these fields."""
        self.step += 1
        result = self.executor.execute(StepPlan(epoch=1, step=self.step, **fields))
        self.executor.batch.check_integrity()
        assert (result.epoch, result.step) == (1, self.step)
        return result
