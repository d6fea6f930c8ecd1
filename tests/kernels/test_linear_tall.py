"""Gate and up projection in tall tiles against its torch twin, computed from the same rounded inputs."""

from __future__ import annotations

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import linear_tall, linear_wgmma, reference
from kernels.compile import DeviceLimits
from kernels.linear_tall import TallConfig
from tests.kernels.tensors import BF16, FP16, assert_close, rand

H100 = DeviceLimits(132, 227 * 1024, 228 * 1024, wgmma=True)


@pytest.fixture(autouse=True)
def _needs_wgmma(request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and not kernel_compile.limits(request.getfixturevalue("device")).wgmma:
        pytest.skip("needs compute capability 9.0")


NARROW = TallConfig(2, 1, 1, 4, 1, rows=64)

# (tokens, rows, width, config)
CASES = [
    (300, 448, 192, TallConfig(2)),  # two tiles of tokens, one of 44: the second warpgroup has none
    (450, 256, 192, TallConfig(4)),  # a tile of which 32 rows exist; a box that is partly outside
    (200, 448, 192, TallConfig(2, extra=1)),  # fewer chunks than stages
    (256, 896, 192, TallConfig(2, extra=1)),  # as many tokens as a tile has; rings go around
    (200, 384, 192, TallConfig(2, 3, 1, 4, rows=192)),
    (520, 384, 192, TallConfig(4, 2, 1, 4, 1, rows=96)),
    (660, 192, 192, NARROW),  # a group of eight tiles of tokens and one of three, which take turns
    (100, 256, 64, NARROW),  # a chunk for each of two tiles
]


@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "width", "config"),
    [(BF16, *case) for case in CASES] + [(FP16, *case) for case in CASES if case[-1] == NARROW],
)
def test_a_product_in_tall_tiles_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: TallConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    gate_up = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    gate, up = (x.float() @ gate_up.float().T).chunk(2, dim=1)
    assert_close(linear_tall.linear_gated(x, gate_up, config=config), (torch.nn.functional.silu(gate) * up).to(dtype))


def test_a_product_by_the_configuration_chosen_is_the_same_again_and_again(device: torch.device) -> None:
    x = rand(260, 192, dtype=BF16, device=device, seed=1)
    gate_up = rand(448, 192, dtype=BF16, device=device, seed=2) * 192**-0.5
    outs = [linear_tall.linear_gated(x, gate_up) for _ in range(3)]  # boxes land at other times on the emulator
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert_close(outs[0], reference.linear_gated(x, gate_up), roundings=2)


@pytest.mark.parametrize(
    ("tokens", "config"),
    [
        (192, TallConfig(128, 3, 1, 4)),
        (193, TallConfig(128, extra=1)),
        (256, TallConfig(128, extra=1)),
        (257, TallConfig(128, 3, 1, 4)),
        (385, TallConfig(128)),
        (512, TallConfig(128)),
        (576, TallConfig(128, 3, 1, 4)),
        (577, TallConfig(128)),
        (8192, TallConfig(128)),
    ],
)
def test_a_large_model_has_a_round_for_every_tile_of_tokens_on_an_h100(tokens: int, config: TallConfig) -> None:
    assert linear_tall.tall_config(tokens, 28672, 4096, H100) == config


def test_tiles_of_fewer_rows_are_for_models_of_which_they_leave_less_idle() -> None:
    assert linear_tall.tall_config(512, 24576, 4096, H100) == TallConfig(128, rows=192)
    assert linear_tall.tall_config(2048, 28672, 4096, H100) == TallConfig(
        128
    )  # 150 tiles in ten rounds instead of eight


@pytest.mark.parametrize("rows", [64, 640, 22016, 24576, 28672, 57344])
@pytest.mark.parametrize("tokens", [1, 256, 300, 513, 700, 4096])
def test_a_configuration_fits_and_leaves_nobody_a_round_without_need(tokens: int, rows: int) -> None:
    config = linear_tall.tall_config(tokens, rows, 4096, H100)
    assert config is not None
    assert config.shared_bytes <= H100.shared_bytes
    shares = -(-rows // (2 * config.rows)) * -(-tokens // config.tokens)
    pairs = config.ctas // 2
    assert config.ctas % 2 == 0
    assert pairs <= min(66, shares)
    assert pairs - 1 < shares / -(-shares // pairs)  # with a pair less there would be another round


@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 512, 512), (300, 512, 520), (300, 512 + 16, 512)])
def test_what_tiles_cannot_hold_has_no_configuration(tokens: int, rows: int, width: int) -> None:
    assert linear_tall.tall_config(tokens, rows, width, H100) is None


def test_a_device_without_wgmma_or_a_pair_of_processors_has_no_configuration() -> None:
    assert linear_tall.tall_config(300, 28672, 4096, DeviceLimits(108, 163 * 1024, 164 * 1024)) is None
    assert linear_tall.tall_config(300, 28672, 4096, DeviceLimits(1, 227 * 1024, 228 * 1024, wgmma=True)) is None


def test_a_large_model_s_products_of_enough_tokens_are_taken_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_compile, "limits", lambda device: H100)

    def taken(tokens: int, weight: torch.Tensor) -> bool:
        return linear_tall.takes_tokens(tokens, weight)

    weight = torch.empty(28672, 4096, dtype=BF16, device="meta")
    assert [
        tokens for tokens in (128, 129, 192, 193, 256, 257, 272, 288, 384, 513, 700, 8192) if taken(tokens, weight)
    ] == [
        129,
        192,
        193,
        256,
        288,  # a box of 64 for one token or for sixteen more is too much for so few
        384,
        513,
        700,
        8192,
    ]
    assert taken(512, weight.half())
    assert not taken(512, weight.float())
    assert not taken(512, weight[:, :2048])
    assert not taken(512, weight[:16384])  # 172 tiles in two rounds of 132
    assert linear_wgmma.takes_tokens(700, weight, by="linear_gated")
    assert not linear_wgmma.takes_tokens(257, weight, by="linear_gated")


def test_what_tiles_cannot_hold_is_refused(device: torch.device) -> None:
    x, gate_up = (torch.zeros(rows, 72, dtype=BF16, device=device) for rows in (300, 64))
    with pytest.raises(ValueError, match="not for this kernel"):
        linear_tall.linear_gated(x, gate_up)
