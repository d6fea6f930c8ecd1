"""What a model is to the worker: a description and two functions over flattened tokens.

A step's tokens are one flat row: decode tokens first, then prefill chunks, of any sequences. A model neither knows
which token belongs to which sequence nor where keys and values live; it hands each layer's query, key and value to the
step's attention and gets the attended values back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pagewire.runtime.errors import StartError


class ModelError(StartError):
    """A model cannot be served. The message is one line that names the reason and, where there is one, the mend."""


@dataclass(frozen=True)
class ModelSpec:
    """What the rest of the worker, the scheduler and the gateways need to know of a loaded model."""

    architecture: str
    """First entry of the config's `architectures`, for example "LlamaForCausalLM"."""
    num_layers: int
    """Layers that keep keys and values; `attend` is called with layer in 0..num_layers-1."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    head_dim: int
    """Elements of one head, the same for query, key and value and for every layer."""
    vocab_size: int
    """Width of the logits. Token ids are below it."""
    max_model_len: int
    """Longest sequence, prompt and output together, in tokens."""
    dtype: torch.dtype
    """Weights, activations and KV blocks: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a sequence, of config and generation config together, sorted. Empty: the model has none."""
    fingerprint: str
    """Hash over config, dtype and the weight files' headers and sizes. Equal fingerprints compute the same."""


class PagedAttention(Protocol):
    """Attention of one step, as a model sees it. `worker.attention_batch.AttentionBatch` is the real one."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values of `layer`, then attend causally over each sequence's whole context.

        query is [T, num_heads, head_dim]; key and value are [T, num_kv_heads, head_dim]; all of the model's dtype.
        Returns [T, num_heads, head_dim]. With sliding_window = w, position p sees positions p-w+1..p. With
        soft_cap = c, scores become c * tanh(score / c) after scaling and before the mask.
        """
        ...

    def rotate_and_attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
    ) -> torch.Tensor:
        """Rotate queries and keys by position (`kernels.reference.rope`), then `attend`.

        positions is int64 [T]; cos_sin float32 [max_positions, rotary_dim]. One operation, because a kernel that
        rotates can write to the cache as well.
        """
        ...

    def project_and_attend(
        self,
        layer: int,
        hidden: torch.Tensor,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor | None:
        """Project hidden [T, K] by qkv [(num_heads + 2 * num_kv_heads) * head_dim, K], query rows, key rows,
        value rows, and `rotate_and_attend`. None: not in one, the model has to do the first itself."""
        ...


class PagedModel(Protocol):
    """A decoder whose keys and values live in blocks it does not see."""

    @property
    def spec(self) -> ModelSpec:
        """What was loaded."""
        ...

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedAttention) -> torch.Tensor:
        """Run every layer over one step's tokens.

        token_ids and positions are int64 [T]; positions count from 0 in each sequence. Returns the hidden states after
        the final norm, [T, hidden_size] of the model's dtype. Calls `batch.attend` once per layer, in order.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of the rows that are sampled: [R, hidden_size] to [R, vocab_size], float32 or as the head
        gives them."""
        ...
