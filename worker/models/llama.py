"""The Llama family: Llama 2 and 3, Mistral, Qwen2 and Qwen3, told apart by fields of their configs.

One decoder layer serves them all: RMS norm, fused query-key-value projection, rotary positions, paged attention with
grouped heads, fused gate-up projection with SwiGLU. What differs (biases, norms of query and key heads, tied
embeddings, rope scaling, sliding windows) is data in `LlamaShape`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from worker.models.base import ModelError, ModelSpec, PagedAttention
from worker.models.ops import ops_for
from worker.models.rope import LENGTH_DEPENDENT_TYPES, STATIC_TYPES, rope_table, rope_type

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Served architecture by the config's model type."""

HEAD = "lm_head.weight"
"""Name of the output matrix in a checkpoint."""

ADDED_IN_PRODUCT = 257
"""Tokens from which the library's products add to the residual stream themselves: it is bound by arithmetic then, and
what it reads and writes more costs nothing, while the norm has half as much to do (docs/kernels/linear.md)."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class LlamaShape:
    """What a config of the family says, under one set of names."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    """RMS norms over each query and key head before the rotation (Qwen3)."""
    tied_embeddings: bool
    """The output matrix is the input embedding."""
    windows: tuple[int | None, ...]
    """Sliding window by layer, in tokens; None: full attention."""

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim


def serves(config: Any) -> bool:
    """Whether this module computes the config's model exactly; otherwise transformers itself has to run it."""
    architectures = getattr(config, "architectures", None) or [ARCHITECTURES.get(config.model_type)]
    return (
        architectures[0] is not None
        and ARCHITECTURES.get(config.model_type) == architectures[0]
        and config.hidden_act == "silu"
        and rope_type(config) in STATIC_TYPES | LENGTH_DEPENDENT_TYPES
        and set(getattr(config, "layer_types", None) or ()) <= LAYER_TYPES
    )


def read_shape(config: Any) -> LlamaShape:
    """Translate a config of the family. Raises ModelError for numbers that do not fit each other."""
    kind = config.model_type
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise ModelError(f"config.json: head size {head_dim} is odd and cannot be rotated")
    attention_bias = bool(getattr(config, "attention_bias", False)) and kind in ("llama", "qwen3")
    return LlamaShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=attention_bias or kind == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)) and kind == "llama",
        head_norms=kind == "qwen3",
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=_windows(config),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    """Sliding window by layer: Mistral has one for all, Qwen names layer types, Llama has none."""
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return (window,) * num_layers
    if config.model_type == "llama":
        return (None,) * num_layers
    types = config.layer_types
    if len(types) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(types)} entries for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True)
class LlamaLayer:
    """Weights of one decoder layer. Matrices are [out, in], as torch.nn.functional.linear takes them."""

    input_norm: torch.Tensor
    """[hidden_size]"""
    qkv: torch.Tensor
    """[query_size + 2 * kv_size, hidden_size]: query rows, then key rows, then value rows."""
    qkv_bias: torch.Tensor | None
    """[query_size + 2 * kv_size]"""
    query_norm: torch.Tensor | None
    """[head_dim]"""
    key_norm: torch.Tensor | None
    """[head_dim]"""
    output: torch.Tensor
    """[hidden_size, query_size]"""
    output_bias: torch.Tensor | None
    """[hidden_size]"""
    mlp_norm: torch.Tensor
    """[hidden_size]"""
    gate_up: torch.Tensor
    """[2 * intermediate_size, hidden_size]: gate rows, then up rows."""
    gate_up_bias: torch.Tensor | None
    """[2 * intermediate_size]"""
    down: torch.Tensor
    """[hidden_size, intermediate_size]"""
    down_bias: torch.Tensor | None
    """[hidden_size]"""


@dataclass(frozen=True)
class LlamaWeights:
    """All weights of a model."""

    embedding: torch.Tensor
    """[vocab_size, hidden_size]"""
    layers: tuple[LlamaLayer, ...]
    norm: torch.Tensor
    """[hidden_size]"""
    head: torch.Tensor
    """[vocab_size, hidden_size]; the embedding itself where they are tied."""


def allocate(shape: LlamaShape, *, dtype: torch.dtype, device: torch.device, separate_head: bool) -> LlamaWeights:
    """Uninitialized weights in their final, fused form. separate_head: the output matrix has memory of its own."""

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def empty_if(wanted: bool, size: int) -> torch.Tensor | None:
        return empty(size) if wanted else None

    hidden, inner, qkv_size = shape.hidden_size, shape.intermediate_size, shape.query_size + 2 * shape.kv_size
    layers = tuple(
        LlamaLayer(
            input_norm=empty(hidden),
            qkv=empty(qkv_size, hidden),
            qkv_bias=empty_if(shape.qkv_bias, qkv_size),
            query_norm=empty_if(shape.head_norms, shape.head_dim),
            key_norm=empty_if(shape.head_norms, shape.head_dim),
            output=empty(hidden, shape.query_size),
            output_bias=empty_if(shape.output_bias, hidden),
            mlp_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            gate_up_bias=empty_if(shape.mlp_bias, 2 * inner),
            down=empty(hidden, inner),
            down_bias=empty_if(shape.mlp_bias, hidden),
        )
        for _ in range(shape.num_layers)
    )
    embedding = empty(shape.vocab_size, hidden)
    head = empty(shape.vocab_size, hidden) if separate_head else embedding
    return LlamaWeights(embedding, layers, empty(hidden), head)


def places(shape: LlamaShape, weights: LlamaWeights) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint goes: its name in the file to a view of the fused weights."""
    found = {"model.embed_tokens.weight": weights.embedding}
    for number, layer in enumerate(weights.layers):
        found |= {f"model.layers.{number}.{name}": place for name, place in _layer_places(shape, layer).items()}
    found["model.norm.weight"] = weights.norm
    if weights.head is not weights.embedding:
        found[HEAD] = weights.head
    return found


def _layer_places(shape: LlamaShape, layer: LlamaLayer) -> dict[str, torch.Tensor]:
    heads = [shape.query_size, shape.kv_size, shape.kv_size]
    inner = [shape.intermediate_size, shape.intermediate_size]
    query, key, value = torch.split(layer.qkv, heads)
    gate, up = torch.split(layer.gate_up, inner)
    found: dict[str, torch.Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.q_norm.weight": layer.query_norm,
        "self_attn.k_norm.weight": layer.key_norm,
        "self_attn.o_proj.weight": layer.output,
        "self_attn.o_proj.bias": layer.output_bias,
        "post_attention_layernorm.weight": layer.mlp_norm,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": layer.down,
        "mlp.down_proj.bias": layer.down_bias,
    }
    if layer.qkv_bias is not None:
        names = (f"self_attn.{name}_proj.bias" for name in "qkv")
        found |= dict(zip(names, torch.split(layer.qkv_bias, heads), strict=True))
    if layer.gate_up_bias is not None:
        names = (f"mlp.{name}_proj.bias" for name in ("gate", "up"))
        found |= dict(zip(names, torch.split(layer.gate_up_bias, inner), strict=True))
    return {name: place for name, place in found.items() if place is not None}


class LlamaModel:
    """A loaded model of the family."""

    def __init__(self, spec: ModelSpec, shape: LlamaShape, weights: LlamaWeights, config: Any) -> None:
        self.spec = spec
        self._shape = shape
        self._weights = weights
        self._scale = shape.head_dim**-0.5
        device = weights.embedding.device
        self._ops = ops_for(device)
        self._cos_sin = rope_table(config, shape.head_dim, spec.max_model_len, device)

    @torch.no_grad()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedAttention) -> torch.Tensor:
        """As in PagedModel."""
        residual = functional.embedding(token_ids, self._weights.embedding)
        adding: torch.Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            hidden, residual = self._normed(adding, residual, layer.input_norm)
            attended = self._attention(number, layer, hidden, positions, batch)
            adding = self._add(attended, layer.output, layer.output_bias, residual)
            hidden, residual = self._normed(adding, residual, layer.mlp_norm)
            adding = self._add(self._gated(layer, hidden), layer.down, layer.down_bias, residual)
        return self._normed(adding, residual, self._weights.norm)[0]

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, K] times weight [N, K] transposed: [T, N]."""
        if bias is None and self._ops.takes_tokens(len(x), weight, by="linear"):
            return self._ops.linear(x, weight)
        return functional.linear(x, weight, bias)

    def _add(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> torch.Tensor | None:
        """Adds a product to the residual stream [T, hidden_size]. What is returned is yet to be added: a tensor like
        it, or parts of one."""
        if bias is None and self._ops.takes_tokens(len(x), weight, by="linear_parts"):
            return self._ops.linear_parts(x, weight)
        if bias is None and len(x) >= ADDED_IN_PRODUCT:
            residual.addmm_(x, weight.t())
            return None
        return functional.linear(x, weight, bias)

    def _normed(
        self, adding: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream's norm, after what `_add` has left to be added, and the stream then."""
        if adding is None:
            return self._ops.rms_norm(residual, weight, self._shape.norm_epsilon), residual
        return self._ops.add_rms_norm(adding, residual, weight, self._shape.norm_epsilon)

    def _gated(self, layer: LlamaLayer, hidden: torch.Tensor) -> torch.Tensor:
        """SwiGLU's gate: normed hidden [T, hidden_size] to [T, intermediate_size]."""
        ops = self._ops
        if layer.gate_up_bias is None and ops.takes_tokens(len(hidden), layer.gate_up, by="linear_gated"):
            return ops.linear_gated(hidden, layer.gate_up)
        return ops.silu_and_mul(functional.linear(hidden, layer.gate_up, layer.gate_up_bias))

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in PagedModel."""
        return self._product(hidden, self._weights.head, None)

    def _attention(
        self, number: int, layer: LlamaLayer, hidden: torch.Tensor, positions: torch.Tensor, batch: PagedAttention
    ) -> torch.Tensor:
        """Self-attention of one layer but for its output projection: normed hidden [T, hidden_size] to
        [T, query_size]."""
        shape, ops, window = self._shape, self._ops, self._shape.windows[number]
        if layer.qkv_bias is None and layer.query_norm is None:
            attended = batch.project_and_attend(
                number, hidden, layer.qkv, positions, self._cos_sin, scale=self._scale, sliding_window=window
            )
            if attended is not None:
                return attended.reshape(len(hidden), -1)
        qkv = self._product(hidden, layer.qkv, layer.qkv_bias).view(len(hidden), -1, shape.head_dim)
        query, key, value = torch.split(qkv, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = ops.rms_norm(query, layer.query_norm, shape.norm_epsilon)
            key = ops.rms_norm(key, layer.key_norm, shape.norm_epsilon)
        attended = batch.rotate_and_attend(
            number,
            query,
            key,
            value,
            positions,
            self._cos_sin,
            scale=self._scale,
            sliding_window=window,
        )
        return attended.reshape(len(qkv), -1)


def tie(weights: LlamaWeights) -> LlamaWeights:
    """The same weights with the embedding as output matrix; the matrix's own memory is freed."""
    return replace(weights, head=weights.embedding)


def ignored(name: str) -> bool:
    """Whether a stored tensor may be without a place: rotary tables, which old releases saved."""
    return name.endswith("rotary_emb.inv_freq")
