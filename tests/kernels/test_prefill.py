"""paged_attention_prefill against attention in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import attention
from kernels import compile as kernel_compile
from tests.kernels.attention_cases import Case, expected, make_case, relative_error
from tests.kernels.emulator import EmulatorBackend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 5e-3, FP16: 1e-3, FP32: 2e-6}


@pytest.fixture(autouse=True, params=[False, True], ids=["", "specialised"])
def _specialised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with and without the kernel of specialised warpgroups."""
    monkeypatch.setattr(attention, "SPECIALISED_PREFILL", request.param)


def prefill(case: Case, sliding_window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
    return attention.paged_attention_prefill(
        case.query,
        case.kv_layer,
        case.block_tables,
        case.context_lens,
        case.query_start,
        case.scale,
        sliding_window,
        soft_cap,
    )


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "block_size"),
    [
        (BF16, 8, 2, 128, 16),
        (FP16, 4, 1, 128, 32),
        (BF16, 4, 2, 64, 4),
        (BF16, 2, 2, 64, 1),
        (BF16, 3, 1, 80, 16),
        (BF16, 4, 2, 96, 256),
        (BF16, 8, 2, 128, 8),
        (FP16, 4, 2, 64, 256),
        (BF16, 4, 1, 256, 16),
        (FP32, 4, 2, 64, 16),
    ],
)
def test_prefill_equals_causal_attention_in_float64_for_whole_prompts_and_chunks(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    case = make_case(
        [150, 1, 90, 64],
        new_lens=[150, 1, 33, 2],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
    assert relative_error(prefill(case), expected(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("sliding_window", "soft_cap"), [(20, None), (1, None), (None, 5.0), (70, 5.0)])
@pytest.mark.parametrize(("dtype", "block_size"), [(BF16, 16), (BF16, 8), (FP32, 16)])
def test_a_sliding_window_hides_what_lies_before_it_and_a_soft_cap_bounds_scores(
    device: torch.device, dtype: torch.dtype, block_size: int, sliding_window: int | None, soft_cap: float | None
) -> None:
    case = make_case([200, 75], new_lens=[120, 75], block_size=block_size, dtype=dtype, device=device)
    error = relative_error(prefill(case, sliding_window, soft_cap), expected(case, sliding_window, soft_cap))
    assert error < TOLERANCE[dtype]


def test_chunks_of_no_tokens_are_skipped(device: torch.device) -> None:
    case = make_case([30, 40, 0, 20], new_lens=[10, 0, 0, 20], device=device)
    assert relative_error(prefill(case), expected(case)) < TOLERANCE[BF16]


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_before_the_first_chunk_and_behind_the_last_stay_what_they_are(
    device: torch.device, dtype: torch.dtype
) -> None:
    case = make_case([30, 40, 20], new_lens=[10, 0, 20], dtype=dtype, device=device)
    query = torch.cat(
        (case.query.new_full((7, 4, 64), torch.nan), case.query, case.query.new_full((2, 4, 64), torch.nan))
    )
    out = torch.full_like(query, 3)
    attention.paged_attention_prefill(
        query, case.kv_layer, case.block_tables, case.context_lens, case.query_start + 7, case.scale, out=out
    )
    assert relative_error(out[7:-2], expected(case)) < TOLERANCE[dtype]
    assert (out[:7] == 3).all()
    assert (out[-2:] == 3).all()


def test_more_sequences_than_a_block_has_threads_find_their_tiles(device: torch.device) -> None:
    lengths = [1 + i % 5 for i in range(300)]
    case = make_case(lengths, new_lens=lengths, heads=1, kv_heads=1, device=device)
    assert relative_error(prefill(case), expected(case)) < TOLERANCE[BF16]


def without_wgmma(emulator: EmulatorBackend) -> None:
    emulator.wgmma = False
    kernel_compile.register_backend("cpu", emulator)  # forgets what it was asked before


@pytest.mark.parametrize(
    ("head_dim", "sliding_window", "soft_cap"), [(64, None, None), (128, 70, None), (128, None, 5.0)]
)
def test_gpus_before_hopper_take_products_of_single_warps(
    emulator: EmulatorBackend, head_dim: int, sliding_window: int | None, soft_cap: float | None
) -> None:
    without_wgmma(emulator)
    limits = kernel_compile.limits(torch.device("cpu"))
    assert attention.hopper_config(head_dim, 16, limits) is None
    assert not attention.prefill_config(head_dim, limits).wgmma
    case = make_case([150, 1, 90], new_lens=[150, 1, 33], heads=4, kv_heads=2, head_dim=head_dim)
    assert relative_error(prefill(case, sliding_window, soft_cap), expected(case, sliding_window, soft_cap)) < 5e-3


def test_reads_of_queries_keys_and_values_have_no_bank_conflicts(emulator: EmulatorBackend) -> None:
    without_wgmma(emulator)
    for head_dim in (64, 80, 96, 128, 256):
        prefill(make_case([20], new_lens=[20], head_dim=head_dim))
    assert emulator.bank_conflicts() == 0


@pytest.mark.parametrize("change", [{}, {"stages": 3}, {"ping_pong": False, "stages": 4}], ids=str)
def test_a_long_context_goes_several_times_around_the_ring(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = attention.hopper_config(64, 16, kernel_compile.limits(device))
    if config is None:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(attention, "hopper_config", lambda *_: replace(config, **change))
    case = make_case([1000, 700], new_lens=[40, 3], heads=4, kv_heads=1, device=device)
    for sliding_window in (None, 300):
        assert relative_error(prefill(case, sliding_window), expected(case, sliding_window)) < TOLERANCE[BF16]


def test_query_start_must_have_one_entry_more_than_sequences(emulator: EmulatorBackend) -> None:
    case = make_case([20, 20], new_lens=[20, 20])
    with pytest.raises(ValueError, match="query_start"):
        attention.paged_attention_prefill(
            case.query, case.kv_layer, case.block_tables, case.context_lens, case.query_start[:2], case.scale
        )
