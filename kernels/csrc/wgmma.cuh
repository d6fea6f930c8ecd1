// Hopper's warpgroup matrix products (wgmma, sm_90a): D (64 x N, float32 in registers) += A (64 x 16) . B (16 x N).
//
// Four warps that start at a multiple of four execute each of these together. D is held like four C fragments of mma.m16n8k16 under one
// another: warp w has rows 16 w to 16 w + 15, quad n the columns 8 n to 8 n + 7. A from registers is held like an A fragment of the same.
//
// Operands in shared memory are rows of 128 bytes (64 elements), row after row, in groups of eight that start at a multiple of 1024 bytes;
// 16-byte unit u of row r lies at u ^ (r % 8). A descriptor (PTX ISA, "matrix descriptor") holds, in 16-byte units: bits 0-13 the address,
// 16-29 the leading and 32-45 the stride byte offset; bits 62-63 are 1, swizzling over 128 bytes.
//   k_major_operand  rows are rows of A or columns of B, elements along k: eight rows further is `stride`; the leading offset is not used
//   n_major_operand  rows are k, elements along n: 64 columns further is `leading`, eight k further is 1024 bytes
#pragma once
#include "device.cuh"
#ifdef PAGEWIRE_EMULATED
#include "hopper.h"
#endif

DEVICE u64 descriptor(u32 address, u32 leading, u32 stride) {
  return (u64)((address & 0x3ffffu) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}
DEVICE u64 k_major_operand(const void* rows) { return descriptor(shared_address(rows), 16, 1024); }
DEVICE u64 n_major_operand(const void* rows, u32 leading) { return descriptor(shared_address(rows), leading, 1024); }

#ifndef PAGEWIRE_EMULATED

// Registers of D and A are read and written behind the program's back from here on, until the wait.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Between ordinary writes to shared memory, cp.async's too, and wgmma's reads: by each writing thread before the barrier, or by the reading
// ones behind it.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define TEN(n) "%" #n "0, %" #n "1, %" #n "2, %" #n "3, %" #n "4, %" #n "5, %" #n "6, %" #n "7, %" #n "8, %" #n "9, "
#define NAMES_32 "{" TEN() TEN(1) TEN(2) "%30, %31}"
#define NAMES_48 "{" TEN() TEN(1) TEN(2) TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47}"
#define NAMES_64 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63}"
#define NAMES_96 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95}"
#define NAMES_112 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) "%110, %111}"
#define NAMES_128 "{" TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
                  "%120, %121, %122, %123, %124, %125, %126, %127}"
#define QUAD(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define QUADS(i) QUAD(i), QUAD(i + 1), QUAD(i + 2), QUAD(i + 3), QUAD(i + 4), QUAD(i + 5), QUAD(i + 6), QUAD(i + 7)
#define VALUES_32 QUADS(0)
#define VALUES_48 QUADS(0), QUAD(8), QUAD(9), QUAD(10), QUAD(11)
#define VALUES_64 QUADS(0), QUADS(8)
#define VALUES_96 VALUES_64, QUADS(16)
#define VALUES_112 VALUES_96, QUAD(24), QUAD(25), QUAD(26), QUAD(27)
#define VALUES_128 QUADS(0), QUADS(8), QUADS(16), QUADS(24)

// D = A . B, or D += A . B where `accumulate`; both operands in shared memory, both k-major.
template <class T, int N>
DEVICE void wgmma(float (&d)[N / 8][4], u64 a, u64 b, int accumulate);
// D += A . B; A from registers, B in shared memory, n-major.
template <class T, int N>
DEVICE void wgmma(float (&d)[N / 8][4], const u32 (&a)[4], u64 b);

// COUNT registers of D; N0 to N4 number the operands behind them.
#define WGMMA(T, TYPE, N, COUNT, N0, N1, N2, N3, N4)                                                                       \
  template <>                                                                                                              \
  DEVICE void wgmma<T, N>(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) {                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #N2 ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES_##COUNT                         \
                 ", %" #N0 ", %" #N1 ", p, 1, 1, 0, 0;\n}"                                                                 \
                 : VALUES_##COUNT : "l"(a), "l"(b), "r"(accumulate));                                                      \
  }                                                                                                                        \
  template <>                                                                                                              \
  DEVICE void wgmma<T, N>(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " NAMES_##COUNT                         \
                 ", {%" #N0 ", %" #N1 ", %" #N2 ", %" #N3 "}, %" #N4 ", 1, 1, 1, 1;"                                       \
                 : VALUES_##COUNT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
  }
WGMMA(bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36)
WGMMA(bfloat16, "bf16", 96, 48, 48, 49, 50, 51, 52)
WGMMA(bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68)
WGMMA(bfloat16, "bf16", 192, 96, 96, 97, 98, 99, 100)
WGMMA(bfloat16, "bf16", 224, 112, 112, 113, 114, 115, 116)
WGMMA(bfloat16, "bf16", 256, 128, 128, 129, 130, 131, 132)
WGMMA(float16, "f16", 64, 32, 32, 33, 34, 35, 36)
WGMMA(float16, "f16", 96, 48, 48, 49, 50, 51, 52)
WGMMA(float16, "f16", 128, 64, 64, 65, 66, 67, 68)
WGMMA(float16, "f16", 192, 96, 96, 97, 98, 99, 100)
WGMMA(float16, "f16", 224, 112, 112, 113, 114, 115, 116)
WGMMA(float16, "f16", 256, 128, 128, 129, 130, 131, 132)

// The compiler knows nothing of the asynchrony: it must not move uses of D across this.
template <int N>
DEVICE void keep_order(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : QUAD(n)::"memory");
}

#undef WGMMA
#undef TEN
#undef NAMES_32
#undef NAMES_48
#undef NAMES_64
#undef NAMES_96
#undef NAMES_112
#undef NAMES_128
#undef QUAD
#undef QUADS
#undef VALUES_32
#undef VALUES_48
#undef VALUES_64
#undef VALUES_96
#undef VALUES_112
#undef VALUES_128
#endif
