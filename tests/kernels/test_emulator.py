"""The emulator must fail kernels that a GPU would fail, and its tensor core instructions must be the PTX manual's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import compile as kernel_compile
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
    with pytest.raises(kernel_compile.KernelError, match=complaint):
        run(emulator, body, torch.zeros(1), torch.zeros(8, dtype=torch.int16))


def test_bank_conflicts_are_counted(emulator: EmulatorBackend) -> None:
    run(emulator, "u32 r[4]; load_matrix_x4(r, shared + lane % 8 * 128);", torch.zeros(1))
    assert emulator.bank_conflicts() == 4 * 7
