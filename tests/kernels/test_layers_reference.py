from __future__ import annotations

import math

import pytest
import torch

from kernels import reference


def test_rms_norm_equals_its_formula_in_float64() -> None:
    hidden, weight = torch.randn(7, 24), torch.randn(24)
    wide = hidden.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(reference.rms_norm(hidden, weight, 1e-5).double(), expected, atol=1e-6, rtol=1e-6)


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum() -> None:
    hidden, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, total = reference.add_rms_norm(hidden, residual, weight, 1e-6)
    assert total.equal(hidden + residual)
    assert normed.equal(reference.rms_norm(hidden + residual, weight, 1e-6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_each_pair_by_its_angle(interleaved: bool) -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    angles = torch.outer(torch.arange(50, dtype=torch.float64), frequencies)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).float()
    query, key, positions = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.tensor([0, 1, 17, 49])
    for heads, turned in zip((query, key), reference.rope(query, key, positions, cos_sin, interleaved=interleaved)):  # noqa: B905
        assert turned[..., 6:].equal(heads[..., 6:])
        for token, position in enumerate(positions.tolist()):
            for pair in range(3):
                first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
                angle = position * float(frequencies[pair])
                x, y = heads[token, 0, first].item(), heads[token, 0, second].item()
                assert turned[token, 0, first].item() == pytest.approx(
                    x * math.cos(angle) - y * math.sin(angle), abs=1e-5
                )
                assert turned[token, 0, second].item() == pytest.approx(
                    y * math.cos(angle) + x * math.sin(angle), abs=1e-5
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_mul_takes_the_gate_from_the_first_half(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 12).to(dtype)
    gate, up = gate_up[:, :6].double(), gate_up[:, 6:].double()
    expected = gate / (1 + (-gate).exp()) * up
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(reference.silu_and_mul(gate_up).double(), expected, atol=1e-6, rtol=tolerance)
