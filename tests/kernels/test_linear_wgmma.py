"""Products of up to 256 tokens by wgmma against their torch twins, computed from the same rounded inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import compile as kernel_compile
from kernels import linear, linear_wgmma, reference
from kernels.linear_wgmma import WgmmaConfig
from kernels.reference import Product
from tests.kernels.tensors import BF16, FP16, assert_close, rand

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
    (40, 320, 256, WgmmaConfig(64, 1, 3, 3, rows=64)),  # one warpgroup that computes
    (9, 384, 320, WgmmaConfig(64, 2, 4, 4, rows=64)),
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "rows", "width", "config"), CASES)
def test_a_product_by_boxes_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    weight = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    assert_close(linear_wgmma.linear(x, weight, config=config), reference.linear(x, weight))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (33, 512, 320, WgmmaConfig(64, 2, 2, 2)),
        (70, 512, 192, WgmmaConfig(96, 4, 4, 4)),
        (250, 384, 128, WgmmaConfig(256, 1, 3, 1)),
    ],
)
def test_a_gated_product_by_boxes_equals_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    gate_up = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    gate, up = (x.float() @ gate_up.float().T).chunk(2, dim=1)
    assert_close(linear_wgmma.linear_gated(x, gate_up, config=config), (torch.nn.functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (20, 128, 320, WgmmaConfig(64, 1, 2, 2, 2)),  # two and three chunks
        (65, 384, 448, WgmmaConfig(96, 1, 4, 2, 3)),  # shares of one tile by several CTAs, shares of several by one
        (128, 256, 192, WgmmaConfig(128, 2, 3, 4, 3)),  # a chunk each
        (40, 256, 320, WgmmaConfig(64, 2, 3, 4, 2, 64)),  # tiles of 64 rows, in pairs
        (200, 128, 192, WgmmaConfig(256, 1, 2, 4, 2, 64)),
    ],
)
def test_the_parts_of_a_product_add_up_to_its_twin(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    weight = rand(rows, width, dtype=dtype, device=device, seed=2) * width**-0.5
    parts = linear_wgmma.linear_parts(x, weight, config=config)
    assert parts.shape == (config.split, tokens, rows)
    bounds = [width // 64 * part // config.split * 64 for part in range(config.split + 1)]
    for part, begin, end in zip(parts, bounds, bounds[1:], strict=False):
        torch.testing.assert_close(part, x[:, begin:end].float() @ weight[:, begin:end].float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "head_dim", "block_size", "width", "config"),
    [
        (1, 128, 16, 320, WgmmaConfig(64, 1, 2, 8, rows=64)),
        (20, 64, 8, 192, WgmmaConfig(64, 1, 4, 3, rows=64)),  # several heads a CTA
        (90, 128, 16, 192, WgmmaConfig(96, 1, 3, 5, rows=64)),
        (100, 256, 32, 192, WgmmaConfig(128, 1, 3, 7, rows=64)),
        (150, 64, 16, 128, WgmmaConfig(192, 1, 2, 3, rows=64)),
    ],
)
def test_a_rotated_product_leaves_queries_keys_and_values_where_its_twin_does(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    head_dim: int,
    block_size: int,
    width: int,
    config: WgmmaConfig,
) -> None:
    query_heads, kv_heads, blocks = 4, 2, 160 // block_size + 1
    x = rand(tokens, width, dtype=dtype, device=device, seed=1)
    qkv = rand((query_heads + 2 * kv_heads) * head_dim, width, dtype=dtype, device=device, seed=2) * width**-0.5
    angles = torch.rand(300, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
    positions = torch.randint(0, 300, (tokens,), generator=torch.Generator().manual_seed(4)).to(device)
    slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(5))[:tokens].to(device)
    slots[tokens // 2] = -1 if tokens > 1 else slots[0]
    # A layer of a pool of several: blocks are not next to each other, and what is not written stays as it is.
    pools = [torch.full((blocks, 3, 2, kv_heads, block_size, head_dim), 7.0, dtype=dtype, device=device) for _ in "ab"]
    inputs = (x, qkv, positions, cos_sin)
    out = linear_wgmma.linear_rotated(*inputs, pools[0][:, 1], slots, config=config)
    wanted = reference.linear_rotated(*inputs, pools[1][:, 1], slots)
    assert_close(out, wanted, roundings=2)
    assert_close(pools[0], pools[1], roundings=2)
    untouched = pools[1] == 7.0
    assert torch.equal(pools[0][untouched], pools[1][untouched])


@pytest.mark.parametrize(
    ("tokens", "head_dim", "rotary_dim", "dtype", "taken"),
    [
        (1, 128, 128, BF16, True),
        (128, 64, 64, FP16, True),
        (129, 128, 128, BF16, False),  # the library's product is faster
        (8, 96, 96, BF16, False),  # a tile is a whole part of a head
        (8, 128, 64, BF16, False),  # a part of a head stays as it is
        (8, 128, 128, torch.float32, False),
    ],
)
def test_rotated_products_are_taken_where_all_of_a_head_turns_and_tokens_are_few(
    monkeypatch: pytest.MonkeyPatch, tokens: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, taken: bool
) -> None:
    monkeypatch.setattr(kernel_compile, "limits", lambda device: H100)
    qkv = torch.empty(48 * head_dim, 4096, dtype=dtype, device="meta")
    kv_layer = torch.empty(4, 2, 8, 16, head_dim, dtype=dtype, device="meta")
    cos_sin = torch.empty(100, rotary_dim, device="meta")
    assert linear_wgmma.takes_rotation(tokens, qkv, cos_sin, kv_layer) is taken


def test_a_rotated_product_refuses_what_does_not_fit(device: torch.device) -> None:
    x, qkv = rand(4, 64, dtype=BF16, device=device), rand(384, 64, dtype=BF16, device=device, seed=1)
    kv_layer = torch.zeros(4, 2, 1, 8, 64, dtype=BF16, device=device)
    index, cos_sin = torch.arange(4, device=device), torch.rand(32, 64, device=device)
    with pytest.raises(ValueError, match="do not fit heads of 64"):
        linear_wgmma.linear_rotated(x, qkv[:-1], index, cos_sin, kv_layer, index)
    with pytest.raises(ValueError, match="do not fit heads of 64"):
        linear_wgmma.linear_rotated(x, qkv, index, cos_sin[:, :32], kv_layer, index)
    with pytest.raises(ValueError, match="positions must be"):
        linear_wgmma.linear_rotated(x, qkv, index[:3], cos_sin, kv_layer, index)
    with pytest.raises(TypeError, match="kv_layer must be"):
        linear_wgmma.linear_rotated(x, qkv, index, cos_sin, kv_layer.half(), index)


@pytest.mark.parametrize("name", ["linear", "linear_parts", "linear_gated"])
def test_a_product_by_the_configuration_chosen_is_the_same_again_and_again(device: torch.device, name: Product) -> None:
    x = rand(50, 320, dtype=BF16, device=device, seed=1)
    weight = rand(512, 320, dtype=BF16, device=device, seed=2) * 320**-0.5
    outs = [getattr(linear_wgmma, name)(x, weight) for _ in range(4)]  # boxes land at other times on the emulator
    assert all(torch.equal(out, outs[0]) for out in outs)
    wanted = getattr(reference, name)(x, weight)
    if name == "linear_parts":
        outs[0], wanted = outs[0].sum(0), wanted.sum(0)
    assert_close(outs[0], wanted, roundings=2)


@pytest.mark.parametrize(
    ("tokens", "cluster", "own_tokens"),
    [(1, 1, 8), (8, 1, 8), (9, 1, 16), (64, 1, 64), (20, 2, 16), (8, 4, 8), (40, 4, 16), (64, 4, 16)],
)
def test_a_box_has_as_many_tokens_as_there_are_for_each_of_a_cluster_rounded_up_to_eights(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tokens: int, cluster: int, own_tokens: int
) -> None:
    boxes = []

    def token_map(*matrix_and_box: Any) -> bytes:
        boxes.append(matrix_and_box[-1])
        return linear.token_map(*matrix_and_box)

    monkeypatch.setattr(linear_wgmma, "token_map", token_map)
    x = rand(tokens, 128, dtype=BF16, device=device, seed=1)
    gate_up = rand(512, 128, dtype=BF16, device=device, seed=2) * 128**-0.5
    out = linear_wgmma.linear_gated(x, gate_up, config=WgmmaConfig(64, cluster, 2, cluster))
    assert boxes == [(64, own_tokens)]
    assert_close(out, reference.linear_gated(x, gate_up), roundings=2)


@pytest.mark.parametrize(
    ("by", "tokens", "rows", "width", "config"),
    [
        ("linear_gated", 1, 28672, 4096, WgmmaConfig(64, 4, 8, 112)),
        ("linear_gated", 17, 28672, 4096, WgmmaConfig(64, 4, 8, 112)),
        ("linear_gated", 193, 28672, 4096, WgmmaConfig(256, 2, 4, 112)),
        ("linear_gated", 128, 128256, 4096, WgmmaConfig(128, 2, 7, 126)),
        ("linear", 64, 6144, 4096, WgmmaConfig(64, 1, 14, 96, rows=64)),
        ("linear_parts", 32, 4096, 4096, WgmmaConfig(64, 2, 14, 128, 2, 64)),
        ("linear_parts", 64, 4096, 14336, WgmmaConfig(64, 2, 14, 128, 2, 64)),
        ("linear_parts", 65, 4096, 4096, WgmmaConfig(96, 1, 11, 128, 2, 64)),
        ("linear_parts", 256, 4096, 14336, WgmmaConfig(256, 1, 5, 128, 2, 64)),
        ("linear_parts", 128, 5120, 4096, WgmmaConfig(128, 1, 7, 120, 3)),  # 80 small tiles would be too few
        ("linear_parts", 128, 16384, 4096, WgmmaConfig(128, 1, 7, 128)),
        ("linear_parts", 16, 640, 128, WgmmaConfig(64, 2, 14, 20, 2, 64)),  # no more parts than chunks
    ],
)
def test_the_products_of_a_large_model_are_shared_evenly_on_an_h100(
    by: Product, tokens: int, rows: int, width: int, config: WgmmaConfig
) -> None:
    assert linear_wgmma.wgmma_config(by, tokens, rows, width, H100) == config


@pytest.mark.parametrize("by", ["linear", "linear_parts", "linear_gated"])
@pytest.mark.parametrize("tokens", [1, 64, 65, 96, 97, 128, 129, 192, 193, 256])
@pytest.mark.parametrize(
    ("rows", "width"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (640, 64)]
)
def test_a_configuration_holds_all_tokens_fits_and_leaves_nobody_a_round_without_need(
    by: Product, tokens: int, rows: int, width: int
) -> None:
    config = linear_wgmma.wgmma_config(by, tokens, rows, width, H100)
    assert config is not None
    tiles = rows // config.rows
    shares = tiles * config.split
    assert config.tokens >= tokens
    assert config.shared_bytes <= H100.shared_bytes
    assert config.stages >= 2
    assert config.split == 1 or by == "linear_parts"
    assert config.split <= width // 64
    assert config.tokens // config.cluster % 8 == 0
    assert tiles % config.cluster == config.ctas % config.cluster == 0
    assert config.ctas <= min(H100.processors, shares)
    rounds = -(-shares // config.ctas)
    assert config.ctas - config.cluster < shares / rounds  # with a cluster less there would be another round


@pytest.mark.parametrize(
    ("tokens", "rows", "width"), [(0, 512, 512), (257, 512, 512), (8, 512, 520), (8, 512 + 64, 512)]
)
def test_what_tiles_cannot_hold_has_no_configuration(tokens: int, rows: int, width: int) -> None:
    assert linear_wgmma.wgmma_config("linear_parts", tokens, rows, width, H100) is None


@pytest.mark.parametrize("by", ["linear", "linear_parts", "linear_gated"])
def test_a_device_without_wgmma_takes_no_product(monkeypatch: pytest.MonkeyPatch, by: Product) -> None:
    ampere = kernel_compile.DeviceLimits(108, 163 * 1024, 164 * 1024)
    assert linear_wgmma.wgmma_config(by, 64, 4096, 4096, ampere) is None
    monkeypatch.setattr(kernel_compile, "limits", lambda device: ampere)
    weight = torch.empty(28672, 4096, dtype=BF16, device="meta")
    assert not any(linear_wgmma.takes_tokens(tokens, weight, by=by) for tokens in (1, 8, 64, 256, 4096))


def test_other_products_are_left_to_the_library(device: torch.device) -> None:
    processors = kernel_compile.limits(device).processors

    def weight(rows: int, width: int = 128, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device)

    def taken(tokens: int, weight: torch.Tensor, by: Product = "linear_gated") -> bool:
        return linear_wgmma.takes_tokens(tokens, weight, by=by)

    enough = weight(processors * 128)
    assert taken(256, enough)
    assert taken(1, enough)
    assert taken(256, enough, "linear_parts")
    assert taken(1, enough, "linear_parts")
    assert taken(96, enough.half(), "linear")
    assert taken(1, enough.half(), "linear")
    assert not taken(257, enough, "linear_parts")
    assert not taken(97, enough, "linear")
    assert not taken(8, enough.float())
    assert not taken(8, weight(processors * 128, 256)[:, :128])
    assert not taken(8, weight(processors * 128, 136))
    assert not taken(8, weight(128))  # most of the device would be idle
    with pytest.raises(ValueError, match="not for this kernel"):
        linear_wgmma.linear_parts(torch.zeros(257, 128, dtype=BF16, device=device), weight(128))
