"""A model's folder: complete, readable, with tokenizer and chat template, and small enough for one sequence.

Reads headers and sizes only; needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagewire.doctor.check import Check

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


def check_model(model: str, available: int | None) -> Iterator[Check]:
    """All checks of a model. `available` are the bytes for weights and KV, None: unknown."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith(("/", ".", "~")):
            yield Check("model", "bad", f"{model} is no folder", "give a folder with config.json, or a hub id")
        else:
            mend = "a hub id is downloaded at the start; give a folder to have it looked at"
            yield Check("model", "note", f"{model} is no folder here", mend)
        return
    config = _json(folder / "config.json")
    if config is None:
        yield Check(
            "model", "bad", f"{folder} has no readable config.json", "download the model again, with all its files"
        )
        return
    yield Check("model", "ok", f"{(config.get('architectures') or ['?'])[0]} in {folder}")
    yield check_weights(folder)
    yield check_tokenizer(folder)
    yield check_chat_template(folder)
    yield check_kv_space(config, available)


def check_weights(folder: Path) -> Check:
    """Every safetensors file: there, whole, and no pointer of Git LFS."""
    mend = "download the file again (git lfs pull in a clone)"
    names = [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        try:
            names = sorted(set((_json(folder / INDEX_FILE) or {})["weight_map"].values()))
        except (KeyError, AttributeError, TypeError):
            return Check("weights", "bad", f"{INDEX_FILE} is no safetensors index", mend)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return Check(
            "weights", "bad", f"{missing[0]}{more} missing", "download the missing files; pickles are not read"
        )
    for name in names:
        wrong = _what_is_wrong(folder / name)
        if wrong:
            return Check("weights", "bad", f"{name} {wrong}", mend)
    size = sum((folder / name).stat().st_size for name in names)
    return Check("weights", "ok", f"{size / GIB:.2f} GiB in {len(names)} file{'s' * (len(names) > 1)}")


def _what_is_wrong(path: Path) -> str:
    """With a safetensors file; empty: nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(POINTER))
        if head == POINTER:
            return "is a pointer of Git LFS, not the file"
        length = int.from_bytes(head[:8], "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            return "is cut off or no safetensors file"
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "is no safetensors file"
    needed = 8 + length + max(ends, default=0)
    return "" if size >= needed else f"is cut off: {size} of {needed} bytes"


def check_tokenizer(folder: Path) -> Check:
    """The tokenizer's files."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        mend = "add the model's tokenizer files; without them clients must send token ids (NO_TOKENIZER)"
        return Check("tokenizer", "note", "missing", mend)
    if found[0].endswith(".json") and _json(folder / found[0]) is None:
        return Check("tokenizer", "bad", f"{found[0]} is no JSON", "download the file again")
    return Check("tokenizer", "ok", found[0])


def check_chat_template(folder: Path) -> Check:
    """The chat template, without which chats are refused."""
    if (folder / "chat_template.jinja").is_file():
        return Check("chat template", "ok", "chat_template.jinja")
    if (_json(folder / "tokenizer_config.json") or {}).get("chat_template"):
        return Check("chat template", "ok", "in tokenizer_config.json")
    mend = "a base model has none: use pagewire generate; or put a chat_template.jinja into the folder"
    return Check("chat template", "note", "missing: chats are refused (NO_CHAT_TEMPLATE)", mend)


def check_kv_space(config: dict[str, Any], available: int | None) -> Check:
    """Whether the KV of one sequence of full length has room."""
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
        length = int(text["max_position_embeddings"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return Check("KV space", "note", "unknown: config.json does not tell the sizes")
    width = DTYPE_BYTES.get(str(text.get("torch_dtype") or text.get("dtype")), 4)
    token = 2 * layers * kv_heads * head_dim * width
    found = f"{token} bytes per token, {token * length / GIB:.2f} GiB for one sequence of {length}"
    if available is None:
        return Check("KV space", "note", found)
    if token * length > available:
        fits = available // token
        mend = f"--max-model-len {max(1, fits // 2)} or less, a GPU with more memory, or a narrower --dtype"
        return Check("KV space", "bad", f"{found}, {available / GIB:.2f} GiB are free", mend)
    return Check("KV space", "ok", f"{found}; {available // (token * length)} such sequences fit what is free now")


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None: there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
