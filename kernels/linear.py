"""Matrix products of a few tokens on CUDA devices: `csrc/linear_skinny.cu`. Twins: `kernels.reference.linear`.

A product of a few tokens is nothing but reading its weights. These kernels start reading before the kernel in front
of them has ended, and take the small operations around the product along.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kernels import compile as kernel_compile
from kernels.compile import TensorMap
from kernels.reference.linear import SQUARES_COLUMNS, Normed

MAX_TOKENS = 16
"""Most tokens of one launch."""
FEW_TOKENS = 8
"""Most tokens with which these kernels are faster than other products and the small kernels around them."""
WARPS = 8
"""Of a CTA."""
_CHUNK = 32
STORING, FLOATING, GATING, ADDING = range(4)
"""EPILOGUE of the source."""


@dataclass(frozen=True)
class SkinnyConfig:
    """The compiled shape of one product."""

    row_tiles: int
    """Groups of 16 rows of weights in a tile."""
    token_tiles: int
    """Groups of eight tokens."""
    stages: int
    """Of a warp's ring."""
    ctas: int = 2
    """CTAs of the grid for each multiprocessor; as many fit, also of two kernels in a row."""

    @property
    def rows(self) -> int:
        """Rows of weights in a tile."""
        return self.row_tiles * 16

    def shared_bytes(self, normed: bool) -> int:
        """Dynamic shared memory of a launch."""
        stage = (self.rows + self.token_tiles * 8 + normed) * _CHUNK * 2
        return WARPS * self.stages * stage + (self.token_tiles * 8 + WARPS + 1) * 4


def skinny_config(num_tokens: int) -> SkinnyConfig:
    """How to multiply num_tokens rows, 1 to MAX_TOKENS."""
    return SkinnyConfig(row_tiles=2, token_tiles=1 if num_tokens <= 8 else 2, stages=5 if num_tokens <= 8 else 4)


@dataclass(frozen=True)
class SkinnyWorkspace:
    """Scratch of products that follow one another on one stream."""

    partials: torch.Tensor
    """float32: what CTAs hold of tiles that they share."""
    arrivals: torch.Tensor
    """int32: how many have delivered; zero between launches."""


_MOST_TILES = 1 << 14
_MOST_VALUES = 1024
"""Of a tile: rows times tokens."""
_MOST_CTAS = 4
_workspaces: dict[torch.device, SkinnyWorkspace] = {}


def _workspace(device: torch.device) -> SkinnyWorkspace:
    if device not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise kernel_compile.KernelError("run a product of few tokens once before capturing a graph")
        slots = 2 * _MOST_CTAS * kernel_compile.limits(device).processors  # a CTA shares at most two tiles
        _workspaces[device] = SkinnyWorkspace(
            torch.empty(slots * _MOST_VALUES, dtype=torch.float32, device=device),
            torch.zeros(_MOST_TILES, dtype=torch.int32, device=device),
        )
    return _workspaces[device]


def forget_workspaces() -> None:
    """Drops the scratch memory; captured graphs that use it must be gone."""
    _workspaces.clear()


def takes_few_tokens(num_tokens: int, *weights: torch.Tensor) -> bool:
    """Whether these kernels are the better way to multiply num_tokens rows by each of these [N, K] matrices."""
    return num_tokens <= FEW_TOKENS and all(_fits(num_tokens, weight) for weight in weights)


def _fits(num_tokens: int, weight: torch.Tensor) -> bool:
    rows, width = weight.shape
    if not is_multiplied(weight) or width % _CHUNK:
        return False
    if not 1 <= num_tokens <= MAX_TOKENS:
        return False
    config = skinny_config(num_tokens)
    return (
        rows % config.rows == 0
        and rows // config.rows <= _MOST_TILES
        and config.shared_bytes(True) <= kernel_compile.limits(weight.device).shared_bytes
    )


def linear(x: torch.Tensor | Normed, weight: torch.Tensor, *, floating: bool = False) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype, or float32 if `floating`, without a rounding.

    Raises ValueError, TypeError, KernelError.
    """
    hidden = x.hidden if isinstance(x, Normed) else x
    dtype = torch.float32 if floating else hidden.dtype
    out = torch.empty((hidden.shape[0], weight.shape[0]), dtype=dtype, device=hidden.device)
    _launch(out, x, weight, None, FLOATING if floating else STORING)
    return out


def linear_gated(x: torch.Tensor | Normed, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x times gate_up [2 * I, K] transposed, gate rows first: [B, I]. Raises as `linear`."""
    hidden = x.hidden if isinstance(x, Normed) else x
    out = torch.empty((hidden.shape[0], gate_up.shape[0] // 2), dtype=hidden.dtype, device=hidden.device)
    _launch(out, x, gate_up, None, GATING)
    return out


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Adds x times weight [N, K] transposed to residual [B, N], in place. Raises as `linear`.

    Returns float32 [B, N / 16]: sums of the new residual's squares by 16 columns.
    """
    squares = torch.empty((x.shape[0], weight.shape[0] // SQUARES_COLUMNS), dtype=torch.float32, device=x.device)
    if residual.shape != (x.shape[0], weight.shape[0]) or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(f"residual must be contiguous [B, N]: {tuple(residual.shape)} {residual.dtype}")
    _launch(residual, x, weight, squares, ADDING)
    return squares


def is_multiplied(weight: torch.Tensor) -> bool:
    """Whether a matrix is of a type that tensor cores multiply here, and lies in one piece."""
    return weight.dtype in (torch.bfloat16, torch.float16) and weight.is_contiguous()


def check_factors(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless x [B, K] and weight [N, K] fit each other and 16-byte pieces."""
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x and weight must be of one dtype on one device: {x.dtype}, {weight.dtype}")
    if x.dim() != 2 or not x.is_contiguous() or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError("x and weight must be aligned to 16 bytes")


@functools.lru_cache(maxsize=4096)
def token_map(
    device: torch.device, address: int, dtype: torch.dtype, tokens: int, width: int, box: tuple[int, int]
) -> bytes:
    """Of a [tokens, width] matrix of a half-precision type in boxes of (elements, tokens). Raises KernelError."""
    return kernel_compile.tensor_map(device, TensorMap(address, dtype, (width, tokens), (width * 2,), box))


def _launch(
    out: torch.Tensor, x: torch.Tensor | Normed, weight: torch.Tensor, squares_out: torch.Tensor | None, epilogue: int
) -> None:
    hidden = x.hidden if isinstance(x, Normed) else x
    check_factors(hidden, weight)
    num_tokens, width = hidden.shape
    if not _fits(num_tokens, weight):
        raise ValueError(f"{num_tokens} tokens times {tuple(weight.shape)} {weight.dtype}: not for these kernels")
    config = skinny_config(num_tokens)
    squares = norm_weight = 0
    eps = 0.0
    if isinstance(x, Normed):
        if x.squares.shape != (num_tokens, width // SQUARES_COLUMNS) or x.squares.dtype != torch.float32:
            raise ValueError(f"squares must be float32 [B, K / 16]: {tuple(x.squares.shape)} {x.squares.dtype}")
        if x.weight.shape != (width,) or x.weight.dtype != hidden.dtype or not x.squares.is_contiguous():
            raise ValueError(f"the norm's weight must be [K] of x's dtype: {tuple(x.weight.shape)} {x.weight.dtype}")
        squares, norm_weight, eps = x.squares.data_ptr(), x.weight.data_ptr(), x.eps
    device = hidden.device
    kernel = kernel_compile.kernel(
        "linear_skinny.cu",
        "linear_skinny",
        device,
        DTYPE=kernel_compile.CUDA_NAMES[hidden.dtype],
        K=width,
        ROW_TILES=config.row_tiles,
        TOKEN_TILES=config.token_tiles,
        WARPS=WARPS,
        STAGES=config.stages,
        MIN_CTAS=config.ctas,
        NORMED=int(isinstance(x, Normed)),
        EPILOGUE=epilogue,
    )
    rows = weight.shape[0] // 2 if epilogue == GATING else weight.shape[0]
    workspace = _workspace(device)
    kernel(
        (kernel_compile.limits(device).processors * config.ctas, 1, 1),
        WARPS * 32,
        config.shared_bytes(isinstance(x, Normed)),
        out.data_ptr(),
        hidden.data_ptr(),
        weight.data_ptr(),
        norm_weight,
        squares,
        0 if squares_out is None else squares_out.data_ptr(),
        workspace.partials.data_ptr(),
        workspace.arrivals.data_ptr(),
        num_tokens,
        rows,
        eps,
    )
