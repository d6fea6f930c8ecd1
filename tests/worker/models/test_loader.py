"""From directory to model: what the spec says, where weights may come from, what makes a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import make_tiny_model, reference_logits, tiny_config
from tests.worker.models.steps import run_steps
from worker.models import loader
from worker.models.base import PagedModel
from worker.models.dense import DenseCache
from worker.models.llama import LlamaModel
from worker.models.loader import load_model
from worker.models.rope import positions_of

PROMPT = [5, 9, 200, 17, 33, 64, 8, 8, 120]


def logits_of(model: PagedModel) -> torch.Tensor:
    return run_steps(model, DenseCache(), [PROMPT], [[(0, len(PROMPT))]])[0]


def set_field(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_spec_says_what_was_loaded(tmp_path: Path) -> None:
    spec = load_model(str(make_tiny_model("qwen3", tmp_path / "model", max_position_embeddings=96))).spec
    assert spec.architecture == "Qwen3ForCausalLM"
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 4, 2, 16)
    assert (spec.vocab_size, spec.max_model_len, spec.dtype) == (288, 96, torch.float32)
    other = load_model(str(make_tiny_model("gpt_bigcode", tmp_path / "other")), max_model_len=40).spec
    assert other.architecture == "GPTBigCodeForCausalLM"
    assert (other.num_layers, other.num_heads, other.num_kv_heads, other.head_dim) == (3, 4, 1, 8)
    assert (other.vocab_size, other.max_model_len) == (288, 40)


def test_end_tokens_of_config_and_generation_config_are_merged(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    set_field(folder / "config.json", eos_token_id=7)
    set_field(folder / "generation_config.json", eos_token_id=[9, 7, 288])
    assert load_model(str(folder)).spec.eos_token_ids == (7, 9)
    set_field(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    assert load_model(str(folder)).spec.eos_token_ids == ()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_shards_are_the_same_model_as_one_file(tmp_path: Path, kind: str) -> None:
    whole = make_tiny_model(kind, tmp_path / "whole")
    parts = make_tiny_model(kind, tmp_path / "parts", shard_bytes=60_000)
    assert len(list(parts.glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load_model(str(whole))), logits_of(load_model(str(parts))))


def test_the_fingerprint_follows_config_dtype_and_weight_files(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    again = make_tiny_model("llama", tmp_path / "again")
    fingerprint = load_model(str(folder)).spec.fingerprint
    assert load_model(str(again)).spec.fingerprint == fingerprint
    assert load_model(str(folder), dtype="bfloat16").spec.fingerprint != fingerprint
    assert load_model(str(folder), load_format="dummy").spec.fingerprint != fingerprint
    set_field(again / "config.json", transformers_version="0.0.0")
    assert load_model(str(again)).spec.fingerprint == fingerprint
    set_field(again / "config.json", rms_norm_eps=1e-3)
    assert load_model(str(again)).spec.fingerprint != fingerprint
    shards = make_tiny_model("llama", tmp_path / "shards", shard_bytes=60_000)
    assert load_model(str(shards)).spec.fingerprint != fingerprint


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_dummy_weights_need_a_config_only_and_are_the_same_each_time(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(kind)))
    before = torch.get_rng_state()
    first = logits_of(load_model(str(tmp_path), load_format="dummy"))
    torch.rand(3)
    second = logits_of(load_model(str(tmp_path), load_format="dummy"))
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert first.std() > 0
    torch.set_rng_state(before)


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gpt2")))
    before = torch.get_rng_state()
    load_model(str(tmp_path), load_format="dummy")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_output_matrix_shares_the_memory_of_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_model("llama_tied", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    for model in (load_model(str(folder)), load_model(str(make_tiny_model("llama_tied", tmp_path / "plain")))):
        assert isinstance(model, LlamaModel)
        assert model._weights.head is model._weights.embedding


def test_a_stored_output_matrix_that_differs_is_used_although_the_config_ties_it(tmp_path: Path) -> None:
    folder = make_tiny_model("llama_tied", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    found = logits_of(load_model(str(folder)))
    torch.testing.assert_close(found, reference_logits(folder, PROMPT), rtol=0.0, atol=1e-4)


def test_rotary_tables_that_old_releases_saved_are_passed_over(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    expected = logits_of(load_model(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(load_model(str(folder))), expected)


def test_a_directory_is_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model("llama", tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "download", lambda *_, **__: pytest.fail("asked the hub"))
    assert load_model("org/name").spec.architecture == "LlamaForCausalLM"


def test_a_hub_id_is_downloaded_and_loaded_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    asked = []

    def download(model: str, *, with_weights: bool) -> Path:
        asked.append((model, with_weights))
        return folder

    monkeypatch.setattr(loader, "download", download)
    load_model("org/some-model")
    load_model("gpt2", load_format="dummy")
    assert asked == [("org/some-model", True), ("gpt2", False)]


def test_dtype_auto_is_the_configs_own_on_a_gpu_and_float32_on_the_cpu(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    config = loader.read_source(folder).config
    assert loader.choose_dtype("auto", config, torch.device("cuda")) == torch.bfloat16
    assert loader.choose_dtype("auto", config, torch.device("cpu")) == torch.float32
    assert loader.choose_dtype("float16", config, torch.device("cpu")) == torch.float16
    assert load_model(str(folder)).spec.dtype == torch.float32


@pytest.mark.parametrize(
    ("rope", "usual", "most"),
    [
        ({"rope_type": "default"}, 4096, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 4096, 16384),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096, 4096),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}, 4096, 8192),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 512,
            },
            512,
            512,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
            4096,
        ),
    ],
)
def test_how_far_positions_reach_depends_on_the_rope_scaling(
    tmp_path: Path, rope: dict[str, object], usual: int, most: int
) -> None:
    fields = tiny_config("llama", max_position_embeddings=4096, rope_scaling=rope)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    positions = positions_of(loader.read_source(tmp_path).config)
    assert (positions.usual, positions.most) == (usual, most)
