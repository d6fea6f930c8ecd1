"""silu(gate) * up and row gathers on CUDA devices: `csrc/activation.cu`. Twin: `kernels.reference.layers`."""

from __future__ import annotations

import torch

from kernels import compile as kernel_compile

_THREADS = 256


def _kernel(name: str, tensor: torch.Tensor, width: int) -> tuple[kernel_compile.Kernel, int]:
    """(kernel, CTAs of a row). Raises ValueError or TypeError."""
    if tensor.dtype not in kernel_compile.CUDA_NAMES:
        raise TypeError(f"elements must be bfloat16, float16 or float32, not {tensor.dtype}")
    vector = 16 // tensor.element_size()
    if width % vector or tensor.data_ptr() % 16:
        raise ValueError(f"rows must be a multiple of {vector} elements and aligned to 16 bytes, not {width} elements")
    kernel = kernel_compile.kernel("activation.cu", name, tensor.device, DTYPE=kernel_compile.CUDA_NAMES[tensor.dtype])
    return kernel, -(-width // (vector * _THREADS))


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As the twin; gate_up is [T, 2 * I] with contiguous rows. Raises ValueError, TypeError, KernelError."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"gate_up must be [T, 2 * I] with contiguous rows: {tuple(gate_up.shape)}")
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    kernel, ctas = _kernel("silu_and_mul", gate_up, width)
    if gate_up.stride(0) % (16 // gate_up.element_size()):
        raise ValueError(f"rows must be aligned to 16 bytes: stride {gate_up.stride(0)}")
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    for first in range(0, rows, 65535):  # the grid's second dimension
        count = min(rows - first, 65535)
        kernel(
            (ctas, count, 1), _THREADS, 0,
            out[first:].data_ptr(), gate_up[first:].data_ptr(), width, gate_up.stride(0),
        )  # fmt: skip
    return out


def gather_rows(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`table[ids]` of contiguous [V, H] by int64 [T]; rows of ids outside the table are zero, never read.

    Raises ValueError, TypeError, KernelError.
    """
    if table.dim() != 2 or not table.is_contiguous() or ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"table must be contiguous [V, H] and ids int64 [T]: {tuple(table.shape)}, {ids.dtype}")
    if ids.device != table.device or not ids.is_contiguous():
        raise ValueError("ids must be contiguous and on the table's device")
    kernel, ctas = _kernel("gather_rows", table, table.shape[1])
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    for first in range(0, ids.shape[0], 65535):
        count = min(ids.shape[0] - first, 65535)
        kernel(
            (ctas, count, 1), _THREADS, 0,
            out[first:].data_ptr(), table.data_ptr(), ids[first:].data_ptr(), table.shape[1], table.shape[0],
        )  # fmt: skip
    return out
