"""What cannot be served exactly is refused at load, in one line that names it, and never computed wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_tiny_model, tiny_config, with_heads_of_16
from worker.models import probe, transformers_model
from worker.models.base import ModelError
from worker.models.loader import load_model


def write_config(folder: Path, model_type: str, **fields: Any) -> Path:
    """A directory with nothing but a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
    return folder


def refusal(model: Path | str, **arguments: Any) -> str:
    """The line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(str(model), **arguments)
    line = str(caught.value)
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def change_weights(folder: Path, change: Any) -> None:
    """Rewrites model.safetensors after `change` was called with its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"model_type": "bloom", "architectures": ["BloomForCausalLM"]},
            "BloomForCausalLM biases attention by distance (ALiBi)",
        ),
        (
            {"model_type": "falcon", "alibi": True, "architectures": ["FalconForCausalLM"]},
            "FalconForCausalLM biases attention by distance (ALiBi)",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM has layers with a state of their own",
        ),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "'gemma3' is multimodal"),
        ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}, "does not run through transformers' attention"),
        ({"model_type": "vit", "vocab_size": 9}, "vit is not a causal language model"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not supported; of model type 'llama' only LlamaForCausalLM is",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "gpt2 has cross-attention"),
    ],
)
def test_an_architecture_is_refused_by_name_before_weights_are_read(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    folder = write_config(tmp_path / "model", **fields)
    assert reason in refusal(folder)


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {
                "model_type": "gpt_oss",
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "layer_types": ["full_attention"] * 2,
                "rope_scaling": None,
            },
            "GptOssForCausalLM cannot be served: attention sinks (s_aux) are not supported",
        ),
        ({"model_type": "bert"}, "BertLMHeadModel cannot be served: its attention masks are neither causal nor"),
        (
            {
                "model_type": "deepseek_v3",
                "num_key_value_heads": 2,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 2,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 1,
                "head_dim": 4,
            },
            "DeepseekV3ForCausalLM cannot be served: heads of queries, keys and values differ in size",
        ),
        (
            {
                "model_type": "llama4_text",
                "layer_types": ["chunked_attention", "full_attention"],
                "num_local_experts": 2,
                "moe_layers": [],
                "interleave_moe_layer_step": 0,
                "attention_chunk_size": 8,
                "intermediate_size_mlp": 16,
            },
            "layers with a state of their own (chunked_attention)",
        ),
    ],
)
def test_attention_that_paging_cannot_express_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    folder = write_config(tmp_path / "model", **{**TINY, **fields})
    assert reason in refusal(folder, load_format="dummy")


def test_a_window_that_is_not_honoured_is_found_by_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("starcoder2", tmp_path / "model")
    monkeypatch.setattr(transformers_model, "_probed_window", lambda mask, stated, length: None)
    assert "its logits differ from those of its own attention" in refusal(folder)


def test_a_soft_cap_that_is_not_honoured_is_found_by_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("gemma2", tmp_path / "model")
    attend = probe.DenseCache().batch([]).__class__.attend

    def uncapped(self: Any, *arguments: Any, soft_cap: float | None, **others: Any) -> torch.Tensor:
        return attend(self, *arguments, **others)

    monkeypatch.setattr("worker.models.dense.DenseBatch.attend", uncapped)
    assert "Gemma2ForCausalLM cannot be served: behind paged attention its logits differ" in refusal(folder)


ROUTED_BY_ROUNDING = {"seed": 13, **with_heads_of_16("mixtral")}
"""A model whose logits differ by a sixth of their spread in bfloat16, because two experts are about as good for some
token."""


def test_experts_that_rounding_chooses_are_no_reason_to_refuse_a_model(tmp_path: Path) -> None:
    folder = make_tiny_model("mixtral", tmp_path / "model", **ROUTED_BY_ROUNDING)
    assert load_model(str(folder), dtype="bfloat16").spec.architecture == "MixtralForCausalLM"


def test_a_scale_that_is_not_honoured_is_found_even_where_rounding_chooses_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("mixtral", tmp_path / "model", **ROUTED_BY_ROUNDING)
    attend = probe.DenseCache().batch([]).__class__.attend

    def unscaled(self: Any, *arguments: Any, scale: float, **others: Any) -> torch.Tensor:
        return attend(self, *arguments, scale=1.0, **others)

    monkeypatch.setattr("worker.models.dense.DenseBatch.attend", unscaled)
    assert "its logits differ from those of its own attention" in refusal(folder, dtype="bfloat16")


def test_masks_of_chunks_and_prefixes_are_neither_causal_nor_windows() -> None:
    window_of = transformers_model.window_of
    assert window_of(lambda b, h, q, k: k <= q, 100) is None
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 16), 100) == 16
    assert window_of(lambda b, h, q, k: (k <= q) & (k > q - 100), 100) is None
    for mask in (
        lambda b, h, q, k: (k <= q) & (k // 16 == q // 16),
        lambda b, h, q, k: (k <= q) | (k < 4),
        lambda b, h, q, k: k >= 0,
        lambda b, h, q, k: (k <= q) & ((k > q - 8) | (k < 2)),
    ):
        with pytest.raises(ModelError, match="neither causal nor a sliding window"):
            window_of(mask, 100)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", **tiny_config("llama"))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    line = refusal(folder)
    assert "holds weights as pickle only (pytorch_model.bin)" in line
    assert "convert them to safetensors" in line


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    assert "holds no model.safetensors" in refusal(write_config(tmp_path / "model", **tiny_config("llama")))
    assert "holds no model.safetensors" in refusal(write_config(tmp_path / "other", **tiny_config("gpt2")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"{}", "names no model_type"),
        (b'{"model_type": "nonsense"}', "model type 'nonsense' is not supported (unknown"),
        (
            b'{"model_type": "nonsense", "auto_map": {"AutoConfig": "evil.Config"}}',
            "it needs Python code of its own, which is never run",
        ),
        (b'{"model_type": "llama", "hidden_size": "wide"}', "is not a valid llama config"),
        (
            b'{"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 48}',
            "6 query heads cannot share 4 key-value heads evenly",
        ),
        (b'{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "holds quantized weights"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert reason in refusal(tmp_path, load_format="dummy")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model")
    name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}[kind]
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    line = refusal(folder)
    assert name in line
    assert "shape" in line


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_missing_tensor_is_named(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model")
    name = {"llama": "model.layers.1.mlp.down_proj.weight", "gpt2": "transformer.h.1.mlp.c_proj.weight"}[kind]
    change_weights(folder, lambda tensors: tensors.pop(name))
    assert f"lacks {name}" in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tensor_without_a_place_is_named(tmp_path: Path, kind: str) -> None:
    folder = make_tiny_model(kind, tmp_path / "model")
    name = {"llama": "model.layers.1.self_attn.q_proj.bias", "gpt2": "transformer.h.1.extra.weight"}[kind]
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    assert f"holds {name}" in refusal(folder)


def test_a_tensor_of_a_quantized_type_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is stored as I8; use unquantized weights" in refusal(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("keep", [0, 5, 500, -100])
def test_a_weight_file_cut_short_is_refused(tmp_path: Path, kind: str, keep: int) -> None:
    folder = make_tiny_model(kind, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", shard_bytes=60_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    assert f"lacks {shards[0].name}, named by model.safetensors.index.json" in refusal(folder)


def test_an_index_that_points_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "../model/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names files outside of its directory" in refusal(folder)


def test_a_context_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", max_position_embeddings=64)
    assert "--max-model-len 65 exceeds the model's 64 positions" in refusal(folder, max_model_len=65)
    assert "--max-model-len 0 must be at least 1" in refusal(folder, max_model_len=0)
    dynamic = make_tiny_model("llama_rope_dynamic", tmp_path / "dynamic", max_position_embeddings=64)
    assert "dynamic rope scaling is served up to the original context" in refusal(dynamic, max_model_len=65)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", **tiny_config("llama"))
    assert "dtype 'float8' is unknown" in refusal(folder, dtype="float8")
    assert "load format 'pickle' is unknown" in refusal(folder, load_format="pickle")


def test_a_path_that_is_no_directory_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    assert "there is no directory" in refusal(tmp_path / "nowhere")
    assert "there is no directory" in refusal("../nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a file" in refusal(tmp_path / "model.gguf")


def test_a_hub_model_without_a_network_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal("pagewire-tests/not-a-model")
    assert "there is no directory pagewire-tests/not-a-model, and the hub cannot be reached" in line
