"""From a directory or hub id to a model that runs.

Everything that can be refused is refused before weights are read: source, config, architecture, context, dtype.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker.models import llama, transformers_model, weights
from worker.models.base import ModelError, ModelSpec, PagedModel
from worker.models.hub import download
from worker.models.rope import LENGTH_DEPENDENT_TYPES, positions_of, rope_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LOAD_FORMATS = ("auto", "dummy")

VOLATILE_FIELDS = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"})
"""Fields of config.json that do not change what is computed (dtype enters the fingerprint by itself)."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model directory whose config is read and understood."""

    folder: Path
    fields: dict[str, Any]
    """config.json as it stands."""
    config: Any
    """The transformers config made of it."""
    eos_token_ids: tuple[int, ...]


def load_model(
    model: str,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    load_format: str = "auto",
    max_model_len: int | None = None,
) -> PagedModel:
    """Load `model`, a directory or a hub id, onto `device`, ready to run.

    dtype "auto" is the config's on a GPU and float32 on the CPU. load_format "dummy" draws seeded random weights and
    reads config.json only. max_model_len None is the config's own context.

    Raises ModelError, one line with the mend, for anything that cannot be served exactly.
    """
    device = torch.device(device)
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"load format {load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}")
    source = read_source(find_folder(model, with_weights=load_format == "auto"))
    config = source.config
    ours = llama.serves(config)
    if not ours:
        transformers_model.check_config(config)
    computed = choose_dtype(dtype, config, device)
    length = choose_length(max_model_len, config)
    config.dtype = computed
    checkpoint = weights.open_checkpoint(source.folder) if load_format == "auto" else None
    digest = fingerprint(source.fields, computed, checkpoint)
    if ours:
        return _load_llama(source, checkpoint, length, computed, device, digest)
    return transformers_model.load(
        source.folder,
        config,
        checkpoint=checkpoint,
        max_model_len=length,
        dtype=computed,
        device=device,
        eos_token_ids=source.eos_token_ids,
        fingerprint=digest,
    )


def find_folder(model: str, *, with_weights: bool = True) -> Path:
    """The directory of `model`; a hub id is downloaded, and never looked up where a directory of that name exists."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{model} is a file; give the directory that holds config.json and safetensors weights")
    if not HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise ModelError(f"there is no directory {model}; give a model directory or a hub id such as org/name")
    return download(model, with_weights=with_weights)


def read_source(folder: Path) -> Source:
    """Read config.json and generation_config.json of a model directory."""
    fields = _read_json(folder, "config.json")
    if fields is None:
        raise ModelError(f"{folder} holds no config.json; give a model directory or a hub id such as org/name")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{folder / 'config.json'} names no model_type; it is not the config of a transformers model")
    if "quantization_config" in fields:
        raise ModelError(f"{folder} holds quantized weights, which are not supported; use an unquantized model")
    config = _parse_config(folder, model_type, fields)
    generation = _read_json(folder, "generation_config.json") or {}
    if getattr(config, "text_config", None) is not None:
        raise ModelError(f"{folder}: model type {model_type!r} is multimodal; only plain text decoders are supported")
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ModelError(f"{folder / 'config.json'}: {model_type} is not a plain text decoder (it has no vocab_size)")
    ends = _ids(getattr(config, "eos_token_id", None)) | _ids(generation.get("eos_token_id"))
    return Source(folder, fields, config, tuple(sorted(end for end in ends if 0 <= end < vocab_size)))


def choose_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The computing dtype for a name; "auto" follows the config on a GPU and is float32 on the CPU."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
        return DTYPES.get(stored, torch.bfloat16)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def choose_length(max_model_len: int | None, config: Any) -> int:
    """The context in tokens: what is asked for, if the model's positions reach that far, or the config's own."""
    positions = positions_of(config)
    if max_model_len is None:
        if positions.usual is None:
            raise ModelError(f"the config of {config.model_type} names no context length; set --max-model-len")
        return positions.usual
    if max_model_len < 1:
        raise ModelError(f"--max-model-len {max_model_len} must be at least 1")
    if positions.most is not None and max_model_len > positions.most:
        kind = rope_type(config)
        why = f" ({kind} rope scaling is served up to the original context)" if kind in LENGTH_DEPENDENT_TYPES else ""
        raise ModelError(
            f"--max-model-len {max_model_len} exceeds the model's {positions.most} positions{why}; lower it"
        )
    return max_model_len


def fingerprint(fields: dict[str, Any], dtype: torch.dtype, checkpoint: weights.Checkpoint | None) -> str:
    """SHA-256, hexadecimal, over config, dtype and the weight files' names, sizes and headers ("dummy" for none)."""
    lasting = {name: value for name, value in fields.items() if name not in VOLATILE_FIELDS}
    weight_digest = checkpoint.digest if checkpoint is not None else "dummy"
    text = json.dumps([lasting, str(dtype), weight_digest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _load_llama(
    source: Source,
    checkpoint: weights.Checkpoint | None,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    digest: str,
) -> llama.LlamaModel:
    config = source.config
    shape = llama.read_shape(config)
    # A file may hold an output matrix although the config ties it; transformers then uses the stored one if it differs.
    stored_head = checkpoint is not None and llama.HEAD in checkpoint.tensors
    separate_head = not shape.tied_embeddings or stored_head
    tensors = llama.allocate(shape, dtype=dtype, device=device, separate_head=separate_head)
    places = llama.places(shape, tensors)
    if checkpoint is None:
        weights.draw(places, deviation=getattr(config, "initializer_range", 0.02))
    else:
        weights.fill(checkpoint, places, ignored=llama.ignored)
    if shape.tied_embeddings and separate_head and torch.equal(tensors.head, tensors.embedding):
        tensors = llama.tie(tensors)
    spec = ModelSpec(
        architecture=llama.ARCHITECTURES[config.model_type],
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_model_len=max_model_len,
        dtype=dtype,
        eos_token_ids=source.eos_token_ids,
        fingerprint=digest,
    )
    return llama.LlamaModel(spec, shape, tensors, config)


def _parse_config(folder: Path, model_type: str, fields: dict[str, Any]) -> Any:
    """The transformers config of a directory, without ever running code that comes with it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        own_code = "it needs Python code of its own, which is never run" if "auto_map" in fields else "unknown"
        raise ModelError(f"{folder}: model type {model_type!r} is not supported ({own_code} to this transformers)")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class raises whatever its fields make it stumble over
        raise ModelError(
            f"{folder / 'config.json'} is not a valid {model_type} config: {weights.one_line(error)}"
        ) from error


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object from a file of the directory; None: there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON: {weights.one_line(error)}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} is not a JSON object")
    return fields


def _ids(value: Any) -> set[int]:
    """Token ids from a config field that holds one, several or none."""
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int) and not isinstance(item, bool)}
