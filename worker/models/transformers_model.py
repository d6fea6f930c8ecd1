"""Any other decoder, run by transformers with paged attention behind its attention interface.

transformers computes everything but attention: projections, positions, norms, experts. Each attention layer calls the
interface with its query, key and value, its scale, window and soft cap, which go to the step's `attend`. The tokens of
a step are one row of a batch of 1 with explicit positions, without a cache of transformers' own.

A model is served only if a probe at load time shows that this computes what the model's own eager attention computes
(see `probe.py`). What the interface cannot express is refused by name.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from worker.models.base import ModelError, ModelSpec, PagedAttention
from worker.models.rope import LENGTH_DEPENDENT_TYPES, STATIC_TYPES, rope_type
from worker.models.weights import Checkpoint, one_line, some

INTERFACE = "pagewire"
"""Name under which transformers knows our attention."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})
"""Kinds of layers whose only memory of earlier tokens is their keys and values."""

HARMLESS = frozenset(
    {
        "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", "is_causal",
        "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "past_key_values",
        "layer_idx", "deterministic", "target_dtype", "input_ids",
    }
)  # fmt: skip
"""What models pass to attention functions besides, and what no attention function of a decoder needs."""

OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")
"""Ends of tensor names that old releases saved although they are constants."""


@dataclass(frozen=True)
class LayerAttention:
    """What one attention layer asked for when it was probed."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    """Sliding window, in tokens, as the layer's mask has it; None: full attention."""


@dataclass
class Step:
    """One forward pass on its way through the layers. Attention finds it through `_current`."""

    batch: PagedAttention
    max_model_len: int
    layers: tuple[LayerAttention, ...] | None
    """By layer, as probed; None while probing."""
    seen: list[LayerAttention] = field(default_factory=list)
    """By layer, so far."""


@dataclass(frozen=True)
class MaskShape:
    """What a probed mask allows, in place of a dense mask."""

    window: int | None


_current: ContextVar[Step] = ContextVar("pagewire_step")


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, Hq, T, D], key, value [1, Hkv, T, D], to ([1, T, Hq, D], None)."""
    step = _current.get()
    layer = len(step.seen)
    if step.layers is None:
        _check_call(module, layer, query, key, value, dropout, others)
        window = _probed_window(attention_mask, sliding_window, step.max_model_len)
        step.seen.append(LayerAttention(query.shape[1], key.shape[1], query.shape[3], window))
    else:
        step.seen.append(step.layers[layer])
    attended = step.batch.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        sliding_window=step.seen[layer].window,
        soft_cap=softcap,
    )
    return attended.unsqueeze(0), None


def attention_mask(
    *, mask_function: Callable[..., torch.Tensor] | None = None, device: torch.device | str = "cpu", **_: Any
) -> MaskShape | None:
    """transformers' mask function: builds no mask. While probing, says what kind of mask the model wanted."""
    step = _current.get()
    if step.layers is not None:
        return None
    if mask_function is None:
        raise ModelError("its attention masks are not causal")
    return MaskShape(window_of(mask_function, step.max_model_len, device))


AttentionInterface.register(INTERFACE, attention)
AttentionMaskInterface.register(INTERFACE, attention_mask)


def window_of(
    mask_function: Callable[..., torch.Tensor], length: int, device: torch.device | str = "cpu"
) -> int | None:
    """The sliding window of a mask function over `length` positions, None for plain causal.

    mask_function(batch, head, query, key) says elementwise what is visible. Raises ModelError for any other pattern
    (chunks, prefixes that see their own future).
    """
    queries = torch.tensor(sorted({0, 1 % length, length // 3, length // 2, length - 1}), device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    try:
        visible = torch.as_tensor(mask_function(zero, zero, queries, keys)).broadcast_to(len(queries), length)
    except Exception as error:  # whatever a foreign mask function stumbles over outside of its own tensors
        raise ModelError("its attention masks depend on more than positions") from error
    width = int(visible[-1].sum())
    if width and torch.equal(visible, (keys <= queries) & (keys > queries - width)):
        return width if width < length else None
    raise ModelError("its attention masks are neither causal nor a sliding window")


def _probed_window(mask: Any, stated: int | None, length: int) -> int | None:
    """The window that the model's own eager attention applies, which is the mask's. Both sources must agree."""
    stated = stated if stated is not None and stated < length else None
    if not isinstance(mask, MaskShape):
        if mask is not None:
            raise ModelError("it builds attention masks of its own")
        return stated
    if stated is not None and stated != mask.window:
        raise ModelError(f"its mask has the window {mask.window}, its attention states {stated}")
    return mask.window


def _check_call(
    module: nn.Module,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Refuse a layer whose attention is more than scale, window and soft cap can say."""
    if others.get("s_aux") is not None:
        raise ModelError("attention sinks (s_aux) are not supported")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError("its attention is not causal")
    if dropout:
        raise ModelError("dropout in attention is not supported")
    unknown = sorted(name for name, what in others.items() if what is not None and name not in HARMLESS)
    if unknown:
        raise ModelError(f"its attention takes {some(unknown)}, which paged attention does not know")
    if getattr(module, "layer_idx", layer) not in (layer, None):
        raise ModelError("its layers share keys and values, or run in another order than they are numbered")
    if query.shape[-1] != key.shape[-1] or key.shape != value.shape:
        raise ModelError(f"heads of queries, keys and values differ in size ({query.shape[-1]}, {key.shape[-1]}, "
                         f"{value.shape[-1]})")  # fmt: skip
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ModelError("its attention is not that of a decoder with grouped heads")


def check_config(config: Any) -> str:
    """The name of the class that runs a config.

    Raises ModelError, before weights are read, for what is known not to work.
    """
    kind = config.model_type
    name = (getattr(config, "architectures", None) or [kind])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; only decoders are supported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} is not a causal language model; only those are supported")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # transformers runs some configs by a sibling class, Mistral with layer types by Ministral for example.
    if name != kind and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(f"{name} is not supported; of model type {kind!r} only {model_class.__name__} is")
    types = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if getattr(model_class, "_is_stateful", False) or types - LAYER_TYPES:
        which = f" ({some(sorted(types - LAYER_TYPES))})" if types - LAYER_TYPES else ""
        raise ModelError(f"{name} has layers with a state of their own{which}; only attention layers are supported")
    if getattr(config, "alibi", False) or kind in ("bloom", "mpt"):
        raise ModelError(f"{name} biases attention by distance (ALiBi), which is not supported")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"{name} shares keys and values between layers, which is not supported")
    if getattr(config, "add_cross_attention", False):
        raise ModelError(f"{name} has cross-attention, which is not supported")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ModelError(f"{name} does not run through transformers' attention interface, so it cannot be paged")
    if rope_type(config) not in STATIC_TYPES | LENGTH_DEPENDENT_TYPES | {"proportional"}:
        raise ModelError(f"{name} uses rope scaling {rope_type(config)!r}, which is not supported")
    return str(model_class.__name__)


class TransformersModel:
    """A loaded decoder. `spec.num_layers` and head sizes are what its attention layers showed when probed."""

    def __init__(self, spec: ModelSpec, trunk: nn.Module, head: Head, layers: tuple[LayerAttention, ...]) -> None:
        self.spec = spec
        self._trunk = trunk
        self._head = head
        self._layers = layers

    @torch.no_grad()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedAttention) -> torch.Tensor:
        """As in PagedModel."""
        step = Step(batch, self.spec.max_model_len, self._layers)
        return run_trunk(self._trunk, token_ids, positions, step)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in PagedModel."""
        return self._head.logits(hidden)


def run_trunk(trunk: nn.Module, token_ids: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
    """All layers over one step's tokens: int64 [T] ids and positions to hidden states [T, H]."""
    token = _current.set(step)
    try:
        answer = trunk(input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
    finally:
        _current.reset(token)
    hidden: torch.Tensor = answer[0]
    return hidden[0]


class Replay(nn.Module):
    """Stands in for a model's layers: answers with hidden states computed before, whatever it is called with.

    What a causal language model does behind its layers (projection, scaling, soft cap) differs between models. Its
    own forward does it right, so that is what runs, with this in the place of the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    @property
    def decoder(self) -> Replay:
        """Some models call their layers one level further down."""
        return self

    def forward(self, *_: Any, **__: Any) -> ReplayedOutput:
        """The hidden states that were set."""
        assert self.hidden is not None
        return ReplayedOutput(self.hidden)


class ReplayedOutput:
    """A layers' output that has hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class Head:
    """Everything behind the layers of a causal language model."""

    def __init__(self, model: nn.Module, replay: Replay) -> None:
        self._model = model
        self._replay = replay

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, H] to logits [R, vocab_size]."""
        rows = hidden.unsqueeze(0)
        token_ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        self._replay.hidden = rows
        try:
            answer = self._model(input_ids=token_ids, use_cache=False)
        finally:
            self._replay.hidden = None
        logits: torch.Tensor = answer.logits
        return logits[0]


def split(model: nn.Module) -> tuple[nn.Module, Head]:
    """Take a causal language model apart: (its layers, what is behind them)."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    trunk = getattr(model, prefix, None) if prefix else None
    if not isinstance(trunk, nn.Module) or trunk is model:
        raise ModelError("its layers and its output head cannot be told apart")
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        raise ModelError("it takes no positions from outside, so it cannot be paged")
    replay = Replay()
    setattr(model, prefix, replay)
    return trunk, Head(model, replay)


def load(
    folder: Path,
    config: Any,
    *,
    checkpoint: Checkpoint | None,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    eos_token_ids: tuple[int, ...],
    fingerprint: str,
) -> TransformersModel:
    """Load, probe and split a decoder. checkpoint None draws seeded random weights from the config alone."""
    from worker.models import probe

    name = check_config(config)
    with _quiet():
        model = _draw(config, dtype, device) if checkpoint is None else _read(folder, config, dtype)
    model = model.to(device).eval().requires_grad_(False)
    try:
        expected = probe.eager(model, max_model_len)
        trunk, head = split(model)
        layers = probe.paged(trunk, head, expected, max_model_len)
    except ModelError as error:
        raise ModelError(f"{name} cannot be served: {error}") from error
    first = layers[0]
    spec = ModelSpec(
        architecture=name,
        num_layers=len(layers),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        dtype=dtype,
        eos_token_ids=eos_token_ids,
        fingerprint=fingerprint,
    )
    return TransformersModel(spec, trunk, head, layers)


def _read(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """The model with its weights, on the CPU; tensors that are missing, left over or misshapen are named."""
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, report = load(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=INTERFACE,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever a config or file makes it stumble over
        raise ModelError(f"{folder} cannot be loaded: {one_line(error)}") from error
    misshapen = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if misshapen:
        raise ModelError(f"{folder}: {some(misshapen)} does not have the shape that config.json asks for")
    if report["missing_keys"]:
        missing = some(sorted(report["missing_keys"]))
        raise ModelError(f"{folder} lacks {missing}; the weights do not belong to this config.json")
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.endswith(OLD_BUFFERS))
    if unexpected:
        raise ModelError(f"{folder} holds {some(unexpected)}, for which this architecture has no use; "
                         "the weights do not belong to this config.json")  # fmt: skip
    return model


def _draw(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with seeded random weights, made on the device itself."""
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), device:
            torch.manual_seed(0)
            build: Any = AutoModelForCausalLM.from_config
            return build(config, dtype=dtype, attn_implementation=INTERFACE)
    except Exception as error:  # as above
        raise ModelError(f"{config.model_type} model cannot be built: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log lines, whose reasons are raised or intended here; with its bars on terminals only."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    bar_switch: Any = transformers_logging
    if bars and not sys.stderr.isatty():
        bar_switch.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            bar_switch.enable_progress_bar()
