"""Random tensors, and how close the results of products must be."""

from __future__ import annotations

import torch

BF16, FP16 = torch.bfloat16, torch.float16


def rand(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> None:
    """Up to one rounding of the type, for sums of about unit size; more where the twin rounds in other places."""
    error = (actual.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < roundings * {BF16: 3e-3, FP16: 4e-4, torch.float32: 1e-5}[wanted.dtype]
    assert torch.isfinite(actual).all()
