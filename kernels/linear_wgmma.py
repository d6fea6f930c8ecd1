"""Matrix products of up to 256 tokens on compute capability 9.0: `csrc/linear_wgmma.cu`.

Twins: `kernels.reference.linear`. For more tokens than `kernels.linear` takes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kernels import compile as kernel_compile
from kernels.compile import TensorMap
from kernels.linear import check_factors

TOKENS = (64, 96, 128, 192, 256)
"""Tokens that a tile may have."""
STORING, PARTS, GATING = range(3)
"""EPILOGUE of the source."""
MOST_PARTS = 4
"""Of a product by `linear_parts`; what adds them up has to read them all."""
ROWS = 128
"""Rows of weights in a tile."""
THREADS = 384
_CHUNK = 64
_FIXED_BYTES = 1024
"""Of shared memory: to begin at a swizzle atom."""
_MAX_STAGES = 8
_CLUSTERED_SHARE = 0.9
"""Of the multiprocessors; as many are certain to lie in whole clusters of four."""
_LEAST_SHARE = 0.75
"""Of the multiprocessors; with fewer busy the library is faster."""
_MOST_TOKENS = {"linear": 64, "linear_parts": 128, "linear_gated": 256}
"""With more the library is as fast (docs/kernels/linear.md)."""


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

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        return _FIXED_BYTES + self.stages * _stage_bytes(self.tokens)

    @property
    def defines(self) -> dict[str, int]:
        """What the source is compiled with for this shape."""
        return {"TOKENS": self.tokens, "CLUSTER": self.cluster, "STAGES": self.stages, "SPLIT": self.split}


def _stage_bytes(tokens: int) -> int:
    """Of shared memory: a stage and its barriers."""
    return (ROWS + tokens) * _CHUNK * 2 + 16


@functools.cache
def wgmma_config(
    num_tokens: int, rows: int, width: int, limits: kernel_compile.DeviceLimits, most_parts: int = 1
) -> WgmmaConfig | None:
    """How to multiply num_tokens rows by a [rows, width] matrix, in most_parts parts at most: every CTA takes equally
    many shares. None: not by this kernel."""
    tokens = next((tokens for tokens in TOKENS if tokens >= num_tokens), None)
    if not limits.wgmma or tokens is None or num_tokens < 1 or width % _CHUNK or rows % ROWS:
        return None
    stages = min(_MAX_STAGES, (limits.shared_bytes - _FIXED_BYTES) // _stage_bytes(tokens))
    best: WgmmaConfig | None = None
    for cluster in (4, 2, 1) if tokens < 256 else (2, 1):
        room = int(limits.processors * (_CLUSTERED_SHARE if cluster > 2 else 1)) // cluster
        if rows // ROWS % cluster or not room:
            continue
        for split in range(1, min(most_parts, width // _CHUNK) + 1):
            shares = rows // ROWS // cluster * split
            rounds = -(-shares // room)
            if split > 1 and rounds > 1:
                break
            ctas = -(-shares // rounds) * cluster
            if best is None or ctas > best.ctas:
                best = WgmmaConfig(tokens, cluster, stages, ctas, split)
    return best


def takes_many_tokens(num_tokens: int, weight: torch.Tensor, *, by: str) -> bool:
    """Whether the function of this name is the better way to multiply num_tokens rows by this [N, K] matrix."""
    if num_tokens > _MOST_TOKENS[by]:
        return False
    config = _config(num_tokens, weight, MOST_PARTS if by == "linear_parts" else 1)
    return config is not None and config.ctas >= _LEAST_SHARE * kernel_compile.limits(weight.device).processors


def _config(num_tokens: int, weight: torch.Tensor, most_parts: int = 1) -> WgmmaConfig | None:
    if weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous():
        return None
    rows, width = weight.shape
    return wgmma_config(num_tokens, rows, width, kernel_compile.limits(weight.device), most_parts)


def linear(x: torch.Tensor, weight: torch.Tensor, config: WgmmaConfig | None = None) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed: [B, N] of x's dtype.

    config: another than the one chosen, for measuring. Raises ValueError, TypeError, KernelError.
    """
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(out, x, weight, STORING, config)
    return out


def linear_parts(x: torch.Tensor, weight: torch.Tensor, config: WgmmaConfig | None = None) -> torch.Tensor:
    """x [B, K] times weight [N, K] transposed in parts of K: float32 [parts, B, N], whose sum it is. As `linear`."""
    config = config or _config(x.shape[0], weight, MOST_PARTS)
    parts = 1 if config is None else config.split
    out = torch.empty((parts, x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    _launch(out, x, weight, PARTS, config)
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
    device, dtype, width = x.device, x.dtype, x.shape[1]
    kernel = kernel_compile.kernel(
        "linear_wgmma.cu",
        "linear_wgmma",
        device,
        DTYPE=kernel_compile.CUDA_NAMES[dtype],
        K=width,
        EPILOGUE=epilogue,
        **config.defines,
    )
    kernel(
        (config.ctas, 1, 1),
        THREADS,
        config.shared_bytes,
        out.data_ptr(),
        _weight_map(device, weight.data_ptr(), dtype, weight.shape[0], width, epilogue),
        _token_map(device, x.data_ptr(), dtype, x.shape[0], width, config.tokens // config.cluster),
        x.shape[0],
        out.shape[-1],
    )


@functools.lru_cache(maxsize=4096)
def _weight_map(device: torch.device, address: int, dtype: torch.dtype, rows: int, width: int, epilogue: int) -> bytes:
    """Of a matrix in sixteens of rows: with GATING eight of the first half and eight of the second."""
    row = width * 2
    strides = (row, rows // 2 * row, 8 * row) if epilogue == GATING else (row, 8 * row, 16 * row)
    view = TensorMap(address, dtype, (width, 8, 2, rows // 16), strides, (_CHUNK, 8, 2, ROWS // 16))
    return kernel_compile.tensor_map(device, view)


@functools.lru_cache(maxsize=4096)
def _token_map(device: torch.device, address: int, dtype: torch.dtype, tokens: int, width: int, box: int) -> bytes:
    view = TensorMap(address, dtype, (width, tokens), (width * 2,), (_CHUNK, box))
    return kernel_compile.tensor_map(device, view)
