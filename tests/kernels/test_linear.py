"""Products of a few tokens against their torch twins, computed from the same rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import linear, reference

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _workspaces() -> Iterator[None]:
    linear.forget_workspaces()
    yield
    linear.forget_workspaces()


def rand(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> None:
    """Up to one rounding of the type, for sums of about unit size; more where the twin rounds in other places."""
    error = (actual.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < roundings * {BF16: 3e-3, FP16: 4e-4, torch.float32: 1e-5}[wanted.dtype]
    assert torch.isfinite(actual).all()


def normed(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> reference.Normed:
    hidden = rand(tokens, width, dtype=dtype, device=device, seed=5) * 2
    squares = hidden.float().square().unflatten(1, (-1, 16)).sum(-1)
    weight = rand(width, dtype=dtype, device=device, seed=6)
    return reference.Normed(hidden, squares, weight, 1e-5)


# (tokens, rows, width): tiles that one CTA has whole, that CTAs share, one and two groups of tokens.
SHAPES = [(1, 64, 512), (8, 192, 1024), (3, 64, 4096), (13, 128, 2048), (16, 64, 1024), (9, 320, 96)]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES)
def test_a_product_of_a_few_tokens_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    weight = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    assert linear.takes_few_tokens(tokens, weight) is (tokens <= 8)
    assert_close(linear.linear(x, weight), reference.linear(x, weight))
    assert_close(linear.linear(x, weight, floating=True), reference.linear(x, weight, floating=True))


@pytest.mark.parametrize(("tokens", "rows", "width"), SHAPES[:5])
def test_a_product_normalises_its_tokens_on_the_way_in(
    device: torch.device, tokens: int, rows: int, width: int
) -> None:
    x = normed(tokens, width, BF16, device)
    weight = rand(rows, width, dtype=BF16, device=device, seed=2) * width**-0.5
    assert_close(linear.linear(x, weight), reference.linear(x, weight), roundings=2)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(5, 96, 512), (16, 32, 2048), (9, 80, 1024)])
def test_a_gated_product_equals_its_twin(device: torch.device, tokens: int, rows: int, width: int) -> None:
    x = normed(tokens, width, BF16, device)
    gate_up = rand(2 * rows, width, dtype=BF16, device=device, seed=2) * width**-0.5
    assert_close(linear.linear_gated(x, gate_up), reference.linear_gated(x, gate_up), roundings=2)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 1024, 256), (7, 64, 4096), (16, 128, 1024), (11, 96, 1024)])
def test_a_product_is_added_to_the_residual_stream_and_leaves_its_squares(
    device: torch.device, tokens: int, rows: int, width: int
) -> None:
    x = rand(tokens, width, dtype=BF16, device=device, seed=1)
    weight = rand(rows, width, dtype=BF16, device=device, seed=2) * width**-0.5
    residual = rand(tokens, rows, dtype=BF16, device=device, seed=3)
    wanted = residual.clone()
    reference.linear_add(x, weight, wanted)
    squares = linear.linear_add(x, weight, residual)
    assert_close(residual, wanted)
    torch.testing.assert_close(squares, residual.float().square().unflatten(1, (-1, 16)).sum(-1))


def test_products_in_a_row_leave_nothing_behind_for_the_next(device: torch.device) -> None:
    x = rand(8, 4096, dtype=BF16, device=device, seed=1)
    weight = rand(192, 4096, dtype=BF16, device=device, seed=2) * 4096**-0.5
    outs = [linear.linear(x, weight) for _ in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_other_shapes_are_left_to_the_library(device: torch.device) -> None:
    def weight(rows: int, width: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device)

    assert not linear.takes_few_tokens(9, weight(64, 512))
    assert not linear.takes_few_tokens(1, weight(64, 80))
    assert not linear.takes_few_tokens(1, weight(48, 512))
    assert not linear.takes_few_tokens(1, weight(64, 512, torch.float32))
    with pytest.raises(ValueError, match="not for these kernels"):
        linear.linear(torch.zeros(1, 80, dtype=BF16, device=device), weight(64, 80))
