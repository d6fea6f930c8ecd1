"""wgmma as csrc/wgmma.cuh wraps it: here this checks the emulator, on a GPU the descriptors and fragments."""

from __future__ import annotations

import pytest
import torch

from kernels import compile as kernel_compile

ROWS, WIDTH = 64, 128

PANELS = """
  // rows x 128 elements of `from` as two panels of 64 elements in the 128-byte swizzle
  auto fill = [&](unsigned char* to, const unsigned short* from, int rows) {
    for (int piece = threadIdx.x; piece < rows * 16; piece += 128) {
      const int row = piece / 16, column = piece % 16;
      copy_async_16(to + column / 8 * rows * 128 + row * 128 + (column % 8 ^ row % 8) * 16, from + piece * 8, true);
    }
    copy_async_commit();
    copy_async_wait<0>();
    FENCE
    __syncthreads();
  };
  SHARED_MEMORY(dynamic);
  unsigned char* left = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
  unsigned char* right = left + 64 * 256;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float d[16][4];
  for (int i = 0; i < 64; ++i) d[i / 4][i % 4] = 0.0f;
"""
STORE = """
  for (int i = 0; i < 64; ++i) out[(warp * 16 + g + i / 2 % 2 * 8) * 128 + i / 4 * 8 + 2 * t + i % 2] = d[i / 4][i % 4];
"""
BOTH_SHARED = (
    PANELS
    + """
  fill(left, a, 64);
  fill(right, b, 128);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    wgmma<bfloat16, 128>(d, k_major_operand(left + k / 4 * 64 * 128 + k % 4 * 32),
                         k_major_operand(right + k / 4 * 128 * 128 + k % 4 * 32), k > 0);
  wgmma_commit();
  wgmma_wait<0>();
  keep_order(d);
"""
    + STORE
)
LEFT_IN_REGISTERS = (
    PANELS
    + """
  fill(right, b, 128);
  u32 p[8][4];
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[k][i] = *(const u32*)(a + (warp * 16 + g + i % 2 * 8) * 128 + k * 16 + i / 2 * 8 + 2 * t);
  keep_order(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    wgmma<bfloat16, 128>(d, p[k], n_major_operand(right + k * 16 * 128, 128 * 128));
  wgmma_commit();
  wgmma_wait<0>();
  keep_order(d);
"""
    + STORE
)


def run(device: torch.device, body: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What `body` makes of a and b, [64, 128] float32."""
    text = kernel_compile.source("wgmma.cuh", {})
    text += (
        'extern "C" __global__ void __launch_bounds__(128) probe(float* out, unsigned short* a, unsigned short* b) {\n'
    )
    text += body.replace("FENCE", "fence_async_proxy();") + "}\n"
    loaded = kernel_compile._backend(device).load(text, "probe", device)
    kernel = kernel_compile.Kernel(loaded, kernel_compile.parameters(text, "probe"))
    out = torch.empty(ROWS, WIDTH, device=device)
    kernel((1, 1, 1), 128, 1024 + (64 + 128) * 256, out.data_ptr(), a.data_ptr(), b.data_ptr())
    return out


def operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, WIDTH, generator=generator).bfloat16().to(device) for rows in (ROWS, WIDTH))
    return a, b


def skip_without_wgmma(device: torch.device) -> None:
    if not kernel_compile.limits(device).wgmma:
        pytest.skip("needs compute capability 9.0")


def test_queries_times_keys_from_shared_memory_is_the_matrix_product(device: torch.device) -> None:
    skip_without_wgmma(device)
    a, b = operands(device)
    torch.testing.assert_close(run(device, BOTH_SHARED, a, b), a.float() @ b.float().T, rtol=1e-4, atol=1e-3)


def test_registers_times_values_from_shared_memory_is_the_matrix_product(device: torch.device) -> None:
    skip_without_wgmma(device)
    a, b = operands(device)
    torch.testing.assert_close(run(device, LEFT_IN_REGISTERS, a, b), a.float() @ b.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("body", "old", "new", "complaint"),
    [
        (BOTH_SHARED, "FENCE", "", "without a fence.proxy.async"),
        (BOTH_SHARED, "wgmma_fence();", "", "without wgmma.fence"),
        (BOTH_SHARED, "wgmma_wait<0>();", "", "not waited for"),
        (BOTH_SHARED, "wgmma_wait<0>();", "left[threadIdx.x] ^= 1; __syncthreads(); wgmma_wait<0>();", "changed under"),
        (BOTH_SHARED, "64 * 128 + k % 4 * 32", "64 * 128 + k % 4 * 32 + 128", "does not start at a swizzle atom"),
        (LEFT_IN_REGISTERS, "16 * 128, 128 * 128", "16 * 128, 1 << 17", "outside shared memory"),
    ],
)
def test_a_wrong_use_is_reported(device: torch.device, body: str, old: str, new: str, complaint: str) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU would not say")
    assert old in body
    with pytest.raises(kernel_compile.KernelError, match=complaint):
        run(device, body.replace(old, new), *operands(device))


def test_accumulators_are_not_there_before_they_are_waited_for(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU would not say")
    body = BOTH_SHARED.replace("wgmma_wait<0>();", "").replace(STORE, STORE + "wgmma_wait<0>();")
    assert run(device, body, *operands(device)).isnan().all()
