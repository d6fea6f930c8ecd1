"""Gate and up projection of 129 and more tokens on compute capability 9.0: `csrc/linear_tall.cu`.

Twin: `kernels.reference.linear.linear_gated`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from kernels import compile as kernel_compile
from kernels.compile import TensorMap
from kernels.linear import check_factors, is_multiplied, token_map

ROWS = (224, 192)
"""Rows of weights that a tile may have, ..."""
_LESS_USE = 0.9
"""... the first ones as long as it leaves no more multiprocessors idle: larger tiles read shared memory less often."""
PAIR = 2
"""CTAs that copy tokens for each other."""
_CHUNK = 64
_BOX = 64
"""Tokens of a box, and of one warpgroup's product."""
_FIXED_BYTES = 1024
"""Of shared memory: to begin at a swizzle atom."""
LEAST_TOKENS = 129
"""With fewer the library or `kernels.linear_wgmma` is as fast (docs/kernels/linear.md)."""
LEAST_USE = 0.85
"""Of what all multiprocessors can multiply in the rounds that a product takes; with less the library is faster."""


@dataclass(frozen=True)
class TallConfig:
    """The compiled shape of one product, and its grid."""

    ctas: int
    groups: int = 2
    """Warpgroups of a CTA."""
    blocks: int = 2
    """Of 64 tokens that each of them multiplies."""
    stages: int = 3
    """Of the ring of tokens."""
    extra: int = 0
    """Stages more of the ring of weights."""
    rows: int = ROWS[0]
    """Of weights in a tile."""

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.groups * self.blocks * _BOX

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        weight_stages = self.stages + self.extra
        return _FIXED_BYTES + (self.stages * self.tokens + weight_stages * self.rows) * _CHUNK * 2 + weight_stages * 24

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with for this shape."""
        return {
            "GROUPS": self.groups,
            "BLOCKS": self.blocks,
            "ROWS": self.rows,
            "STAGES": self.stages,
            "EXTRA": self.extra,
        }


_ONE_TILE = TallConfig(ctas=0, extra=1)
"""For 193 to 256 tokens: how fast memory delivers weights is what counts."""
_TILES = TallConfig(ctas=0)
_OF_THREE = TallConfig(ctas=0, groups=3, blocks=1, stages=4)
"""Tiles of 192 tokens, better where they fit better, ..."""
_MOST_OF_THREE = 576
"""... up to so many tokens."""


@functools.lru_cache(maxsize=8192)
def tall_config(num_tokens: int, rows: int, width: int, limits: kernel_compile.DeviceLimits) -> TallConfig | None:
    """How to multiply num_tokens rows by a [rows, width] matrix of gate and up rows. None: not by this kernel."""
    pairs = limits.processors // PAIR
    if not limits.wgmma or not pairs or num_tokens < 1 or width % _CHUNK or rows % 32:
        return None
    shape = _ONE_TILE if num_tokens <= _ONE_TILE.tokens else _TILES
    if num_tokens <= _MOST_OF_THREE and _padded(num_tokens, _OF_THREE) < _padded(num_tokens, shape):
        shape = _OF_THREE
    configs = []
    for tile in ROWS:
        shares = math.ceil(rows / tile / PAIR) * math.ceil(num_tokens / shape.tokens)
        configs.append(replace(shape, rows=tile, ctas=math.ceil(shares / math.ceil(shares / pairs)) * PAIR))
    most, others = (_use(config, num_tokens, rows, limits.processors) for config in configs)
    config = configs[most < _LESS_USE * others]
    return config if config.shared_bytes <= limits.shared_bytes else None


def _use(config: TallConfig, num_tokens: int, rows: int, processors: int) -> float:
    """Of what all multiprocessors can multiply in the rounds that a product takes."""
    tiles, token_tiles, boxes = rows / config.rows, math.ceil(num_tokens / config.tokens), num_tokens / _BOX
    if token_tiles == 1:
        boxes = math.ceil(boxes)  # how many tokens exist makes no difference: weights have to be read
    rounds = math.ceil(math.ceil(tiles) * token_tiles / config.ctas)
    return tiles * boxes / (rounds * math.ceil(boxes) / token_tiles * processors)


def _padded(num_tokens: int, config: TallConfig) -> int:
    """Tokens of all tiles."""
    return math.ceil(num_tokens / config.tokens) * config.tokens


def takes_tokens(num_tokens: int, gate_up: torch.Tensor) -> bool:
    """Whether `linear_gated` is the better way to multiply num_tokens rows by this [2 * I, K] matrix."""
    config = _config(num_tokens, gate_up)
    if num_tokens < LEAST_TOKENS or config is None:
        return False
    processors = kernel_compile.limits(gate_up.device).processors
    return _use(config, num_tokens, gate_up.shape[0], processors) >= LEAST_USE


def _config(num_tokens: int, gate_up: torch.Tensor) -> TallConfig | None:
    if not is_multiplied(gate_up):
        return None
    return tall_config(num_tokens, *gate_up.shape, kernel_compile.limits(gate_up.device))


def linear_gated(x: torch.Tensor, gate_up: torch.Tensor, *, config: TallConfig | None = None) -> torch.Tensor:
    """silu(gate) * up of x [B, K] times gate_up [2 * I, K] transposed, gate rows first: [B, I] of x's dtype.

    config: another than the one chosen, for measuring. Raises ValueError, TypeError, KernelError.
    """
    check_factors(x, gate_up)
    config = config or _config(x.shape[0], gate_up)
    if config is None:
        raise ValueError(f"{x.shape[0]} tokens times {tuple(gate_up.shape)} {gate_up.dtype}: not for this kernel")
    out = torch.empty((x.shape[0], gate_up.shape[0] // 2), dtype=x.dtype, device=x.device)
    device, dtype, width = x.device, x.dtype, x.shape[1]
    kernel = kernel_compile.kernel(
        "linear_tall.cu",
        "linear_tall",
        device,
        DTYPE=kernel_compile.CUDA_NAMES[dtype],
        K=width,
        **config.defines,
    )
    kernel(
        (config.ctas, 1, 1),
        config.groups * 128,
        config.shared_bytes,
        out.data_ptr(),
        _weight_map(device, gate_up.data_ptr(), dtype, out.shape[1], width, config.rows // 2),
        _weight_map(device, gate_up[out.shape[1]].data_ptr(), dtype, out.shape[1], width, config.rows // 2),
        token_map(device, x.data_ptr(), dtype, x.shape[0], width, (_CHUNK, _BOX)),
        x.shape[0],
        out.shape[1],
    )
    return out


@functools.lru_cache(maxsize=4096)
def _weight_map(device: torch.device, address: int, dtype: torch.dtype, rows: int, width: int, tile: int) -> bytes:
    """Of a matrix in sixteens of rows, whose place 8 q + 2 t + e has row 4 t + 2 q + e."""
    row = width * 2
    sizes, strides = (width, 2, 4, 2, rows // 16), (row, 4 * row, 2 * row, 16 * row)
    view = TensorMap(address, dtype, sizes, strides, (_CHUNK, 2, 4, 2, tile // 16))
    return kernel_compile.tensor_map(device, view)
