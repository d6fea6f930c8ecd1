"""RMSNorm on CUDA devices: `csrc/norm.cu`. Twins: `kernels.reference.layers`."""

from __future__ import annotations

import functools

import torch

from kernels import compile as kernel_compile

_MAX_WIDTH = 32 * 1024
_ROWS_OF_ONE_WARP = 1024
"""Up to this width one warp takes a row: no barrier, several rows a CTA."""


@functools.cache
def _shape(width: int, vector: int) -> tuple[int, int]:
    """(warps that share a row, rows of a CTA)."""
    if width <= _ROWS_OF_ONE_WARP:
        return 1, 4
    return min(32, -(-width // vector // 64)), 1  # about two 16-byte pieces a thread


def _kernel(
    name: str, hidden: torch.Tensor, weight: torch.Tensor, parts: int = 0
) -> tuple[kernel_compile.Kernel, int, int]:
    """(kernel, rows of a CTA, threads of a CTA). Raises ValueError or TypeError."""
    if hidden.dtype not in kernel_compile.CUDA_NAMES or weight.dtype != hidden.dtype:
        raise TypeError(f"hidden and weight must both be bfloat16, float16 or float32: {hidden.dtype}, {weight.dtype}")
    width, vector = hidden.shape[-1], 16 // hidden.element_size()
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [{width}], not {tuple(weight.shape)}")
    if width % vector or width > _MAX_WIDTH:
        raise ValueError(f"rows must be a multiple of {vector} elements, at most {_MAX_WIDTH}, not {width}")
    if hidden.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ValueError("hidden and weight must be aligned to 16 bytes")
    if hidden.device != weight.device:
        raise ValueError("hidden and weight must be on one device")
    row_warps, cta_rows = _shape(width, vector)
    kernel = kernel_compile.kernel(
        "norm.cu",
        name,
        hidden.device,
        DTYPE=kernel_compile.CUDA_NAMES[hidden.dtype],
        WIDTH=width,
        ROW_WARPS=row_warps,
        CTA_ROWS=cta_rows,
        PARTS=parts,
    )
    return kernel, cta_rows, cta_rows * row_warps * 32


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the twin. hidden is [..., H], contiguous, or [T, heads, H] with any stride between tokens (part of fused QKV).

    Returns a contiguous tensor. Raises ValueError, TypeError, KernelError.
    """
    kernel, cta_rows, threads = _kernel("rms_norm", hidden, weight)
    width = hidden.shape[-1]
    heads, token_stride = 1, width
    if not hidden.is_contiguous():
        if hidden.dim() not in (2, 3) or hidden.stride()[1:] != (width, 1)[3 - hidden.dim() :]:
            raise ValueError(f"hidden must be contiguous but for its first dimension: strides {hidden.stride()}")
        heads, token_stride = hidden.shape[1] if hidden.dim() == 3 else 1, hidden.stride(0)
        if token_stride % (16 // hidden.element_size()):
            raise ValueError(f"tokens must be aligned to 16 bytes: stride {token_stride}")
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    rows = hidden.numel() // width
    grid = (-(-rows // cta_rows), 1, 1)
    kernel(grid, threads, 0, out.data_ptr(), hidden.data_ptr(), weight.data_ptr(), rows, heads, token_stride, eps)
    return out


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin, but the sum is written over `residual`, which is returned as the second result.

    residual is contiguous [T, H]; hidden too, or float32 [parts, T, H], whose sum is added without a rounding before.
    Raises ValueError, TypeError, KernelError.
    """
    parts = hidden.shape[0] if hidden.dim() == 3 else 0
    kernel, cta_rows, threads = _kernel("add_rms_norm", residual, weight, parts)
    if hidden.dtype != (torch.float32 if parts else residual.dtype) or hidden.device != residual.device:
        raise TypeError(f"hidden must be like residual, or float32 parts: {hidden.dtype} {hidden.device}")
    if residual.dim() != 2 or hidden.shape != (parts, *residual.shape)[not parts :]:
        raise ValueError(f"residual must be like hidden: {tuple(hidden.shape)}, {tuple(residual.shape)}")
    if not (hidden.is_contiguous() and residual.is_contiguous()) or hidden.data_ptr() % (32 if parts else 16):
        raise ValueError("hidden and residual must be contiguous and aligned to 16 bytes, parts to 32")
    out = torch.empty_like(residual)
    rows = len(residual)
    grid = (-(-rows // cta_rows), 1, 1)
    kernel(
        grid, threads, 0,
        out.data_ptr(), residual.data_ptr(), hidden.data_ptr(), residual.data_ptr(), weight.data_ptr(), rows, eps,
    )  # fmt: skip
    return out, residual
