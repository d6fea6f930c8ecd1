"""Products of some tokens by wgmma against their torch twins, computed from the same rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import linear_wgmma, reference
from kernels.linear_wgmma import WgmmaConfig
from tests.kernels.test_linear import BF16, FP16, assert_close, rand


@pytest.fixture(autouse=True)
def _workspaces() -> Iterator[None]:
    linear_wgmma.forget_workspaces()
    yield
    linear_wgmma.forget_workspaces()


@pytest.fixture(autouse=True)
def _needs_wgmma(device: torch.device) -> None:
    if not kernel_compile.limits(device).wgmma:
        pytest.skip("needs compute capability 9.0")


# (tokens, rows, width, shape): part of a group of tokens and two groups, a tile of one CTA and one of several.
CASES = [
    (17, 128, 384, WgmmaConfig(64, 1, 1, 4)),
    (64, 96, 448, WgmmaConfig(96, 1, 1, 5)),
    (100, 128, 512, WgmmaConfig(128, 2, 2, 4)),
    (128, 192, 768, WgmmaConfig(192, 2, 3, 4)),
    (9, 256, 832, WgmmaConfig(256, 1, 2, 4)),
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "rows", "width", "config"), CASES)
def test_a_product_of_some_tokens_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    weight = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    assert_close(linear_wgmma.linear(x, weight, config), reference.linear(x, weight))


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (33, 192, 320, WgmmaConfig(64, 1, 1, 4)),
        (70, 448, 320, WgmmaConfig(224, 2, 1, 4)),
        (70, 128, 576, WgmmaConfig(128, 2, 2, 4)),
    ],
)
def test_a_gated_product_of_some_tokens_equals_its_twin(
    device: torch.device, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=BF16, device=device, seed=1)
    gate_up = rand(rows, width, dtype=BF16, device=device, seed=2) * width**-0.5
    gate, up = (x.float() @ gate_up.float().T).chunk(2, dim=1)
    assert_close(linear_wgmma.linear_gated(x, gate_up, config), (torch.nn.functional.silu(gate) * up).to(BF16))


def test_products_that_share_tiles_leave_nothing_behind_for_the_next(device: torch.device) -> None:
    x = rand(40, 1024, dtype=BF16, device=device, seed=1)
    weight = rand(128, 1024, dtype=BF16, device=device, seed=2) * 1024**-0.5
    outs = [linear_wgmma.linear(x, weight, WgmmaConfig(128, 1, 4, 4)) for _ in range(4)]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("tokens", [16, 64, 65, 128])
@pytest.mark.parametrize(("rows", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_the_products_of_a_large_model_fill_an_h100(tokens: int, rows: int, width: int) -> None:
    limits = kernel_compile.DeviceLimits(132, 227 * 1024, 228 * 1024, wgmma=True)
    config = linear_wgmma.wgmma_config(tokens, rows, width, limits)
    assert config is not None
    assert config.shared_bytes <= limits.shared_bytes
    ctas = rows // config.features * config.split
    assert ctas / (-(-ctas // 132) * 132) >= 0.9


def test_other_products_are_left_to_the_library(device: torch.device) -> None:
    weight = torch.empty(64, 512, dtype=BF16, device=device)
    assert linear_wgmma.takes_some_tokens(128, weight)
    assert not linear_wgmma.takes_some_tokens(129, weight)
    assert not linear_wgmma.takes_some_tokens(8, torch.empty(64, 520, dtype=BF16, device=device))
    assert not linear_wgmma.takes_some_tokens(8, torch.empty(72, 512, dtype=BF16, device=device))
    assert not linear_wgmma.takes_some_tokens(8, weight.float())
    with pytest.raises(ValueError, match="not for this kernel"):
        linear_wgmma.linear(torch.zeros(129, 512, dtype=BF16, device=device), weight)
