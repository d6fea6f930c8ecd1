from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.kv_layout import KvLayout
from kernels.reference import cache
from tests.kernels.paged import make_layer


def test_a_block_holds_all_layers_and_its_size_is_their_bytes() -> None:
    layout = KvLayout(num_layers=32, num_kv_heads=8, block_size=16, head_dim=128, dtype=torch.bfloat16)
    assert layout.pool_shape(7) == (7, 32, 2, 8, 16, 128)
    assert layout.block_bytes == 2 << 20
    assert [layout.blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_layer_view_is_the_pools_own_memory() -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, block_size=4, head_dim=8, dtype=torch.float32)
    pool = torch.zeros(layout.pool_shape(5))
    layout.layer_view(pool, 1)[4] = 1
    assert pool[4, 1].eq(1).all()
    assert pool.sum() == pool[4, 1].numel()


@pytest.mark.parametrize("block_size", [0, 3, 12, 512])
def test_block_sizes_are_powers_of_two_up_to_256(block_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        KvLayout(num_layers=1, num_kv_heads=1, block_size=block_size, head_dim=1, dtype=torch.float32)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_write_kv_fills_the_slots_of_its_tokens_and_nothing_else(block_size: int) -> None:
    paged = make_layer([19, 6], block_size=block_size)
    written = torch.full_like(paged.kv_layer, float("nan"))
    reference.write_kv(torch.cat(paged.keys), torch.cat(paged.values), written, torch.cat(paged.slots))
    torch.testing.assert_close(written, paged.kv_layer, equal_nan=True, atol=0, rtol=0)


def test_write_kv_skips_negative_slots() -> None:
    layer = torch.zeros(2, 2, 1, 4, 3)
    token = torch.ones(2, 1, 3)
    reference.write_kv(token, 2 * token, layer, torch.tensor([-1, 6]))
    expected = torch.zeros(2, 2, 1, 4, 3)
    expected[1, 0, 0, 2], expected[1, 1, 0, 2] = 1, 2
    assert layer.equal(expected)


def test_rope_and_cache_is_rope_then_write() -> None:
    query, key, value = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    positions, cos_sin = torch.tensor([3, 0, 7, 1, 2]), torch.randn(16, 8)
    slots = torch.tensor([0, 5, 9, 2, 11])
    fused, separate = torch.zeros(3, 2, 2, 4, 8), torch.zeros(3, 2, 2, 4, 8)
    rotated = reference.rope_and_cache(query, key, value, positions, cos_sin, fused, slots)
    expected_query, expected_key = reference.rope(query, key, positions, cos_sin)
    reference.write_kv(expected_key, value, separate, slots)
    assert rotated.equal(expected_query)
    assert fused.equal(separate)


def test_blocks_are_copied_whole_within_a_pool() -> None:
    pool = torch.arange(6.0).reshape(6, 1).expand(6, 10).contiguous()
    reference.copy_blocks(pool, torch.tensor([4, 0]), torch.tensor([1, 5]))
    assert pool[:, 0].tolist() == [0, 4, 2, 3, 4, 0]
    assert pool[:, 9].tolist() == [0, 4, 2, 3, 4, 0]


def test_swapping_in_pieces_moves_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PIECE_BYTES", 3 * 10 * 4)  # three blocks at a time
    pool, arena = torch.randn(20, 10), torch.zeros(15, 10)
    sources, places = torch.randperm(20)[:11], torch.randperm(15)[:11]
    reference.swap_blocks(pool, arena, sources, places)
    assert arena[places].equal(pool[sources])
    back = torch.zeros(20, 10)
    reference.swap_blocks(arena, back, places, sources)
    assert back[sources].equal(pool[sources])
    assert back.count_nonzero() == 11 * 10
