"""Every kernel compiles for every supported architecture without a GPU, and the tuned ones keep to their registers.

Needs CuPy and NVRTC: `pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12`.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct

import pytest
import torch

from kernels import attention, linear_tall, linear_wgmma, sampling
from kernels import compile as kernel_compile
from kernels.compile import Cubin, DeviceLimits, KernelError
from kernels.reference import Product

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
LIMITS = {
    "sm_80": DeviceLimits(108, 163 * 1024, 164 * 1024),
    "sm_89": DeviceLimits(142, 99 * 1024, 100 * 1024),
    "sm_90a": DeviceLimits(132, 227 * 1024, 228 * 1024, wgmma=True),
}
"""A100, L40S, H200."""
HEAD_DIMS = (64, 80, 96, 128, 256)
HALVES = ("bfloat16", "float16")
REGISTERS_OF_A_PROCESSOR = 65536


@functools.cache
def why_no_compiler() -> str | None:
    try:
        kernel_compile.compile_to_cubin('extern "C" __global__ void nothing() {}', "sm_80")
    except KernelError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    if "arch" in request.fixturenames and why_no_compiler():
        pytest.skip(why_no_compiler())


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(file: str, arch: str, **defines: object) -> Cubin:
    return kernel_compile.compile_to_cubin(kernel_compile.source(file, defines), arch)


def assert_no_spills(cubin: Cubin) -> None:
    spilled = {name: r for name, r in cubin.resources.items() if r.spill_bytes or r.stack_bytes}
    assert not spilled


DECODES = [(dtype, head_dim, rows, 1) for dtype in HALVES for head_dim in HEAD_DIMS for rows in (4, 16)] + [
    ("bfloat16", head_dim, 4, num_seqs) for head_dim in (64, 128) for num_seqs in (24, 64, 256, 512)
]
"""Element type, head size, rows that share keys, sequences."""


@pytest.mark.parametrize(("dtype", "head_dim", "rows", "num_seqs"), DECODES)
def test_decode_fits_registers_and_shared_memory(
    arch: str, dtype: str, head_dim: int, rows: int, num_seqs: int
) -> None:
    for boxes in (False, True) if arch == "sm_90a" and head_dim % 64 == 0 else (False,):
        config = attention.decode_config(head_dim, rows, LIMITS[arch], num_seqs, 8, boxes=boxes)
        for shared_prefix in (0, 1) if arch == "sm_90a" and head_dim in (64, 128, 256) else (0,):
            sizes = {"HEAD_DIM": head_dim, "BLOCK_SIZE": 16, "SHARED_PREFIX": shared_prefix}
            cubin = build("attention_decode.cu", arch, DTYPE=dtype, **sizes, **config.defines)
            assert_no_spills(cubin)
            registers = cubin.resources["paged_attention_decode"].registers
            assert config.ctas * config.warps * 32 * registers <= REGISTERS_OF_A_PROCESSOR
        shared = config.shared_bytes(head_dim, max(num_seqs, 256))
        assert shared <= LIMITS[arch].shared_bytes
        assert config.ctas * (shared + 1024) <= LIMITS[arch].processor_shared_bytes


@pytest.mark.parametrize("num_seqs", [1, 257, 480, 513, 1024, 1025, attention.MAX_SEQUENCES])
def test_prefix_sums_of_every_number_of_sequences_fit_shared_memory(arch: str, num_seqs: int) -> None:
    for boxes in (False, True):
        config = attention.decode_config(128, 4, LIMITS[arch], num_seqs, 8, boxes=boxes)
        shared = config.shared_bytes(128, num_seqs)
        assert shared <= LIMITS[arch].shared_bytes
        assert config.ctas * (shared + 1024) <= LIMITS[arch].processor_shared_bytes


@pytest.mark.parametrize(
    ("num_seqs", "kv_heads", "warps", "team", "ctas", "uncut"),
    [
        (1, 8, 8, 8, 1, 32),
        (16, 8, 8, 8, 1, 32),
        (17, 8, 4, 4, 2, 32),
        (33, 8, 4, 4, 2, 32),
        (34, 8, 8, 2, 1, 32),
        (128, 8, 8, 2, 1, 32),
        (129, 8, 8, 2, 1, 16),
        (480, 4, 4, 2, 2, 16),
        (480, 2, 2, 1, 4, 32),
        (256, 5, 1, 1, 8, 16),
        (480, 5, 4, 4, 2, 16),
    ],
)
def test_of_few_units_each_has_a_multiprocessor_or_half_of_one_and_of_many_warps_stand_side_by_side(
    num_seqs: int, kv_heads: int, warps: int, team: int, ctas: int, uncut: int
) -> None:
    config = attention.decode_config(128, 4, LIMITS["sm_90a"], num_seqs, kv_heads)
    assert (config.warps, config.team, config.stages, config.ctas) == (warps, team, 3, ctas)
    assert config.uncut == uncut


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 32, 64, 128, 256])
def test_decode_compiles_for_every_block_size(arch: str, block_size: int) -> None:
    config = attention.decode_config(128, 4, LIMITS[arch])
    sizes = {"HEAD_DIM": 128, "BLOCK_SIZE": block_size, "SHARED_PREFIX": 0}
    assert_no_spills(build("attention_decode.cu", arch, DTYPE="bfloat16", **sizes, **config.defines))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (80, 16), (96, 16), (128, 16), (128, 4), (128, 64), (256, 16)]
)
def test_prefill_fits_registers_and_shared_memory(arch: str, dtype: str, head_dim: int, block_size: int) -> None:
    config = attention.prefill_config(head_dim, LIMITS[arch])
    assert config.wgmma == (arch == "sm_90a" and head_dim in (64, 128))
    cubin = build(config.file, arch, DTYPE=dtype, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, **config.defines(None))
    assert_no_spills(cubin)
    assert config.shared_bytes(head_dim) <= LIMITS[arch].shared_bytes


@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [("bfloat16", 64, 16), ("bfloat16", 128, 16), ("float16", 128, 64), ("bfloat16", 256, 16)],
)
def test_prefill_of_specialised_warpgroups_fits_registers_and_shared_memory(
    dtype: str, head_dim: int, block_size: int, soft_cap: float | None
) -> None:
    if reason := why_no_compiler():
        pytest.skip(reason)
    limits = LIMITS["sm_90a"]
    config = attention.hopper_config(head_dim, block_size, limits)
    assert config
    for shared_prefix in (0, 1):
        defines = {**config.defines(soft_cap), "SHARED_PREFIX": shared_prefix}
        assert_no_spills(build(config.file, "sm_90a", DTYPE=dtype, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, **defines))
    assert config.shared_bytes(head_dim) <= limits.shared_bytes
    registers = config.producer_registers + config.consumers * config.consumer_registers
    assert 128 * registers <= REGISTERS_OF_A_PROCESSOR


@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
def test_small_kernels_compile_without_spills(arch: str, dtype: str) -> None:
    vector = 4 if dtype == "float32" else 8
    for width, row_warps, cta_rows in ((128, 1, 4), (4096, 8, 1)):
        for parts in (0, 1, 3, 6) if arch == "sm_90a" else (0,):  # products in parts are of Hopper only
            shape = {"WIDTH": width, "ROW_WARPS": row_warps, "CTA_ROWS": cta_rows, "PARTS": parts}
            assert_no_spills(build("norm.cu", arch, DTYPE=dtype, **shape))
    assert_no_spills(build("activation.cu", arch, DTYPE=dtype))
    for head_dim, rotary_dim, interleaved in ((128, 128, 0), (80, 32, 1), (64, 0, 0)):
        assert_no_spills(
            build(
                "cache.cu",
                arch,
                DTYPE=dtype,
                HEAD_DIM=head_dim,
                ROTARY_DIM=rotary_dim,
                BLOCK_SIZE=16,
                INTERLEAVED=interleaved,
                VECTOR=vector,
            )
        )
    build("attention_simple.cu", arch, DTYPE=dtype, HEAD_DIM=128, BLOCK_SIZE=16)


def test_sampling_compiles_without_spills_where_rows_are_aligned(arch: str) -> None:
    for dtype, vector in (("float32", 4), ("bfloat16", 8), ("float16", 8)):
        assert_no_spills(build("sampling.cu", arch, DTYPE=dtype, VECTOR=vector))
    build("sampling.cu", arch, DTYPE="bfloat16", VECTOR=1)


def test_the_wrapper_knows_the_size_of_sampling_s_workspace(arch: str) -> None:
    text = kernel_compile.source("sampling.cu", {"DTYPE": "float32", "VECTOR": 4})
    text += f'static_assert(sizeof(Workspace) == {sampling._SHARED_BYTES}, "as the wrapper says");\n'
    kernel_compile.compile_to_cubin(text, arch)


def test_a_compiler_s_refusal_is_one_line_that_says_what(arch: str) -> None:
    with pytest.raises(KernelError, match="undefined_name") as refusal:
        kernel_compile.compile_to_cubin('extern "C" __global__ void bad() { undefined_name; }', arch)
    assert "\n" not in str(refusal.value)


def test_source_holds_the_text_of_its_headers_once() -> None:
    text = kernel_compile.source("norm.cu", {"WIDTH": 64})
    assert "#define WIDTH 64" in text
    assert text.count("struct bfloat16") == 1
    assert not re.search(r'^#include "device', text, re.MULTILINE)


def test_parameters_are_read_from_the_kernel_s_source() -> None:
    text = 'extern "C" __global__ void __launch_bounds__(1)\nk(const DTYPE* a, int n,\n i64 m, float s, u64* p) {'
    assert kernel_compile.parameters(text, "k") == ("pointer", "int", "i64", "float", "pointer")
    with pytest.raises(KernelError, match="no kernel"):
        kernel_compile.parameters(text, "other")


def test_a_tensor_map_is_a_parameter_of_128_bytes_in_its_place() -> None:
    kinds = kernel_compile.parameters(kernel_compile.source("linear_wgmma.cu", {}), "linear_wgmma")
    rotation = ("pointer", "pointer", "pointer", "pointer", "int", "int", "i64", "i64", "int")
    assert kinds == ("pointer", "TensorMap", "TensorMap", "int", "int", "int", *rotation)
    kinds = kinds[:6]

    seen: list[bytes] = []

    class Launched:
        def launch(self, grid: kernel_compile.Grid, threads: int, shared_bytes: int, arguments: int) -> None:
            places = (ctypes.c_void_p * len(kinds)).from_address(arguments)
            sizes = (8, 128, 128, 4, 4, 4)
            seen.extend(ctypes.string_at(place, size) for place, size in zip(places, sizes, strict=True))

    first, second = bytes(range(128)), bytes(range(128, 256))
    kernel_compile.Kernel(Launched(), kinds)((1, 1, 1), 32, 0, 7, first, second, 5, -6, 8)
    numbers = (struct.pack("<Q", 7), *(struct.pack("<i", number) for number in (5, -6, 8)))
    assert seen == [numbers[0], first, second, *numbers[1:]]


def test_a_gpu_that_is_too_old_is_refused_with_the_mend() -> None:
    assert kernel_compile.architecture((9, 0)) == "sm_90a"
    assert kernel_compile.architecture((8, 9)) == "sm_89"
    with pytest.raises(KernelError, match=r"7\.5.*Ampere"):
        kernel_compile.architecture((7, 5))


def test_tensors_without_a_backend_are_refused() -> None:
    with pytest.raises(KernelError, match=r"kernels\.reference"):
        kernel_compile.limits(torch.device("meta"))


@pytest.mark.parametrize(
    ("file", "name", "early"),
    [
        ("cache.cu", "rope_and_cache", True),
        ("cache.cu", "copy_blocks", False),
        ("norm.cu", "add_rms_norm", True),
        ("linear_wgmma.cu", "linear_wgmma", True),
        ("linear_tall.cu", "linear_tall", True),
        ("sampling.cu", "argmax", True),
        ("sampling.cu", "sample", False),
    ],
)
def test_only_a_kernel_that_waits_itself_is_launched_before_those_in_front_of_it_have_ended(
    file: str, name: str, early: bool
) -> None:
    assert kernel_compile.waits_for_previous(kernel_compile.source(file, {}), name) is early


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", linear_wgmma.TOKENS)
@pytest.mark.parametrize(
    ("by", "rows", "width", "epilogue"),
    [
        ("linear", 128256, 4096, linear_wgmma.STORING),
        ("linear", 6144, 4096, linear_wgmma.STORING),
        ("linear_parts", 4096, 14336, linear_wgmma.PARTS),
        ("linear_gated", 28672, 4096, linear_wgmma.GATING),
        ("linear_rotated", 6144, 4096, linear_wgmma.ROTATING),
    ],
)
def test_products_by_boxes_keep_their_sums_in_registers(
    dtype: str, tokens: int, by: Product, rows: int, width: int, epilogue: int
) -> None:
    config = linear_wgmma.wgmma_config(by, tokens, rows, width, LIMITS["sm_90a"])
    if by == "linear_rotated" and tokens > 128:
        assert config is None, "not taken"
        return
    if reason := why_no_compiler():
        pytest.skip(reason)
    assert config is not None
    heads = {"HEAD_DIM": 128, "BLOCK_SIZE": 16} if by == "linear_rotated" else {}
    cubin = build("linear_wgmma.cu", "sm_90a", DTYPE=dtype, K=width, EPILOGUE=epilogue, **heads, **config.defines)
    assert_no_spills(cubin)
    registers = cubin.resources["linear_wgmma"].registers
    assert config.threads * registers <= REGISTERS_OF_A_PROCESSOR
    assert config.shared_bytes <= LIMITS["sm_90a"].shared_bytes


@pytest.mark.parametrize("dtype", HALVES)
def test_a_tall_tile_keeps_its_sums_in_registers(dtype: str) -> None:
    if reason := why_no_compiler():
        pytest.skip(reason)
    config = linear_tall.tall_config(512, 28672, 4096, LIMITS["sm_90a"])
    assert config is not None
    cubin = build("linear_tall.cu", "sm_90a", DTYPE=dtype, K=4096, **config.defines)
    assert_no_spills(cubin)
    assert config.groups * 128 * cubin.resources["linear_tall"].registers <= REGISTERS_OF_A_PROCESSOR
    assert config.shared_bytes <= LIMITS["sm_90a"].shared_bytes
