"""Matrix products of some tokens on compute capability 9.0: `csrc/linear_wgmma.cu`. Twins: `kernels.reference.linear`.

For more tokens than `kernels.linear` takes, up to MAX_TOKENS; beyond, a product is bound by operations and the
library's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kernels import compile as kernel_compile
from kernels.linear import check_factors

MAX_TOKENS = 128
"""Most tokens of one launch."""
FEATURES = (64, 96, 128, 192, 224, 256)
"""Rows of weights that a tile may have."""
STORING, GATING = 0, 2
"""EPILOGUE of the source."""
_CHUNK = 64
_FIXED_BYTES = 1024 + 16
"""Of shared memory: to begin at a swizzle atom, and a word that a CTA's threads share."""
LAG = 2
"""Stages that the producer asks for before it tells of one."""
_MAX_STAGES = 6
_MAX_SPLIT = 8
_LATENCY_CHUNKS = 6
"""What starting a CTA, filling its ring and storing its sums take, in the time of a chunk of average size."""


@dataclass(frozen=True)
class WgmmaConfig:
    """The compiled shape of one product."""

    features: int
    """Rows of weights in a tile."""
    token_groups: int
    """Groups of 64 tokens."""
    split: int
    """CTAs that share a tile."""
    stages: int

    @property
    def stage_bytes(self) -> int:
        """Of shared memory: a stage and its barriers."""
        return (self.features + self.token_groups * 64) * _CHUNK * 2 + 16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        return _FIXED_BYTES + self.stages * self.stage_bytes

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with for this shape."""
        return {
            "FEATURES": self.features,
            "TOKEN_GROUPS": self.token_groups,
            "SPLIT": self.split,
            "STAGES": self.stages,
            "LAG": LAG,
        }


@functools.cache
def wgmma_config(num_tokens: int, rows: int, width: int, limits: kernel_compile.DeviceLimits) -> WgmmaConfig | None:
    """How to multiply num_tokens rows by a [rows, width] matrix: tiles and shares by which the slowest multiprocessor
    reads least. None: not by this kernel."""
    if not limits.wgmma or not 1 <= num_tokens <= MAX_TOKENS or width % _CHUNK:
        return None
    groups = -(-num_tokens // 64)
    best: tuple[float, WgmmaConfig] | None = None
    for features in FEATURES:
        if rows % features:
            continue
        for split in range(1, _MAX_SPLIT + 1):
            stage = WgmmaConfig(features, groups, split, 1).stage_bytes
            stages = min(_MAX_STAGES, (limits.shared_bytes - _FIXED_BYTES) // stage, width // _CHUNK // split)
            if stages < LAG + 2:
                continue
            ctas = rows // features * split
            waves = -(-ctas // limits.processors)
            chunks = -(-(width // _CHUNK) // split)
            meeting = features * groups * 64 * 4 * (split - 1)  # what the last CTA reads of the others' sums
            time = waves * ((chunks + _LATENCY_CHUNKS) * stage) + meeting
            config = WgmmaConfig(features, groups, split, stages)
            if best is None or time < best[0]:
                best = time, config
    return None if best is None else best[1]


@dataclass(frozen=True)
class _Workspace:
    partials: torch.Tensor
    """uint8: sums of CTAs that share a tile."""
    arrivals: torch.Tensor
    """int32: how many have delivered; zero between launches."""


_MOST_TILES = 1 << 12
_PARTIALS_BYTES = 32 << 20
_workspaces: dict[torch.device, _Workspace] = {}


def _workspace(device: torch.device) -> _Workspace:
    """Scratch of products that follow one another on one stream."""
    if device not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise kernel_compile.KernelError("run a product of some tokens once before capturing a graph")
        _workspaces[device] = _Workspace(
            torch.empty(_PARTIALS_BYTES, dtype=torch.uint8, device=device),
            torch.zeros(_MOST_TILES, dtype=torch.int32, device=device),
        )
    return _workspaces[device]


def forget_workspaces() -> None:
    """Drops the scratch memory; captured graphs that use it must be gone."""
    _workspaces.clear()


def takes_some_tokens(num_tokens: int, *weights: torch.Tensor) -> bool:
    """Whether this kernel can multiply num_tokens rows by each of these [N, K] matrices."""
    return all(_config(num_tokens, weight) is not None for weight in weights)


def _config(num_tokens: int, weight: torch.Tensor) -> WgmmaConfig | None:
    if weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous():
        return None
    rows, width = weight.shape
    return wgmma_config(num_tokens, rows, width, kernel_compile.limits(weight.device))


def linear(x: torch.Tensor, weight: torch.Tensor, config: WgmmaConfig | None = None) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype.

    config: another than the one chosen, for measuring. Raises ValueError, TypeError, KernelError.
    """
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(out, x, weight, STORING, config)
    return out


def linear_gated(x: torch.Tensor, gate_up: torch.Tensor, config: WgmmaConfig | None = None) -> torch.Tensor:
    """silu(gate) * up of x times gate_up [2 * I, K] transposed, gate rows first: [B, I]. As `linear`."""
    out = torch.empty((x.shape[0], gate_up.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(out, x, gate_up, GATING, config)
    return out


def _launch(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epilogue: int, config: WgmmaConfig | None
) -> None:
    check_factors(x, weight)
    config = config or _config(x.shape[0], weight)
    if config is None:
        raise ValueError(f"{x.shape[0]} tokens times {tuple(weight.shape)} {weight.dtype}: not for this kernel")
    kernel = kernel_compile.kernel(
        "linear_wgmma.cu",
        "linear_wgmma",
        x.device,
        DTYPE=kernel_compile.CUDA_NAMES[x.dtype],
        K=x.shape[1],
        EPILOGUE=epilogue,
        **config.defines,
    )
    workspace = _workspace(x.device)
    tiles = weight.shape[0] // config.features
    needed = tiles * config.split * config.features * config.token_groups * 64 * 4
    if config.split > 1 and (tiles > _MOST_TILES or needed > _PARTIALS_BYTES):
        raise ValueError(f"{needed} bytes of partial sums: more than the scratch memory holds")
    kernel(
        (tiles, config.split, 1),
        (config.token_groups + 1) * 128,
        config.shared_bytes,
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        workspace.partials.data_ptr(),
        workspace.arrivals.data_ptr(),
        x.shape[0],
        out.shape[1],
    )
