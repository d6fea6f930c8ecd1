"""Norms, activation, rotary embedding, cache writes and block copies against their torch twins."""

from __future__ import annotations

import pytest
import torch

from kernels import activation, cache, norm, reference, swap
from tests.kernels.emulator import EmulatorBackend
from tests.kernels.tensors import rand

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32])


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to one rounding of the type."""
    tolerance = {BF16: 2**-7, FP16: 2**-10, FP32: 1e-5}[wanted.dtype]
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance / 16)


@DTYPES
@pytest.mark.parametrize("width", [64, 128, 4096, 1032])
def test_rms_norm_equals_its_twin(device: torch.device, dtype: torch.dtype, width: int) -> None:
    hidden, weight = rand(5, width, dtype=dtype, device=device), rand(width, dtype=dtype, device=device, seed=1)
    assert_close(norm.rms_norm(hidden, weight, 1e-5), reference.rms_norm(hidden, weight, 1e-5))


def test_rms_norm_takes_heads_that_are_a_slice_of_a_fused_projection(device: torch.device) -> None:
    fused, weight = rand(7, 6, 64, dtype=BF16, device=device), rand(64, dtype=BF16, device=device)
    heads = fused[:, 1:5]
    assert_close(norm.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("width", [128, 4096])
def test_add_rms_norm_equals_its_twin_and_writes_the_sum_over_the_residual(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    hidden, residual = (rand(3, width, dtype=dtype, device=device, seed=s) for s in (0, 1))
    weight = rand(width, dtype=dtype, device=device, seed=2)
    wanted, wanted_total = reference.add_rms_norm(hidden, residual, weight, 1e-5)
    out, total = norm.add_rms_norm(hidden, residual, weight, 1e-5)
    assert torch.equal(total, wanted_total)
    assert total.data_ptr() == residual.data_ptr()
    assert_close(out, wanted)


@DTYPES
@pytest.mark.parametrize("parts", [1, 3])
def test_add_rms_norm_adds_the_parts_of_a_product_without_rounding_before(
    device: torch.device, dtype: torch.dtype, parts: int
) -> None:
    hidden = rand(parts, 5, 4096, dtype=FP32, device=device)
    residual, weight = rand(5, 4096, dtype=dtype, device=device, seed=1), rand(4096, dtype=dtype, device=device, seed=2)
    wanted, wanted_total = reference.add_rms_norm(hidden, residual, weight, 1e-5)
    out, total = norm.add_rms_norm(hidden, residual, weight, 1e-5)
    assert torch.equal(total, wanted_total)
    assert_close(out, wanted)


@DTYPES
def test_silu_and_mul_equals_its_twin(device: torch.device, dtype: torch.dtype) -> None:
    gate_up = rand(3, 2 * 2056, dtype=dtype, device=device) * 4
    assert_close(activation.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


def test_gathered_rows_of_ids_outside_the_table_are_zero(device: torch.device) -> None:
    table = rand(10, 64, dtype=BF16, device=device)
    rows = activation.gather_rows(table, torch.tensor([3, -1, 9, 10], device=device))
    assert torch.equal(rows[[0, 2]], table[[3, 9]])
    assert not rows[[1, 3]].any()


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (80, 32), (96, 96), (64, 20)])
def test_rope_and_cache_equals_its_twin_and_leaves_other_slots_alone(
    device: torch.device, dtype: torch.dtype, interleaved: bool, head_dim: int, rotary_dim: int
) -> None:
    query, key, value = (rand(4, h, head_dim, dtype=dtype, device=device, seed=s) for s, h in enumerate((6, 2, 2)))
    positions = torch.tensor([0, 7, 31, 2], device=device)
    cos_sin = rand(32, rotary_dim, dtype=FP32, device=device, seed=3)
    slots = torch.tensor([5, 0, -1, 30], device=device)
    pools = [torch.full((4, 3, 2, 2, 8, head_dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    arguments = (query, key, value, positions, cos_sin)
    rotated = cache.rope_and_cache(*arguments, pools[0][:, 1], slots, interleaved=interleaved)
    wanted = reference.rope_and_cache(*arguments, pools[1][:, 1], slots, interleaved=interleaved)
    assert_close(rotated, wanted)
    assert torch.equal(pools[0].isnan(), pools[1].isnan())
    assert_close(pools[0].nan_to_num(), pools[1].nan_to_num())


def test_rope_alone_returns_rotated_queries_and_keys(device: torch.device) -> None:
    query, key = (rand(4, h, 64, dtype=BF16, device=device, seed=h) for h in (6, 2))
    positions, cos_sin = torch.arange(4, device=device), rand(8, 64, dtype=FP32, device=device)
    for actual, wanted in zip(
        cache.rope(query, key, positions, cos_sin), reference.rope(query, key, positions, cos_sin), strict=True
    ):
        assert_close(actual, wanted)


@DTYPES
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_write_kv_stores_slices_of_a_fused_projection_bit_by_bit(
    device: torch.device, dtype: torch.dtype, block_size: int
) -> None:
    fused = rand(5, 8, 64, dtype=dtype, device=device)
    key, value = fused[:, 4:6], fused[:, 6:8]
    slots = torch.tensor([3, 5 * block_size - 1, -1, 0, 2 * block_size], device=device)
    pools = [torch.zeros(5, 2, 2, 2, block_size, 64, dtype=dtype, device=device) for _ in range(2)]
    cache.write_kv(key, value, pools[0][:, 1], slots)
    reference.write_kv(key, value, pools[1][:, 1], slots)
    assert torch.equal(pools[0], pools[1])


@pytest.mark.parametrize("shape", [(2, 2, 2, 16, 8), (1, 2, 1, 1, 8), (4, 2, 3, 16, 40)])
def test_copied_blocks_are_bit_exact_and_others_untouched(device: torch.device, shape: tuple[int, ...]) -> None:
    pool = rand(9, *shape, dtype=BF16, device=device)
    wanted = pool.clone()
    sources, destinations = torch.tensor([0, 4, 0], device=device), torch.tensor([8, 1, 5], device=device)
    wanted[[8, 1, 5]] = wanted[[0, 4, 0]]
    cache.copy_blocks(pool, sources, destinations)
    assert torch.equal(pool, wanted)


def test_a_copy_of_no_blocks_launches_nothing(device: torch.device) -> None:
    pool = rand(2, 8, dtype=BF16, device=device)
    wanted = pool.clone()
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    cache.copy_blocks(pool, nothing, nothing)
    assert torch.equal(pool, wanted)


def test_swapped_blocks_go_in_runs_of_neighbours() -> None:
    assert list(swap.runs([3, 4, 5, 9, 1, 2], [7, 8, 9, 10, 3, 5])) == [(3, 7, 3), (9, 10, 1), (1, 3, 1), (2, 5, 1)]
    assert list(swap.runs([], [])) == []


@pytest.mark.parametrize("elements", [8, 64 * 1024])
def test_blocks_swapped_out_and_in_again_are_bit_exact(device: torch.device, elements: int) -> None:
    pool = rand(6, elements, dtype=BF16, device=device)
    arena = torch.zeros(6, elements, dtype=BF16, pin_memory=device.type == "cuda")
    wanted = pool.clone()
    out, into = torch.tensor([1, 2, 5]), torch.tensor([0, 1, 4])
    swap.swap_blocks(pool, arena, out, into)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(arena[[0, 1, 4]], wanted[[1, 2, 5]].cpu())
    pool.zero_()
    swap.swap_blocks(arena, pool, into, torch.tensor([3, 0, 2]))
    assert torch.equal(pool[[3, 0, 2]], wanted[[1, 2, 5]])
    assert not pool[[1, 4, 5]].any()


def test_what_the_small_kernels_cannot_take_is_refused_before_the_launch(emulator: EmulatorBackend) -> None:
    rows = torch.zeros(2, 8, dtype=BF16)
    with pytest.raises(TypeError, match="both be"):
        norm.rms_norm(rows, torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="multiple of 8"):
        norm.rms_norm(torch.zeros(2, 12, dtype=BF16), torch.zeros(12, dtype=BF16), 1e-5)
    with pytest.raises(ValueError, match="like hidden"):
        norm.add_rms_norm(rows, rows[:1], torch.zeros(8, dtype=BF16), 1e-5)
    with pytest.raises(ValueError, match="2 \\* I"):
        activation.silu_and_mul(torch.zeros(2, 9, dtype=BF16))
    with pytest.raises(ValueError, match="int64"):
        activation.gather_rows(rows, torch.zeros(2, dtype=torch.int32))
    heads = torch.zeros(2, 1, 8, dtype=BF16)
    with pytest.raises(ValueError, match="slot_mapping"):
        cache.write_kv(heads, heads, torch.zeros(4, 2, 1, 4, 8, dtype=BF16), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        cache.copy_blocks(torch.zeros(2, 3), torch.tensor([0]), torch.tensor([1]))
