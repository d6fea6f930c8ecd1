"""Tiny model directories with random weights, as the hub would hold them, and what transformers computes from them.

    folder = make_tiny_model("llama", tmp_path / "model")
    expected = reference_greedy(folder, [5, 6, 7], 16)

Weights are drawn wide (see `INITIALIZER_RANGE`), so that the best token leads clearly and outputs do not repeat.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 288
"""Three special tokens, 256 bytes and a few ids that stand for nothing."""

BOS, EOS, PAD = 0, 1, 2

MAX_POSITION_EMBEDDINGS = 256

SLIDING_WINDOW = 16
"""Small enough that a prompt of 24 tokens leaves it."""

INITIALIZER_RANGE = 0.2
"""Standard deviation of the weights; the 0.02 of real models makes tiny ones repeat their last token."""

TIED_EMBEDDING_SCALE = 0.3

MIN_GAP = 1e-5
"""A smaller lead of the best logit over the second is a near-tie: float32 rounding may decide it either way."""

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_LLAMA: dict[str, Any] = {**_SIZES, **_HEADS, "tie_word_embeddings": False}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama"},
    "llama_tied": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "llama_biased": {**_LLAMA, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama_rope_llama3": {
        **_LLAMA,
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_rope_linear": {**_LLAMA, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_rope_dynamic": {**_LLAMA, "model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama_rope_yarn": {
        **_LLAMA,
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama_gelu": {**_LLAMA, "model_type": "llama", "hidden_act": "gelu"},
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": SLIDING_WINDOW},
    "mistral_full": {**_LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        **_LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "opt_projected": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt2_layer_scaled": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gpt_neox": {**_SIZES, "model_type": "gpt_neox", "num_attention_heads": 4, "rotary_pct": 0.5},
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 32, "n_layer": 3, "n_head": 4, "multi_query": True},
    "gemma2": {
        **_SIZES,
        **_HEADS,
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 20,
        "sliding_window": SLIDING_WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": {
        **_SIZES,
        **_HEADS,
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 20,
        "sliding_window": SLIDING_WINDOW,
        "sliding_window_pattern": 2,
    },
    "olmo2": {**_SIZES, **_HEADS, "model_type": "olmo2"},
    "qwen3_moe": {
        **_SIZES,
        **_HEADS,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "phi": {**_SIZES, **_HEADS, "model_type": "phi", "partial_rotary_factor": 0.5},
    "phi3": {**_SIZES, **_HEADS, "model_type": "phi3", "sliding_window": SLIDING_WINDOW},
    "starcoder2": {**_SIZES, **_HEADS, "model_type": "starcoder2", "sliding_window": SLIDING_WINDOW},
    "stablelm": {**_SIZES, **_HEADS, "model_type": "stablelm", "partial_rotary_factor": 0.5},
    "cohere": {**_SIZES, **_HEADS, "model_type": "cohere", "logit_scale": 0.5},
    "granite": {
        **_SIZES,
        **_HEADS,
        "model_type": "granite",
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
    },
    "mixtral": {**_SIZES, **_HEADS, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Config fields by kind; `make_tiny_model` adds what all have in common."""


def tiny_config(
    kind: str, *, vocab_size: int = VOCAB_SIZE, max_position_embeddings: int = MAX_POSITION_EMBEDDINGS, **changes: Any
) -> dict[str, Any]:
    """The fields of config.json for `kind`, with `changes` on top."""
    fields = {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    if KINDS[kind]["model_type"] in ("gpt2", "gpt_bigcode"):
        fields["n_positions"] = fields.pop("max_position_embeddings")
    return {**fields, **KINDS[kind], **changes}


def with_heads_of_16(kind: str) -> dict[str, int]:
    """Changes after which attention heads have 16 elements, the fewest that kernels take in half precision."""
    fields = KINDS[kind]
    wider = {name: 64 for name in ("hidden_size", "word_embed_proj_dim", "n_embd") if fields.get(name) == 32}
    if "head_dim" in fields:
        return {"head_dim": 16} if fields["head_dim"] != 16 else {}
    return wider


def make_tiny_model(
    kind: str,
    folder: Path,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    max_position_embeddings: int = MAX_POSITION_EMBEDDINGS,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int | None = None,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Write a model directory and return it: config, generation config, safetensors and a byte-level tokenizer.

    `changes` are config fields on top of the kind's own. shard_bytes makes several weight files with an index.
    A tokenizer needs room for 256 bytes; with a smaller vocabulary pass tokenizer=False.
    """
    config_fields = tiny_config(kind, vocab_size=vocab_size, max_position_embeddings=max_position_embeddings, **changes)
    config = AutoConfig.for_model(config_fields.pop("model_type"), **config_fields)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # Biases and norms start as constants; drawn ones show whether they are used at all.
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                parameter.data.add_(noise.to(dtype))
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            # Or the residual stream stays close to the last token's embedding, and the model repeats that token.
            model.get_input_embeddings().weight.data.mul_(TIED_EMBEDDING_SCALE)
        model.save_pretrained(folder, max_shard_size=shard_bytes if shard_bytes is not None else "5GB")
    if tokenizer:
        write_byte_tokenizer(folder, vocab_size)
    return folder


def write_byte_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write tokenizer files in which token 3 + b is byte b, after <s>, </s> and <pad>, with a plain chat template."""
    from tokenizers.pre_tokenizers import ByteLevel

    if vocab_size < 3 + 256:
        raise ValueError(f"a byte-level tokenizer needs 259 ids, the vocabulary has {vocab_size}: pass tokenizer=False")
    special = ["<s>", "</s>", "<pad>"]
    vocab = {token: index for index, token in enumerate(special)}
    vocab |= {symbol: len(special) + byte for byte, symbol in enumerate(_byte_symbols())}
    assert set(vocab) - set(special) == set(ByteLevel.alphabet())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte value (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


@dataclass(frozen=True)
class Reference:
    """What transformers generates greedily."""

    token_ids: list[int]
    gaps: list[float]
    """How far the best logit led the second, for each token."""


def reference_greedy(folder: Path, prompt_ids: list[int], max_new_tokens: int, *, ignore_eos: bool = True) -> list[int]:
    """The tokens of `reference`; fails on a near-tie, which another order of float32 sums could decide otherwise."""
    found = reference(folder, prompt_ids, max_new_tokens, ignore_eos=ignore_eos)
    for position, gap in enumerate(found.gaps):
        assert gap > MIN_GAP, f"near-tie at output {position}: choose another prompt or seed (gap {gap:.2e})"
    return found.token_ids


def reference(folder: Path, prompt_ids: list[int], max_new_tokens: int, *, ignore_eos: bool = True) -> Reference:
    """Greedy output of transformers' `generate` in float32 on the CPU, alone in its batch, with eager attention.

    Returns exactly max_new_tokens tokens unless ignore_eos is false and the model ends before.
    """
    model = reference_model(folder)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=None if ignore_eos else EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.inference_mode(), _quiet():
        prompt = torch.tensor([prompt_ids])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    best = torch.cat(answer.logits).topk(2, dim=-1).values
    return Reference(answer.sequences[0, len(prompt_ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist())


@dataclass(frozen=True)
class ReferenceBeam:
    """One hypothesis of transformers' beam search."""

    token_ids: list[int]
    score: float
    """Log-probability over length ** length_penalty."""


def reference_beams(
    folder: Path,
    prompt_ids: list[int],
    *,
    width: int,
    n: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
) -> list[ReferenceBeam]:
    """The n best hypotheses by transformers' `generate(num_beams=width)` in float32 on the CPU, best first.

    Fails where scores are so close that rounding could decide.
    """
    model = reference_model(folder)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.inference_mode(), _quiet():
        prompt = torch.tensor([prompt_ids])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    scores = answer.sequences_scores.tolist()
    for better, worse in itertools.pairwise(scores):
        assert better - worse > MIN_GAP * abs(worse), f"near-tie of beams: choose another prompt or seed ({scores})"
    lengths = (answer.beam_indices >= 0).sum(dim=1).tolist()
    rows = zip(answer.sequences.tolist(), lengths, scores, strict=True)
    start = len(prompt_ids)
    return [ReferenceBeam(row[start : start + length], score) for row, length, score in rows][:n]


def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits of every position, float32 [T, vocab_size], by transformers with its own eager attention."""
    with torch.inference_mode():
        return reference_model(folder)(torch.tensor([token_ids]), use_cache=False).logits[0].float()


@functools.lru_cache(maxsize=4)
def reference_model(folder: Path) -> PreTrainedModel:
    """The directory's model, loaded by transformers in float32 on the CPU, with its own eager attention."""
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # what a request leaves unset, generate takes from here
    return model


class _quiet:  # noqa: N801
    """Silences transformers' log lines and progress bars for a while."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()
