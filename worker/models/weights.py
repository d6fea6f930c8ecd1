"""Weight files: safetensors of a model directory, read tensor by tensor straight into their place.

Headers are read and checked before any weight, so that a wrong directory is refused in milliseconds. Nothing here
unpickles anything.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from worker.models.base import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

METADATA = "__metadata__"
"""Entry of a header that is no tensor."""

MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors format allows."""

MAX_NAMES_SHOWN = 3
"""Tensor names in an error line."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored types that can be cast to the computing dtype without a scale."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """The format's own name, for example "BF16"."""
    begin: int
    """First byte, counted from the end of the header."""
    end: int
    """Byte behind the last, counted likewise."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one directory, headers read."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    """By name, in file order."""
    digest: str
    """SHA-256 over the files' names, sizes and headers, hexadecimal."""

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, on the CPU, file by file; each file is mapped, so a tensor costs memory only while held."""
        by_file: dict[Path, list[str]] = {}
        for name, stored in self.tensors.items():
            by_file.setdefault(stored.path, []).append(name)
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in names:
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {one_line(error)}; download the file again") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of `folder`'s safetensors. Raises ModelError where there are none, or where they are damaged."""
    digest = hashlib.sha256()
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        header, raw = _read_header(path)
        end = 8 + len(raw) + max((_end(path, name, entry) for name, entry in header.items()), default=0)
        if end != path.stat().st_size:
            raise ModelError(
                f"{path} is cut short or damaged ({path.stat().st_size} of {end} bytes); download it again"
            )
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(raw)
        for name, entry in header.items():
            if name != METADATA:
                tensors[name] = _stored(path, name, entry)
    return Checkpoint(folder, tensors, digest.hexdigest())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, sorted: those that the index names, or the single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index; download the file again") from error
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ModelError(f"{index} names files outside of its directory; refused")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {some(missing)}, named by {INDEX_FILE}; download the missing files")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{folder} holds weights as pickle only ({some(pickles)}), which can run code when read; "
            "convert them to safetensors (save_pretrained writes it)"
        )
    raise ModelError(f"{folder} holds no {SINGLE_FILE}; give a directory with safetensors weights")


def fill(checkpoint: Checkpoint, places: Mapping[str, torch.Tensor], ignored: Callable[[str], bool]) -> None:
    """Copy every tensor of the checkpoint into `places`, casting to their dtype and device.

    places maps tensor names to views of the final, possibly fused, tensors. Raises ModelError that names tensors
    which are missing, misshapen, of a quantized type, or of no place and not `ignored`; checked before any is read.
    """
    stored = checkpoint.tensors
    missing = [name for name in places if name not in stored]
    if missing:
        raise ModelError(f"{checkpoint.folder} lacks {some(missing)}; the weights do not belong to this config.json")
    unexpected = [name for name in stored if name not in places and not ignored(name)]
    if unexpected:
        raise ModelError(
            f"{checkpoint.folder} holds {some(unexpected)}, for which this architecture has no use; "
            "the weights do not belong to this config.json"
        )
    for name, place in places.items():
        if stored[name].shape != tuple(place.shape):
            raise ModelError(
                f"{checkpoint.folder}: {name} has shape {list(stored[name].shape)}, config.json asks for "
                f"{list(place.shape)}"
            )
        if stored[name].dtype not in FLOAT_DTYPES:
            raise ModelError(f"{checkpoint.folder}: {name} is stored as {stored[name].dtype}; use unquantized weights")
    with loading_bar(sum(stored[name].num_bytes for name in places)) as advance:
        for name, tensor in checkpoint.read():
            if name in places:
                places[name].copy_(tensor)
                advance(stored[name].num_bytes)


def draw(places: Mapping[str, torch.Tensor], deviation: float, seed: int = 0) -> None:
    """Fill `places` with seeded random weights: normal matrices, unit norms, zero biases (load format "dummy")."""
    with loading_bar(sum(place.nbytes for place in places.values())) as advance:
        for number, (name, place) in enumerate(places.items()):
            if name.endswith("bias"):
                place.zero_()
            elif place.dim() == 1:
                place.fill_(1.0)
            else:
                generator = torch.Generator(device=place.device).manual_seed(seed * 1_000_003 + number)
                place.normal_(0.0, deviation, generator=generator)
            advance(place.nbytes)


@contextmanager
def loading_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr while weights load, if that is a terminal; yields what advances it by bytes."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading weights", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first sentence of an exception's text, without line breaks, for use inside an error line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a safetensors file and its bytes: 8 bytes of length, little-endian, then JSON."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("truncated")
            raw = file.read(length)
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("not an object")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is not a safetensors file, or is cut short; download the file again") from error
    return header, raw


def _end(path: Path, name: str, entry: Any) -> int:
    """Where a tensor's bytes end, counted from the end of the header."""
    return 0 if name == METADATA else _stored(path, name, entry).end


def _stored(path: Path, name: str, entry: Any) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        return StoredTensor(
            path, tuple(int(size) for size in entry["shape"]), str(entry["dtype"]), int(begin), int(end)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} describes {name!r} wrongly; download the file again") from error


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    more = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
