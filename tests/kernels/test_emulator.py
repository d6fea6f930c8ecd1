"""The emulator must fail kernels that a GPU would fail, and its tensor core instructions must be the PTX manual's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kernels import compile as kernel_compile
from kernels.compile import KernelError, TensorMap
from tests.kernels.emulator import EmulatorBackend

CPU = torch.device("cpu")


def run(emulator: EmulatorBackend, body: str, out: torch.Tensor, *inputs: torch.Tensor, threads: int = 32) -> None:
    """Runs `body` as a kernel with pointers out, a, b and 4 KiB of shared memory."""
    text = kernel_compile.source("device.cuh", {})
    text += 'extern "C" __global__ void probe(float* out, unsigned short* a, unsigned short* b) {\n'
    text += "SHARED_MEMORY(shared); const int lane = threadIdx.x; const int g = lane / 4, t = lane % 4;\n"
    text += body + "}\n"
    kernel = kernel_compile.Kernel(emulator.load(text, "probe", CPU), kernel_compile.parameters(text, "probe"))
    pointers = [x.data_ptr() for x in inputs] + [0] * (2 - len(inputs))
    kernel((1, 1, 1), threads, 4096, out.data_ptr(), *pointers)


def test_mma_multiplies_matrices_laid_out_as_the_ptx_manual_says(emulator: EmulatorBackend) -> None:
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16() for shape in ((16, 16), (16, 8)))
    out = torch.empty(16, 8)
    body = """
      auto pair = [](const unsigned short* x, int low, int high) { return u32(x[low]) | u32(x[high]) << 16; };
      u32 fa[4], fb[2];
      for (int i = 0; i < 4; ++i) {
        const int row = i % 2 ? g + 8 : g, column = (i < 2 ? 0 : 8) + 2 * t;
        fa[i] = pair(a, row * 16 + column, row * 16 + column + 1);
      }
      for (int i = 0; i < 2; ++i) fb[i] = pair(b, (2 * t + 8 * i) * 8 + g, (2 * t + 1 + 8 * i) * 8 + g);
      float c[4] = {0, 0, 0, 0};
      mma<bfloat16>(c, fa, fb[0], fb[1]);
      for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
    """
    run(emulator, body, out, a.view(torch.int16), b.view(torch.int16))
    torch.testing.assert_close(out, a.float() @ b.float())


def test_loaded_matrices_are_the_rows_whose_addresses_the_lanes_give(emulator: EmulatorBackend) -> None:
    a = torch.arange(256, dtype=torch.int16)
    out = torch.empty(2, 32, 4, dtype=torch.int32)
    body = """
      for (int i = 0; i < 8; ++i) ((unsigned short*)shared)[lane * 8 + i] = a[lane * 8 + i];
      __syncwarp();
      u32 r[4];
      load_matrix_x4(r, shared + lane * 16);
      for (int i = 0; i < 4; ++i) ((u32*)out)[lane * 4 + i] = r[i];
      load_matrix_x4_trans(r, shared + lane * 16);
      for (int i = 0; i < 4; ++i) ((u32*)out)[128 + lane * 4 + i] = r[i];
    """
    run(emulator, body, out, a)
    matrices = a.numpy().astype(np.uint32).reshape(4, 8, 8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            assert int(out[0, lane, i]) == matrices[i, g, 2 * t] | matrices[i, g, 2 * t + 1] << 16
            assert int(out[1, lane, i]) == matrices[i, 2 * t, g] | matrices[i, 2 * t + 1, g] << 16


def test_asynchronous_copies_are_not_there_before_they_are_waited_for(emulator: EmulatorBackend) -> None:
    a = torch.ones(8, dtype=torch.bfloat16)
    out = torch.zeros(2)
    body = """
      copy_async_16(shared + lane * 16, a, true);
      copy_async_commit();
      if (lane == 0) out[0] = to_float(*(bfloat16*)shared);
      copy_async_wait<0>();
      if (lane == 0) out[1] = to_float(*(bfloat16*)shared);
    """
    run(emulator, body, out, a.view(torch.int16))
    assert out[0].isnan()
    assert out[1] == 1


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("if (lane < 7) __syncthreads();", "deadlock"),
        ("if (lane < 7) __syncwarp(); else __any_sync(FULL_MASK, true);", "different warp-wide instructions"),
        ("u32 r[4]; load_matrix_x4(r, shared + lane * 16 + 2);", "unaligned"),
        ("u32 r[4]; load_matrix_x4(r, shared + 4096);", "outside"),
        ("copy_async_16(shared + 4096, a, false);", "outside"),
        ("copy_async_16(shared, a, false);", "not committed"),
    ],
)
def test_wrong_kernels_are_reported(emulator: EmulatorBackend, body: str, complaint: str) -> None:
    with pytest.raises(KernelError, match=complaint):
        run(emulator, body, torch.zeros(1), torch.zeros(8, dtype=torch.int16))


def test_bank_conflicts_are_counted(emulator: EmulatorBackend) -> None:
    run(emulator, "u32 r[4]; load_matrix_x4(r, shared + lane % 8 * 128);", torch.zeros(1))
    assert emulator.bank_conflicts() == 4 * 7


def matrix_map(matrix: torch.Tensor, box: tuple[int, ...]) -> TensorMap:
    """Of a contiguous tensor, whose last dimension is the map's first."""
    strides = tuple(2 * stride for stride in reversed(matrix.stride()[:-1]))
    return TensorMap(matrix.data_ptr(), matrix.dtype, tuple(reversed(matrix.shape)), strides, box)


def run_cluster(
    emulator: EmulatorBackend,
    body: str,
    out: torch.Tensor,
    matrix: TensorMap | None = None,
    *,
    cluster: int = 1,
    ctas: int | None = None,
    threads: int = 32,
) -> None:
    """Runs `body` as one cluster, or in `ctas` CTAs, with pointer out, a map, 16 KiB of shared memory and a barrier."""
    text = kernel_compile.source("hopper.cuh", {"CLUSTER": cluster})
    text += 'extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(32)\n'
    text += "probe(float* out, const __grid_constant__ TensorMap map) {\n"
    text += "SHARED_MEMORY(shared); u64* barrier = (u64*)(shared + 16384);\n"
    text += "const int tid = threadIdx.x, rank = cluster_rank();\n" + body + "}\n"
    kernel = kernel_compile.Kernel(emulator.load(text, "probe", CPU), kernel_compile.parameters(text, "probe"))
    encoded = emulator.tensor_map(matrix) if matrix else bytes(128)
    kernel((ctas or cluster, 1, 1), threads, 16384 + 8, out.data_ptr(), encoded)


def unswizzled(rows: torch.Tensor) -> torch.Tensor:
    """[N, 64] as it lies in shared memory in order of the columns."""
    units = torch.arange(8) ^ (torch.arange(len(rows)) % 8)[:, None]
    return rows.unflatten(1, (8, 8)).gather(1, units[..., None].expand(-1, -1, 8)).flatten(1)


BOX = """
  if (tid == 0) {
    barrier_init(barrier, 1);
    barriers_initialised();
    barrier_arrive_expecting(barrier, 1024);
    copy_box(shared, &map, barrier, 0, 0);
  }
  __syncwarp();
  barrier_wait(barrier, 0);
"""
BOXES = """
  if (tid == 0) {
    barrier_init(barrier, 1);
    barriers_initialised();
  }
  cluster_sync();
  if (tid == 0) {
    barrier_arrive_expecting(barrier, 2048);
    copy_box_to(3, shared + rank * 1024, &map, barrier, 16, rank * 8 - 2);
  }
  barrier_wait(barrier, 0);
  for (int i = tid; i < 1024; i += 32) out[blockIdx.x * 1024 + i] = to_float(((bfloat16*)shared)[i]);
  cluster_sync();
"""
ARRIVALS = """
  if (tid == 0) {
    barrier_init(barrier, 2);
    barriers_initialised();
  }
  cluster_sync();
  if (tid == 0)
    for (int i = 0; i < 2; ++i) barrier_arrive_at(barrier, i);
  barrier_wait(barrier, 0);
  out[blockIdx.x] = rank;
"""
PRODUCTS = """
  if (tid == 0) {
    barrier_init(barrier, 1);
    barriers_initialised();
  }
  __syncthreads();
  float d[8][4];
  for (int i = 0; i < 2; ++i) {
    if (tid == 0) {
      barrier_arrive_expecting(barrier, 8192);
      copy_box(shared, &map, barrier, 0, i * 64);
    }
    barrier_wait(barrier, i);
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
      wgmma<bfloat16, 64>(d, k_major_operand(shared + k * 32), k_major_operand(shared + k * 32), i > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();
  }
  const int warp = tid / 32, g = tid % 32 / 4, t = tid % 4;
  for (int i = 0; i < 32; ++i) out[(warp * 16 + g + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2] = d[i / 4][i % 4];
"""


def test_boxes_reach_every_cta_of_their_mask_and_are_zero_outside_the_matrix(emulator: EmulatorBackend) -> None:
    matrix = torch.randn(12, 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.empty(4, 16, 64)
    wanted = torch.zeros(16, 64)
    wanted[2:14, :56] = matrix[:, 16:].float()
    for _ in range(8):  # boxes land at other times
        run_cluster(emulator, BOXES, out.fill_(-1), matrix_map(matrix, (64, 8)), cluster=2, ctas=4)
        assert all(torch.equal(unswizzled(cta), wanted) for cta in out)


def test_a_box_of_four_dimensions_is_in_the_order_of_its_map(emulator: EmulatorBackend) -> None:
    matrix = torch.randn(80, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = TensorMap(matrix.data_ptr(), matrix.dtype, (128, 8, 2, 5), (256, 40 * 256, 8 * 256), (64, 8, 2, 2))
    body = BOX.replace("1024", "4096").replace("copy_box(shared, &map, barrier, 0, 0)", "COPY")
    body = body.replace("COPY", "copy_box_once(shared, &map, barrier, 64, 0, 0, 1)")
    out = torch.empty(32, 64)
    run_cluster(
        emulator, body + "for (int i = tid; i < 2048; i += 32) out[i] = to_float(((bfloat16*)shared)[i]);", out, pairs
    )
    halves = matrix[:, 64:].float()
    wanted = [halves[first : first + 8] for first in (8, 48, 16, 56)]
    assert torch.equal(unswizzled(out), torch.cat(wanted))


def test_a_box_is_not_there_before_it_is_waited_for(emulator: EmulatorBackend) -> None:
    matrix, out = torch.ones(8, 64, dtype=torch.bfloat16), torch.zeros(2)
    body = BOX.replace("barrier, 0, 0);", "barrier, 0, 0); out[0] = to_float(*(bfloat16*)shared);")
    run_cluster(
        emulator, body + "if (tid == 0) out[1] = to_float(*(bfloat16*)shared);", out, matrix_map(matrix, (64, 8))
    )
    assert out[0].isnan()
    assert out[1] == 1


def test_products_of_boxes_are_those_of_their_matrices(emulator: EmulatorBackend) -> None:
    matrix = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.empty(64, 64)
    run_cluster(emulator, PRODUCTS, out, matrix_map(matrix, (64, 64)), threads=128)
    first, second = matrix.float().split(64)
    torch.testing.assert_close(out, first @ first.T + second @ second.T, rtol=1e-4, atol=1e-3)


def test_a_box_must_not_land_where_a_product_still_reads(emulator: EmulatorBackend) -> None:
    body = PRODUCTS.replace("wgmma_wait<0>();", "") + "wgmma_wait<0>();"
    matrix = matrix_map(torch.ones(128, 64, dtype=torch.bfloat16), (64, 64))
    with pytest.raises(KernelError, match="changed under a wgmma"):
        run_cluster(emulator, body, torch.empty(64, 64), matrix, threads=128)


def test_ctas_of_a_cluster_run_at_the_same_time_with_shared_memory_of_their_own(emulator: EmulatorBackend) -> None:
    out = torch.empty(4)
    run_cluster(emulator, ARRIVALS, out, cluster=2, ctas=4)
    assert out.tolist() == [0, 1, 0, 1]
    body = """
      __shared__ float variable;
      if (tid == 0) out[blockIdx.x * 3] = variable, variable = blockIdx.x, ((float*)shared)[0] = -rank;
      cluster_sync();
      if (tid == 0) out[blockIdx.x * 3 + 1] = variable, out[blockIdx.x * 3 + 2] = ((float*)shared)[0];
    """
    out = torch.empty(4, 3)
    run_cluster(emulator, body, out, cluster=2, ctas=4)
    assert out[:, 0].isnan().all()
    assert out[:, 1:].tolist() == [[0, 0], [1, -1], [2, 0], [3, -1]]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("barriers_initialised();", "", "without a fence behind its initialisation"),
        ("barrier_init(barrier, 1);", "", "before its initialisation"),
        ("barrier, 1024);", "barrier, 1040);", "expects bytes that no box brings"),
        ("barrier, 1024);", "barrier, 1008);", "bytes that it was not told to expect"),
        ("barrier, 1024);", "barrier, 1 << 20);", "more bytes than an mbarrier can count"),
        ("barrier, 1024);", "barrier, 1024); barrier_arrive(barrier);", "more arrivals"),
        ("shared, &map", "shared + 128, &map", "unaligned"),
        ("shared, &map", "shared + 16384, &map", "outside shared memory"),
        ("&map", "(const TensorMap*)shared", "not a tensor map"),
        ("barrier, 0, 0);", "barrier, 0, 0); copy_box(shared, &map, barrier, 64, 0);", "has not landed yet"),
        ("copy_box(shared, &map, barrier, 0, 0)", "copy_box_once(shared, &map, barrier, 0, 0, 0, 0)", "dimensions"),
        ("__syncwarp();\n  barrier_wait(barrier, 0);", "", "ended while a box or an arrival was on its way"),
    ],
)
def test_a_wrong_use_of_boxes_is_reported(emulator: EmulatorBackend, old: str, new: str, complaint: str) -> None:
    assert old in BOX
    matrix = torch.zeros(8, 64, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=complaint):
        run_cluster(emulator, BOX.replace(old, new), torch.zeros(1), matrix_map(matrix, (64, 8)))


TOO_LATE = "if (rank == 0) return; for (int i = 0; i < 20; ++i) __syncwarp();"


@pytest.mark.parametrize(
    ("body", "old", "new", "complaint"),
    [
        (BOXES, "copy_box_to(3", "copy_box_to(0", "to no CTA"),
        (BOXES, "copy_box_to(3", "copy_box_to(4", "outside the cluster"),
        (BOXES, "copy_box_to(3", "copy_box_to(1 << rank", "expects bytes that no box brings"),
        (
            BOXES,
            "  cluster_sync();\n  if",
            "  __syncwarp();\n  if",
            "without barriers_initialised and then cluster_sync",
        ),
        (BOXES, "  cluster_sync();\n  if", f"  cluster_sync(); {TOO_LATE}\n  if", "has ended"),
        (ARRIVALS, "  cluster_sync();\n  if", f"  cluster_sync(); {TOO_LATE}\n  if", "has ended"),
        (
            ARRIVALS,
            "  cluster_sync();\n  if",
            "  __syncwarp();\n  if",
            "without barriers_initialised and then cluster_sync",
        ),
        (ARRIVALS, "barriers_initialised();", "", "without barriers_initialised and then cluster_sync"),
        (ARRIVALS, "barrier, i)", "barrier, i + 2)", "outside the cluster"),
        (ARRIVALS, "barrier_init(barrier, 2)", "barrier_init(barrier, 3)", "deadlock"),
        (ARRIVALS, "out[blockIdx.x] = rank;", "if (rank == 0) cluster_sync();", "deadlock"),
    ],
)
def test_a_wrong_use_of_a_cluster_is_reported(
    emulator: EmulatorBackend, body: str, old: str, new: str, complaint: str
) -> None:
    assert old in body
    matrix = torch.zeros(16, 64, dtype=torch.bfloat16)
    for _ in range(4):
        with pytest.raises(KernelError, match=complaint):
            run_cluster(emulator, body.replace(old, new), torch.zeros(2, 1024), matrix_map(matrix, (64, 8)), cluster=2)


def test_a_grid_must_be_a_number_of_clusters(emulator: EmulatorBackend) -> None:
    with pytest.raises(KernelError, match="not a number of clusters"):
        run_cluster(emulator, ARRIVALS, torch.zeros(3), cluster=2, ctas=3)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"address": 8}, "address"),
        ({"dtype": torch.float32}, "two bytes"),
        ({"sizes": (64, 0)}, "size"),
        ({"strides": (136,)}, "stride"),
        ({"strides": ()}, "do not agree"),
        ({"box": (64, 257)}, "box out of range"),
        ({"box": (32, 8)}, "128 bytes wide"),
    ],
)
def test_a_tensor_map_that_the_driver_would_refuse_is_refused(
    emulator: EmulatorBackend, change: dict[str, object], complaint: str
) -> None:
    good = TensorMap(1 << 20, torch.bfloat16, (64, 8), (128,), (64, 8))
    assert len(emulator.tensor_map(good)) == 128
    with pytest.raises(KernelError, match=complaint):
        emulator.tensor_map(dataclasses.replace(good, **change))  # type: ignore[arg-type]
