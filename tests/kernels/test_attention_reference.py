from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.reference import attention
from tests.kernels.paged import dense_attention, make_layer, scale_of

RAGGED = [1, 37, 2, 16, 17, 33, 5, 64]


def check_decode(
    lengths: list[int],
    block_size: int,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    window: int | None = None,
    cap: float | None = None,
    scale: float | None = None,
) -> None:
    paged = make_layer(lengths, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    query = torch.randn(len(lengths), num_heads, head_dim, generator=torch.Generator().manual_seed(1))
    scale = scale or scale_of(head_dim)
    actual = reference.paged_attention_decode(
        query, paged.kv_layer, paged.block_tables, paged.context_lens, scale, window, cap
    )
    for row in range(len(lengths)):
        expected = dense_attention(query[row : row + 1], paged.keys[row], paged.values[row], scale, window, cap)
        torch.testing.assert_close(actual[row : row + 1].double(), expected, atol=2e-6, rtol=2e-6)


def check_prefill(
    lengths: list[int],
    new_tokens: list[int],
    block_size: int,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    window: int | None = None,
    cap: float | None = None,
) -> None:
    paged = make_layer(lengths, block_size=block_size, num_kv_heads=num_kv_heads)
    starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0).tolist()], dtype=torch.int32)
    query = torch.randn(sum(new_tokens), num_heads, 8, generator=torch.Generator().manual_seed(2))
    actual = reference.paged_attention_prefill(
        query, paged.kv_layer, paged.block_tables, paged.context_lens, starts, scale_of(8), window, cap
    )
    for row, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        expected = dense_attention(query[start:end], paged.keys[row], paged.values[row], scale_of(8), window, cap)
        torch.testing.assert_close(actual[start:end].double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_decode_equals_dense_attention(block_size: int, window: int | None, cap: float | None) -> None:
    check_decode(RAGGED, block_size, window=window, cap=cap)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_decode_maps_query_heads_to_key_heads(num_heads: int, num_kv_heads: int) -> None:
    check_decode(RAGGED, 4, num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_decode_honours_any_scale_and_head_size() -> None:
    check_decode(RAGGED, 4, head_dim=20, scale=0.7)


def test_decode_in_groups_equals_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_GATHER_ELEMENTS", 1)  # one row per group
    check_decode(RAGGED, 4)
    monkeypatch.setattr(attention, "_GATHER_ELEMENTS", 32 * 40 * 3)
    check_decode(RAGGED, 4, window=5)


def test_a_rows_decode_does_not_depend_on_the_rows_beside_it() -> None:
    paged = make_layer(RAGGED, block_size=4)
    query = torch.randn(len(RAGGED), 4, 8)
    together = reference.paged_attention_decode(query, paged.kv_layer, paged.block_tables, paged.context_lens, 0.3)
    for row in range(len(RAGGED)):
        one = slice(row, row + 1)
        alone = reference.paged_attention_decode(
            query[one], paged.kv_layer, paged.block_tables[one], paged.context_lens[one], 0.3
        )
        torch.testing.assert_close(together[one], alone, atol=1e-6, rtol=1e-6)


def test_a_sequence_with_nan_in_its_cache_spoils_only_itself() -> None:
    paged = make_layer([9, 12, 30], block_size=4)
    paged.kv_layer[int(paged.block_tables[1, 0])] = float("nan")
    query = torch.randn(3, 4, 8)
    output = reference.paged_attention_decode(query, paged.kv_layer, paged.block_tables, paged.context_lens, 0.3)
    assert output.isnan().all(dim=2).all(dim=1).tolist() == [False, True, False]
    assert output[0].isfinite().all()
    assert output[2].isfinite().all()


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prefill_equals_dense_attention(block_size: int, window: int | None, cap: float | None) -> None:
    check_prefill([37, 5, 64, 17], [37, 1, 20, 16], block_size, window=window, cap=cap)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_prefill_maps_query_heads_to_key_heads(num_heads: int, num_kv_heads: int) -> None:
    check_prefill([20, 9], [20, 4], 4, num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_prefill_in_pieces_equals_prefill_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORE_ELEMENTS", 1)  # one query per piece
    check_prefill([37, 12], [30, 12], 4, window=9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_accumulate_in_float32(dtype: torch.dtype) -> None:
    paged = make_layer([700, 300], block_size=16, dtype=dtype)
    query = torch.randn(2, 4, 8).to(dtype)
    actual = reference.paged_attention_decode(query, paged.kv_layer, paged.block_tables, paged.context_lens, 0.3)
    assert actual.dtype == dtype
    for row in range(2):
        expected = dense_attention(query[row : row + 1], paged.keys[row], paged.values[row], 0.3)
        # Only the last rounding to the short type is left of it.
        torch.testing.assert_close(actual[row].double(), expected[0], atol=1e-4, rtol=2**-8)
