"""What matrix products share: which matrices tensor cores multiply here, checks, and tensor maps of tokens.

The products: `kernels.linear_wgmma` of up to 256 tokens, `kernels.linear_tall` of more.
"""

from __future__ import annotations

import functools

import torch

from kernels import compile as kernel_compile
from kernels.compile import TensorMap


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
