"""Products of up to 256 tokens by wgmma against their torch twins, computed from the same rounded inputs."""

from __future__ import annotations

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import linear_wgmma, reference
from kernels.linear_wgmma import WgmmaConfig
from tests.kernels.test_linear import BF16, FP16, assert_close, rand

H100 = kernel_compile.DeviceLimits(132, 227 * 1024, 228 * 1024, wgmma=True)


@pytest.fixture(autouse=True)
def _needs_wgmma(request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and not kernel_compile.limits(request.getfixturevalue("device")).wgmma:
        pytest.skip("needs compute capability 9.0")


# (tokens, rows, width, config)
CASES = [
    (17, 128, 320, WgmmaConfig(64, 1, 2, 1)),  # a box that is partly outside; an odd number of chunks for two stages
    (64, 256, 448, WgmmaConfig(64, 2, 4, 2)),  # as many tokens as a tile has
    (1, 512, 192, WgmmaConfig(64, 4, 8, 4)),  # one CTA copies tokens for all four; fewer chunks than stages
    (96, 512, 192, WgmmaConfig(96, 2, 4, 2)),  # two tiles a CTA, the second across the ring's end
    (100, 512, 320, WgmmaConfig(128, 4, 3, 4)),
    (130, 384, 128, WgmmaConfig(192, 1, 3, 1)),  # three tiles a CTA, each shorter than the ring
    (256, 256, 256, WgmmaConfig(256, 2, 3, 2)),
    (40, 768, 256, WgmmaConfig(64, 2, 3, 4)),  # clusters of one tile a CTA and of two
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "rows", "width", "config"), CASES)
def test_a_product_of_many_tokens_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    weight = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    assert_close(linear_wgmma.linear(x, weight, config), reference.linear(x, weight))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (33, 512, 320, WgmmaConfig(64, 2, 2, 2)),
        (70, 512, 192, WgmmaConfig(96, 4, 4, 4)),
        (250, 384, 128, WgmmaConfig(256, 1, 3, 1)),
    ],
)
def test_a_gated_product_of_many_tokens_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    gate_up = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    gate, up = (x.float() @ gate_up.float().T).chunk(2, dim=1)
    assert_close(linear_wgmma.linear_gated(x, gate_up, config), (torch.nn.functional.silu(gate) * up).to(dtype))


def test_a_product_by_the_configuration_chosen_equals_its_twin_again_and_again(device: torch.device) -> None:
    x = rand(50, 320, dtype=BF16, device=device, seed=1)
    weight = rand(512, 320, dtype=BF16, device=device, seed=2) * 320**-0.5
    outs = [linear_wgmma.linear(x, weight) for _ in range(4)]  # boxes land at other times on the emulator
    assert_close(outs[0], reference.linear(x, weight))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (17, 28672, 4096, WgmmaConfig(64, 4, 8, 112)),
        (128, 6144, 4096, WgmmaConfig(128, 4, 7, 48)),
        (128, 128256, 4096, WgmmaConfig(128, 2, 7, 126)),
        (193, 28672, 4096, WgmmaConfig(256, 2, 4, 112)),
        (65, 640, 64, WgmmaConfig(96, 1, 8, 5)),
    ],
)
def test_the_products_of_a_large_model_are_shared_evenly_on_an_h100(
    tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    assert linear_wgmma.wgmma_config(tokens, rows, width, H100) == config


@pytest.mark.parametrize("tokens", [1, 64, 65, 96, 97, 128, 129, 192, 193, 256])
@pytest.mark.parametrize(
    ("rows", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (640, 64)]
)
def test_a_configuration_holds_all_tokens_fits_and_leaves_nobody_a_round_without_need(
    tokens: int, rows: int, width: int
) -> None:
    config = linear_wgmma.wgmma_config(tokens, rows, width, H100)
    assert config is not None
    tiles = rows // linear_wgmma.ROWS
    assert config.tokens >= tokens
    assert config.shared_bytes <= H100.shared_bytes
    assert config.stages >= 2
    assert config.tokens // config.cluster % 8 == 0
    assert tiles % config.cluster == config.ctas % config.cluster == 0
    assert config.ctas <= min(H100.processors, tiles)
    rounds = -(-tiles // config.ctas)
    assert tiles > (rounds - 1) * config.ctas
    assert config.ctas - config.cluster < tiles / rounds  # with a cluster less there would be another round


@pytest.mark.parametrize(
    ("tokens", "rows", "width"), [(0, 512, 512), (257, 512, 512), (8, 512, 520), (8, 512 + 64, 512)]
)
def test_what_a_tile_cannot_hold_has_no_configuration(tokens: int, rows: int, width: int) -> None:
    assert linear_wgmma.wgmma_config(tokens, rows, width, H100) is None


def test_a_device_without_wgmma_has_no_configuration() -> None:
    ampere = kernel_compile.DeviceLimits(108, 163 * 1024, 164 * 1024)
    assert linear_wgmma.wgmma_config(64, 4096, 4096, ampere) is None


def test_other_products_are_left_to_the_library(device: torch.device) -> None:
    processors = kernel_compile.limits(device).processors

    def weight(rows: int, width: int = 128, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device)

    enough = weight(processors * 128)
    assert linear_wgmma.takes_many_tokens(256, enough)
    assert linear_wgmma.takes_many_tokens(8, enough.half())
    assert not linear_wgmma.takes_many_tokens(257, enough)
    assert not linear_wgmma.takes_many_tokens(8, enough.float())
    assert not linear_wgmma.takes_many_tokens(8, weight(processors * 128, 256)[:, :128])
    assert not linear_wgmma.takes_many_tokens(8, weight(processors * 128, 136))
    assert not linear_wgmma.takes_many_tokens(8, weight(128))  # most of the device would be idle
    with pytest.raises(ValueError, match="not for this kernel"):
        linear_wgmma.linear(torch.zeros(257, 128, dtype=BF16, device=device), weight(128))
