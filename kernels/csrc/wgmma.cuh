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
// Ordinary writes to shared memory, cp.async's too, before what wgmma reads; each writing thread calls it before the barrier.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define QUAD(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define VALUES_64 QUAD(0), QUAD(1), QUAD(2), QUAD(3), QUAD(4), QUAD(5), QUAD(6), QUAD(7)
#define VALUES_128 QUAD(0), QUAD(1), QUAD(2), QUAD(3), QUAD(4), QUAD(5), QUAD(6), QUAD(7), \
                   QUAD(8), QUAD(9), QUAD(10), QUAD(11), QUAD(12), QUAD(13), QUAD(14), QUAD(15)

// D = A . B, or D += A . B where `accumulate`; both operands in shared memory, both k-major.
template <class T, int N>
DEVICE void wgmma(float (&d)[N / 8][4], u64 a, u64 b, int accumulate);
// D += A . B; A from registers, B in shared memory, n-major.
template <class T, int N>
DEVICE void wgmma(float (&d)[N / 8][4], const u32 (&a)[4], u64 b);

#define TYPE "bf16"
template <>
DEVICE void wgmma<bfloat16, 64>(float (&d)[8][4], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : VALUES_64 : "l"(a), "l"(b), "r"(accumulate));
}
template <>
DEVICE void wgmma<bfloat16, 64>(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : VALUES_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
DEVICE void wgmma<bfloat16, 128>(float (&d)[16][4], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
      : VALUES_128 : "l"(a), "l"(b), "r"(accumulate));
}
template <>
DEVICE void wgmma<bfloat16, 128>(float (&d)[16][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : VALUES_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef TYPE

#define TYPE "f16"
template <>
DEVICE void wgmma<float16, 64>(float (&d)[8][4], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : VALUES_64 : "l"(a), "l"(b), "r"(accumulate));
}
template <>
DEVICE void wgmma<float16, 64>(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : VALUES_64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
DEVICE void wgmma<float16, 128>(float (&d)[16][4], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
      : VALUES_128 : "l"(a), "l"(b), "r"(accumulate));
}
template <>
DEVICE void wgmma<float16, 128>(float (&d)[16][4], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : VALUES_128 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef TYPE

#undef QUAD
#undef VALUES_64
#undef VALUES_128
#endif
