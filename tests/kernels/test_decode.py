"""paged_attention_decode against attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import attention, reference
from kernels import compile as kernel_compile
from tests.kernels.attention_cases import Case, expected, make_case, relative_error, share_prefix
from tests.kernels.emulator import EmulatorBackend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 5e-3, FP16: 1e-3, FP32: 2e-6}


def decode(
    case: Case,
    query_len: int = 1,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    shared: reference.SharedPrefix | None = None,
) -> torch.Tensor:
    query = case.query.unflatten(0, (-1, query_len))
    out = attention.paged_attention_decode(
        query[:, 0] if query_len == 1 else query,
        case.kv_layer,
        case.block_tables,
        case.context_lens,
        case.scale,
        sliding_window,
        soft_cap,
        shared=shared,
    )
    return out.reshape(case.query.shape)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "block_size"),
    [
        (BF16, 8, 2, 128, 16),
        (FP16, 8, 2, 128, 16),
        (BF16, 8, 2, 128, 4),
        (BF16, 4, 4, 64, 1),
        (BF16, 8, 2, 64, 64),
        (FP16, 16, 1, 64, 32),
        (BF16, 5, 1, 80, 16),
        (BF16, 4, 2, 96, 256),
        (BF16, 12, 1, 256, 8),
        (FP32, 4, 2, 64, 16),
        (FP32, 4, 2, 256, 2),
    ],
)
def test_decode_equals_attention_in_float64_over_ragged_random_block_tables(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    case = make_case(
        [1, 333, 16, 70, 129],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
    assert relative_error(decode(case), expected(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("sliding_window", "soft_cap"), [(50, None), (1, None), (None, 5.0), (33, 5.0), (1000, None)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_sliding_window_hides_what_lies_before_it_and_a_soft_cap_bounds_scores(
    device: torch.device, dtype: torch.dtype, sliding_window: int | None, soft_cap: float | None
) -> None:
    case = make_case([300, 50, 51, 7], dtype=dtype, device=device)
    error = relative_error(decode(case, 1, sliding_window, soft_cap), expected(case, sliding_window, soft_cap))
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize(("query_len", "heads", "kv_heads"), [(2, 4, 2), (5, 8, 2), (3, 3, 3)])
def test_several_query_tokens_of_a_sequence_see_up_to_themselves(
    device: torch.device, query_len: int, heads: int, kv_heads: int
) -> None:
    lengths = [query_len, 40, 130]
    case = make_case(lengths, new_lens=[query_len] * 3, heads=heads, kv_heads=kv_heads, device=device)
    assert relative_error(decode(case, query_len), expected(case)) < TOLERANCE[BF16]
    assert relative_error(decode(case, query_len, 20), expected(case, 20)) < TOLERANCE[BF16]


def test_rows_of_no_context_give_zeros_and_do_not_disturb_the_others(device: torch.device) -> None:
    case = make_case([0, 77, 0, 0, 20, 0], new_lens=[1] * 6, device=device)
    out = decode(case)
    assert not out[[0, 2, 3, 5]].any()
    assert relative_error(out, expected(case)) < TOLERANCE[BF16]


def test_a_second_launch_finds_the_workspace_as_the_first_did(device: torch.device) -> None:
    case = make_case([500, 90], device=device)
    workspace = attention.DecodeWorkspace.allocate(device)
    outs = [
        attention.paged_attention_decode(
            case.query, case.kv_layer, case.block_tables, case.context_lens, case.scale, workspace=workspace
        )
        for _ in range(3)
    ]
    assert not workspace.arrivals.any()
    assert relative_error(outs[0], expected(case)) < TOLERANCE[BF16]
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])


@pytest.mark.parametrize("num_processors", [1, 2, 5, 40])
def test_the_result_does_not_depend_on_how_many_processors_share_the_work(
    emulator: EmulatorBackend, num_processors: int
) -> None:
    emulator.num_processors = num_processors
    kernel_compile.limits.cache_clear()
    case = make_case([900, 3, 200], heads=4, kv_heads=1)
    assert relative_error(decode(case), expected(case)) < TOLERANCE[BF16]


def mixed(count: int) -> list[int]:
    """Lengths that are 0, short, and long enough to be cut."""
    return [(0, 5, 300, 16, 470, 17, 85, 700)[n % 8] for n in range(count)]


@pytest.mark.parametrize(
    ("num_processors", "lengths", "query_len", "heads", "kv_heads", "head_dim", "block_size", "window", "soft_cap"),
    [
        # Teams take short units whole and their share of long ones.
        *(
            (1, [85, 5, 0, 600, 256, 257, 16, 17, 85, 0, 90], *shape)
            for shape in (
                (1, 4, 2, 64, 16, None, None),
                (1, 8, 2, 128, 16, None, 20.0),
                (3, 8, 2, 128, 4, None, None),  # more queries than registers hold twice
                (5, 4, 2, 64, 32, 100, None),
                (1, 2, 2, 256, 16, None, None),
            )
        ),
        # Few units: teams of eight warps, and of four.
        (8, [700, 5, 300], 1, 4, 2, 64, 16, None, None),
        (8, [600], 1, 4, 1, 128, 16, None, None),
        (8, [700, 5, 300, 0, 513, 600], 1, 4, 2, 64, 16, None, None),
        # Warps side by side take neighbouring heads of the same tokens.
        *(
            (num_processors, mixed(count), *shape)
            for num_processors in (1, 3)
            for count, *shape in (
                (32, 1, 16, 8, 64, 16, None, None),  # eight warps
                (32, 1, 16, 8, 64, 16, 100, 5.0),
                (65, 1, 8, 4, 128, 16, None, None),  # four
                (65, 3, 16, 4, 64, 4, None, None),
                (130, 5, 8, 2, 64, 32, None, None),  # two row tiles of two KV heads
                (130, 1, 4, 2, 64, 16, None, None),
                (260, 1, 2, 1, 64, 16, None, None),  # a warp alone
            )
        ),
    ],
)
def test_work_is_shared_among_teams_and_among_warps_side_by_side(
    emulator: EmulatorBackend,
    num_processors: int,
    lengths: list[int],
    query_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    soft_cap: float | None,
) -> None:
    emulator.num_processors = num_processors
    kernel_compile.limits.cache_clear()
    new_lens = [query_len] * len(lengths)
    case = make_case(
        lengths, new_lens=new_lens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size
    )
    out = decode(case, query_len, window, soft_cap)
    assert relative_error(out, expected(case, window, soft_cap)) < TOLERANCE[BF16]


def test_teams_add_what_their_sequences_share(emulator: EmulatorBackend) -> None:
    emulator.num_processors = 1
    kernel_compile.limits.cache_clear()
    case, shared = share_prefix(make_case([31, 70, 0, 65, 500, 90], new_lens=[1] * 6), [1, 3, 4], 64)
    assert relative_error(decode(case, shared=shared), expected(case)) < TOLERANCE[BF16]


def test_warps_side_by_side_add_what_their_sequences_share(emulator: EmulatorBackend) -> None:
    emulator.num_processors = 1
    kernel_compile.limits.cache_clear()
    lengths = mixed(64)
    share = [row for row, length in enumerate(lengths) if length > 64 and row % 3]
    case, shared = share_prefix(make_case(lengths, new_lens=[1] * 64, kv_heads=4), share, 64)
    assert relative_error(decode(case, shared=shared), expected(case)) < TOLERANCE[BF16]


@pytest.mark.parametrize("length", [40, 90])
def test_many_units_with_too_little_to_read_are_shared_by_teams_of_a_cta(
    emulator: EmulatorBackend, length: int
) -> None:
    emulator.num_processors = 90
    kernel_compile.limits.cache_clear()
    case = make_case([length] * 31 + [600], heads=8, kv_heads=8)
    assert relative_error(decode(case), expected(case)) < TOLERANCE[BF16]


@pytest.mark.parametrize(
    ("query_len", "head_dim", "block_size"), [(1, 128, 16), (5, 128, 32), (1, 64, 16), (1, 256, 16)]
)
def test_a_device_without_tensor_maps_copies_by_lanes(
    emulator: EmulatorBackend, query_len: int, head_dim: int, block_size: int
) -> None:
    emulator.wgmma = False
    kernel_compile.limits.cache_clear()
    lengths = [70, 300, 5, 16]
    case = make_case(lengths, new_lens=[query_len] * 4, heads=8, head_dim=head_dim, block_size=block_size)
    assert relative_error(decode(case, query_len), expected(case)) < TOLERANCE[BF16]
    assert relative_error(decode(case, query_len, 20), expected(case, 20)) < TOLERANCE[BF16]
    assert emulator.bank_conflicts() == 0


def test_a_layer_whose_blocks_are_no_whole_heads_apart_is_copied_by_lanes(device: torch.device) -> None:
    case = make_case([70, 300, 5], device=device)
    blocks, _, kv_heads, block_size, head_dim = case.kv_layer.shape
    pool = torch.full((blocks, 2 * kv_heads * block_size * head_dim + 8), float("nan"), dtype=BF16, device=device)
    layer = pool[:, :-8].unflatten(1, (2, kv_heads, block_size, head_dim))
    layer.copy_(case.kv_layer)
    assert relative_error(decode(replace(case, kv_layer=layer)), expected(case)) < TOLERANCE[BF16]


def test_short_contexts_give_the_same_bits_whatever_else_is_in_the_batch(emulator: EmulatorBackend) -> None:
    outs = []
    for num_processors in (1, 2, 3):
        emulator.num_processors = num_processors
        kernel_compile.limits.cache_clear()
        case = make_case([85, 1, 256, 40, 100, 16, 17, 3, 33, 250, 77, 5], kv_heads=2)
        outs.append(decode(case))
    case = replace(case, query=case.query[2:], block_tables=case.block_tables[2:], context_lens=case.context_lens[2:])
    emulator.num_processors = 2
    kernel_compile.limits.cache_clear()
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])
    assert torch.equal(decode(case), outs[0][2:])


def test_many_short_sequences_are_summed_up_right(device: torch.device) -> None:
    case = make_case([1 + 7 * n % 40 for n in range(300)], heads=2, kv_heads=1, device=device)
    assert relative_error(decode(case), expected(case)) < TOLERANCE[BF16]


def test_reads_of_keys_and_values_have_no_bank_conflicts(emulator: EmulatorBackend) -> None:
    for head_dim in (64, 80, 96, 128, 256):
        decode(make_case([40], head_dim=head_dim))
    assert emulator.bank_conflicts() == 0


def test_queries_may_be_a_slice_of_a_fused_projection(device: torch.device) -> None:
    case = make_case([60, 20], device=device)
    fused = torch.full((2, 8, 64), float("nan"), dtype=BF16, device=device)
    fused[:, :4] = case.query
    out = attention.paged_attention_decode(
        fused[:, :4], case.kv_layer, case.block_tables, case.context_lens, case.scale
    )
    assert relative_error(out, expected(case)) < TOLERANCE[BF16]


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "block_size", "num_tokens", "soft_cap"),
    [
        (BF16, 8, 2, 128, 16, 144, None),
        (FP16, 4, 1, 128, 64, 128, 20.0),
        (BF16, 4, 2, 64, 32, 32, None),
        (BF16, 3, 1, 256, 16, 80, None),
        (BF16, 4, 2, 80, 16, 32, None),  # no kernel for it: the block tables say it all
        (FP32, 4, 2, 64, 16, 32, None),
    ],
)
def test_a_prefix_that_rows_share_is_read_once_and_counts_like_any_other_context(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    num_tokens: int,
    soft_cap: float | None,
) -> None:
    # Rows 0 and 4 share nothing, row 5 pads.
    case = make_case(
        [31, num_tokens + 70, num_tokens + 1, num_tokens + 300, 200, 0, num_tokens + 16],
        new_lens=[1] * 7,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )
    case, shared = share_prefix(case, [3, 1, 2, 6], num_tokens)
    assert (
        relative_error(decode(case, soft_cap=soft_cap, shared=shared), expected(case, None, soft_cap))
        < TOLERANCE[dtype]
    )


def test_a_prefix_of_no_tokens_changes_nothing(device: torch.device) -> None:
    case, shared = share_prefix(make_case([40, 50], device=device), [0, 1], 0)
    assert torch.equal(decode(case, shared=shared), decode(case))


def test_what_is_shared_is_not_read_again_for_each_row(emulator: EmulatorBackend) -> None:
    case, shared = share_prefix(make_case([65, 70], device="cpu"), [0, 1], 64)
    whole = decode(case, shared=shared)
    case.block_tables[1, :4] = 2**30  # nobody looks there
    assert torch.equal(decode(case, shared=shared), whole)


def test_with_a_window_the_block_tables_say_it_all(device: torch.device) -> None:
    case, shared = share_prefix(make_case([90, 130], device=device), [0, 1], 64)
    assert torch.equal(decode(case, sliding_window=40, shared=shared), decode(case, sliding_window=40))


def test_what_the_kernel_cannot_take_is_refused_before_the_launch(emulator: EmulatorBackend) -> None:
    case = make_case([20], head_dim=64)

    def call(**changes: torch.Tensor) -> None:
        arguments = {
            "query": case.query,
            "kv_layer": case.kv_layer,
            "block_tables": case.block_tables,
            "context_lens": case.context_lens,
        }
        attention.paged_attention_decode(**{**arguments, **changes}, scale=1.0)

    with pytest.raises(TypeError, match="int32"):
        call(context_lens=case.context_lens.long())
    with pytest.raises(TypeError, match="both be"):
        call(query=case.query.float())
    with pytest.raises(ValueError, match="not a multiple"):
        call(query=case.query[:, :3].contiguous())
    with pytest.raises(ValueError, match="does not fit"):
        call(query=torch.zeros(1, 4, 32, dtype=BF16))
    with pytest.raises(ValueError, match="contiguous inside a block"):
        call(kv_layer=case.kv_layer.transpose(3, 4).contiguous().transpose(3, 4))
    with pytest.raises(ValueError, match="block tables but"):
        call(context_lens=torch.tensor([1, 2], dtype=torch.int32))
