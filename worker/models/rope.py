"""Rotary position tables: which frequencies a config asks for, and up to which position they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from worker.models.base import ModelError

STATIC_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Scalings whose frequencies are the same for every sequence length."""

LENGTH_DEPENDENT_TYPES = frozenset({"dynamic", "longrope"})
"""Scalings whose frequencies change once a sequence outgrows the original context. Keys that are already cached would
have to be turned again, so such a model is served up to its original context only, where the frequencies are fixed."""


def rope_parameters(config: Any) -> dict[str, Any]:
    """The config's rope settings, {} where it has none. Models with settings per layer type are given flattened out."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        scaled = [value for value in parameters.values() if value.get("rope_type", "default") != "default"]
        return dict(scaled[0] if scaled else next(iter(parameters.values())))
    return dict(parameters)


def rope_type(config: Any) -> str:
    """The scaling type, "default" for none."""
    return str(rope_parameters(config).get("rope_type") or "default")


@dataclass(frozen=True)
class Positions:
    """How far a model's positions reach."""

    usual: int | None
    """The context to serve unless told otherwise; None: the config does not say."""
    most: int | None
    """The most positions over which the encoding is defined and its frequencies stay fixed; None: no limit known."""


def positions_of(config: Any) -> Positions:
    """The context of a config.

    Usual is max_position_embeddings, also under linear and yarn scaling: some configs name the trained context there
    and some the stretched one. Asked for, linear and yarn go on to the trained context times their factor. dynamic
    and longrope stop at the original context (see LENGTH_DEPENDENT_TYPES).
    """
    usual = getattr(config, "max_position_embeddings", None)
    if not isinstance(usual, int) or usual < 1:
        return Positions(None, None)
    parameters = rope_parameters(config)
    original = int(
        parameters.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or usual
    )
    factor = float(parameters.get("factor") or 1.0)
    kind = rope_type(config)
    if kind == "longrope":
        return Positions(min(usual, original), min(usual, original))
    if kind == "linear":
        return Positions(usual, int(usual * max(1.0, factor)))
    if kind == "yarn":
        return Positions(usual, max(usual, int(original * factor)))
    return Positions(usual, usual)


def rope_table(config: Any, head_dim: int, length: int, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, of positions 0..length-1: float32 [length, head_dim], any scaling already in them.

    Raises ModelError for a scaling type that is not fixed over `length` positions or that turns part of a head only.
    """
    kind = rope_type(config)
    if kind == "default":
        theta = float(rope_parameters(config)["rope_theta"])
        inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        scale = 1.0
    elif kind in STATIC_TYPES | LENGTH_DEPENDENT_TYPES:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    else:
        raise ModelError(f"rope scaling type {kind!r} is not supported")
    if inverse.shape != (head_dim // 2,):
        raise ModelError(f"partial rotary embedding ({2 * len(inverse)} of {head_dim} elements) is not supported")
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse.float()[None, :]
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scale).to(device)
