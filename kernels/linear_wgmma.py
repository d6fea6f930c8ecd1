"""Matrix products of up to 256 tokens on compute capability 9.0: `csrc/linear_wgmma.cu`.

Twins: `kernels.reference.linear`. `linear_gated` leaves what `kernels.linear_tall` is better at to it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from kernels import compile as kernel_compile
from kernels import linear_tall
from kernels.cache import check_index, check_stored
from kernels.compile import TensorMap
from kernels.linear import check_factors, is_multiplied, token_map
from kernels.reference.linear import Product

TOKENS = (64, 96, 128, 192, 256)
"""Tokens that a tile may have."""
STORING, PARTS, GATING, ROTATING = range(4)
"""EPILOGUE of the source."""
ROWS = (128, 64)
"""Rows of weights that a tile may have."""
_TILE_OF_HEADS = 64
"""Rows of a tile of `linear_rotated`."""
_CHUNK = 64
_FIXED_BYTES = 1024
"""Of shared memory: to begin at a swizzle atom."""
_MOST_BYTES_IN_FLIGHT = 1 << 17
"""Of weights, of a CTA."""
_MOST_PARTS = 6
"""Of a product by `linear_parts`; what adds them up has to read them all."""
_CLUSTERED_SHARE = 0.9
"""Of the multiprocessors; as many are certain to lie in whole clusters of four."""
_MOST_TOKENS: dict[Product, int] = {
    "linear": 96,
    "linear_parts": 256,
    "linear_gated": 256,
    "linear_rotated": 128,
}
"""With more the library is as fast, or `kernels.linear_tall` faster (docs/kernels/linear.md)."""
_FULL_RATE_SHARE = 0.7
"""Of the multiprocessors; fewer do not read as fast as memory delivers."""
_MOST_TOKENS_OF_PAIRS = 64
"""Of `linear_parts` in clusters of two: with more, two that wait for each other lose more than they read less."""
_LEAST_SHARE: dict[Product, float] = {
    "linear": 0.35,
    "linear_parts": 0.45,
    "linear_gated": 0.75,
    "linear_rotated": 0.35,
}
"""Of the multiprocessors; with fewer busy the library is faster."""


@dataclass(frozen=True)
class WgmmaConfig:
    """The compiled shape of one product, and its grid."""

    tokens: int
    """Of a tile, at least those there are."""
    cluster: int
    """CTAs that copy tokens for each other."""
    stages: int
    ctas: int
    split: int = 1
    """Parts of K that are multiplied apart."""
    rows: int = ROWS[0]
    """Of weights in a tile."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        return _FIXED_BYTES + self.stages * _stage_bytes(self.rows, self.tokens)

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with for this shape."""
        return {
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "CLUSTER": self.cluster,
            "STAGES": self.stages,
            "SPLIT": self.split,
        }

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 128 + self.rows // 64 * 128


def _stage_bytes(rows: int, tokens: int) -> int:
    """Of shared memory: a stage and its barriers."""
    return (rows + tokens) * _CHUNK * 2 + 16


@functools.lru_cache(maxsize=8192)
def wgmma_config(
    by: Product, num_tokens: int, rows: int, width: int, limits: kernel_compile.DeviceLimits
) -> WgmmaConfig | None:
    """How the function of this name multiplies num_tokens rows by a [rows, width] matrix: every CTA takes equally many
    tiles. None: not by this kernel."""
    if not limits.wgmma or not 1 <= num_tokens <= TOKENS[-1] or width % _CHUNK or rows % ROWS[0]:
        return None
    if by == "linear_rotated" and num_tokens > _MOST_TOKENS[by]:
        return None  # and from 193 on there are no registers for angles beside the sums
    tokens = next(tokens for tokens in TOKENS if tokens >= num_tokens)
    tile_rows, split = _tile(by, rows, width, limits.processors)
    tiles = rows // tile_rows
    stages = (limits.shared_bytes - _FIXED_BYTES) // _stage_bytes(tile_rows, tokens)
    stages = min(_MOST_BYTES_IN_FLIGHT // (tile_rows * _CHUNK * 2), stages)
    clusters: tuple[int, ...] = (1,)
    if by == "linear_gated":
        clusters = (2, 1) if tokens == 256 else (4, 2, 1)
    elif by == "linear_parts" and tokens <= _MOST_TOKENS_OF_PAIRS:
        clusters = (2, 1)
    best: WgmmaConfig | None = None
    for cluster in clusters:
        room = int(limits.processors * (_CLUSTERED_SHARE if cluster > 2 else 1)) // cluster
        if tiles % cluster or not room:
            continue
        shares = tiles // cluster * split
        ctas = math.ceil(shares / math.ceil(shares / room)) * cluster
        if best is None or ctas > best.ctas:
            best = WgmmaConfig(tokens, cluster, stages, ctas, split, tile_rows)
    return best


def _tile(by: Product, rows: int, width: int, processors: int) -> tuple[int, int]:
    """Rows of a tile and parts of K. Small tiles where large ones are too few; parts as many as there is room for, of
    small tiles if those keep enough multiprocessors busy: fewer parts are less to add up."""
    most_rows, fewer_rows = ROWS
    if by == "linear_rotated":
        return fewer_rows, 1
    enough = processors * _FULL_RATE_SHARE
    if by == "linear_gated" or rows // most_rows >= enough:
        return most_rows, 1
    if by == "linear":
        return fewer_rows, 1
    most = min(_MOST_PARTS, width // _CHUNK)
    ways = [(rows // tile, min(most, max(1, processors // (rows // tile))), tile) for tile in (fewer_rows, most_rows)]
    _, split, tile = max(ways, key=lambda way: min(way[0] * way[1], enough))
    return tile, split


def takes_tokens(num_tokens: int, weight: torch.Tensor, *, by: Product) -> bool:
    """Whether the function of this name is the better way to multiply num_tokens rows by this [N, K] matrix."""
    if by == "linear_gated" and linear_tall.takes_tokens(num_tokens, weight):
        return True
    if num_tokens > _MOST_TOKENS[by]:
        return False
    config = _config(by, num_tokens, weight)
    return config is not None and config.ctas >= _LEAST_SHARE[by] * kernel_compile.limits(weight.device).processors


def _config(by: Product, num_tokens: int, weight: torch.Tensor) -> WgmmaConfig | None:
    if not is_multiplied(weight):
        return None
    return wgmma_config(by, num_tokens, *weight.shape, kernel_compile.limits(weight.device))


def linear(x: torch.Tensor, weight: torch.Tensor, *, config: WgmmaConfig | None = None) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype.

    config: another than the one chosen, for measuring. Raises ValueError, TypeError, KernelError.
    """
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(out, x, weight, STORING, config or _fitting("linear", x, weight))
    return out


def linear_parts(x: torch.Tensor, weight: torch.Tensor, *, config: WgmmaConfig | None = None) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed in parts of K: float32 [parts, B, N], whose sum it is. As `linear`."""
    config = config or _fitting("linear_parts", x, weight)
    out = torch.empty((config.split, x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    _launch(out, x, weight, PARTS, config)
    return out


def linear_gated(x: torch.Tensor, gate_up: torch.Tensor, *, config: WgmmaConfig | None = None) -> torch.Tensor:
    """silu(gate) * up of x times gate_up [2 * I, K] transposed, gate rows first: [B, I]. As `linear`."""
    if config is None and linear_tall.takes_tokens(len(x), gate_up):
        return linear_tall.linear_gated(x, gate_up)
    out = torch.empty((x.shape[0], gate_up.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(out, x, gate_up, GATING, config or _fitting("linear_gated", x, gate_up))
    return out


def takes_rotation(num_tokens: int, qkv: torch.Tensor, cos_sin: torch.Tensor, kv_layer: torch.Tensor) -> bool:
    """Whether `linear_rotated` takes num_tokens rows, and is better than a product and `rope_and_cache`."""
    head_dim = kv_layer.shape[4]
    fits = head_dim % _TILE_OF_HEADS == 0 and cos_sin.shape[1] == head_dim and kv_layer.dtype == qkv.dtype
    return fits and takes_tokens(num_tokens, qkv, by="linear_rotated")


def linear_rotated(
    x: torch.Tensor,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    settled: bool = False,
    config: WgmmaConfig | None = None,
) -> torch.Tensor:
    """As the twin; `settled` as in `rope_and_cache`, config as in `linear`.

    Raises ValueError, TypeError, KernelError.
    """
    num_tokens, num_kv_heads, head_dim = len(x), kv_layer.shape[2], kv_layer.shape[4]
    query_heads = len(qkv) // head_dim - 2 * num_kv_heads
    if len(qkv) % head_dim or query_heads < 1 or head_dim % _TILE_OF_HEADS or cos_sin.shape[1:] != (head_dim,):
        raise ValueError(f"qkv {tuple(qkv.shape)}, cos_sin {tuple(cos_sin.shape)} do not fit heads of {head_dim}")
    if kv_layer.shape[0] * kv_layer.shape[3] >= 1 << 31:
        raise ValueError(f"{kv_layer.shape[0]} blocks of {kv_layer.shape[3]} tokens are more slots than 2^31")
    check_stored(kv_layer, x, slot_mapping)
    check_index("positions", positions, num_tokens, x.device)
    out = torch.empty((num_tokens, query_heads, head_dim), dtype=x.dtype, device=x.device)
    config = config or _fitting("linear_rotated", x, qkv)
    rotation = _Rotation(positions, cos_sin, kv_layer, slot_mapping, settled)
    _launch(out, x, qkv, ROTATING, config, rotation)
    return out


def _fitting(by: Product, x: torch.Tensor, weight: torch.Tensor) -> WgmmaConfig:
    """Raises ValueError where there is no way."""
    config = _config(by, x.shape[0], weight)
    if config is None:
        raise ValueError(f"{x.shape[0]} tokens times {tuple(weight.shape)} {weight.dtype}: not for this kernel")
    return config


@dataclass(frozen=True)
class _Rotation:
    """What `linear_rotated` does behind the product."""

    positions: torch.Tensor
    cos_sin: torch.Tensor
    kv_layer: torch.Tensor
    slot_mapping: torch.Tensor
    settled: bool

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.kv_layer.shape[4]

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with for it."""
        return {"HEAD_DIM": self.head_dim, "BLOCK_SIZE": self.kv_layer.shape[3]}

    def arguments(self, heads: int) -> tuple[int, ...]:
        """Of a launch, for a matrix of so many heads."""
        kv_heads = self.kv_layer.shape[2]
        return (
            self.kv_layer.data_ptr(),
            self.positions.data_ptr(),
            self.cos_sin.data_ptr(),
            self.slot_mapping.data_ptr(),
            heads - 2 * kv_heads,
            kv_heads,
            self.kv_layer.stride(0),
            self.kv_layer.stride(1),
            int(self.settled),
        )


_NO_ROTATION = (0,) * 9


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epilogue: int,
    config: WgmmaConfig,
    rotation: _Rotation | None = None,
) -> None:
    check_factors(x, weight)
    device, dtype, width = x.device, x.dtype, x.shape[1]
    own_tokens = math.ceil(x.shape[0] / config.cluster / 8) * 8
    kernel = kernel_compile.kernel(
        "linear_wgmma.cu",
        "linear_wgmma",
        device,
        DTYPE=kernel_compile.CUDA_NAMES[dtype],
        K=width,
        EPILOGUE=epilogue,
        **config.defines,
        **(rotation.defines if rotation else {}),
    )
    rows = len(weight)
    if rotation is None:
        weight_map = _weight_map(device, weight.data_ptr(), dtype, rows, width, epilogue, config.rows)
        arguments: tuple[int, ...] = _NO_ROTATION
    else:
        heads = rows // rotation.head_dim
        weight_map = _head_map(device, weight.data_ptr(), dtype, heads, rotation.head_dim, width)
        arguments = rotation.arguments(heads)
    kernel(
        (config.ctas, 1, 1),
        config.threads,
        config.shared_bytes,
        out.data_ptr(),
        weight_map,
        token_map(device, x.data_ptr(), dtype, x.shape[0], width, (_CHUNK, own_tokens)),
        x.shape[0],
        own_tokens,
        rows // 2 if epilogue == GATING else rows,
        *arguments,
    )


@functools.lru_cache(maxsize=4096)
def _weight_map(
    device: torch.device, address: int, dtype: torch.dtype, rows: int, width: int, epilogue: int, tile_rows: int
) -> bytes:
    """Of a matrix in sixteens of rows: with GATING eight of the first half and eight of the second."""
    row = width * 2
    strides = (row, rows // 2 * row, 8 * row) if epilogue == GATING else (row, 8 * row, 16 * row)
    view = TensorMap(address, dtype, (width, 8, 2, rows // 16), strides, (_CHUNK, 8, 2, tile_rows // 16))
    return kernel_compile.tensor_map(device, view)


@functools.lru_cache(maxsize=4096)
def _head_map(device: torch.device, address: int, dtype: torch.dtype, heads: int, head_dim: int, width: int) -> bytes:
    """Of heads in sixteens of rows: eight of the first half and eight of the second, which turn with them."""
    row = width * 2
    strides = (row, head_dim // 2 * row, 8 * row, head_dim * row)
    view = TensorMap(
        address, dtype, (width, 8, 2, head_dim // 16, heads), strides, (_CHUNK, 8, 2, _TILE_OF_HEADS // 16, 1)
    )
    return kernel_compile.tensor_map(device, view)
