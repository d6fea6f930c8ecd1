// What every kernel file starts from: element types, conversions, and one function per PTX instruction used.
//
// No CUDA header is included, so NVRTC needs no include path and compiles in a fraction of the time.
// DTYPE (bfloat16 | float16 | float32) is the element type of activations and of the KV cache; all arithmetic is float32.
// tests/kernels/emulator provides the same functions on a CPU (PAGEWIRE_EMULATED), written from the PTX manual's
// fragment tables, so the kernels' index arithmetic can be run and checked without a GPU.
//
// Fragments, for lane = 4 * g + t (g = 0..7, t = 0..3), a pair (x, x + 1) packed with the lower index in the lower half:
//   mma.m16n8k16  A (16 x 16): a0 = A[g][2t], a1 = A[g + 8][2t], a2 = A[g][2t + 8], a3 = A[g + 8][2t + 8]   (pairs along k)
//                 B (16 x 8):  b0 = B[2t][g], b1 = B[2t + 8][g]                                             (pairs along k)
//                 C (16 x 8):  c0 = C[g][2t], c1 = C[g][2t + 1], c2 = C[g + 8][2t], c3 = C[g + 8][2t + 1]   (float32)
//   ldmatrix      lane 8i + r gives the address of row r (16 bytes) of 8x8 matrix i; register i of lane (g, t) = M_i[g][2t], pair
//   ldmatrix.trans the same with every matrix transposed: register i = M_i[2t][g], pair along the rows of memory
//   movmatrix     transposes one 8x8 matrix held as M[g][2t] into M[2t][g]
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL_MASK = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
// L2's policies, as createpolicy makes them, for all of what is read.
constexpr u64 EVICT_FIRST = 0x12f0000000000000, EVICT_NORMAL = 0x1000000000000000;

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};
typedef float float32;

#ifdef PAGEWIRE_EMULATED
#include "emulator.h"
#else

#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#define DEVICE __device__ __forceinline__
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounds to nearest even.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) { return x; }
template <>
DEVICE bfloat16 from_float<bfloat16>(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
DEVICE float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two floats to one register: `low` in the lower half, which is the lower address and the lower index of a fragment pair.
template <class T>
DEVICE u32 pack(float low, float high);
template <>
DEVICE u32 pack<bfloat16>(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
DEVICE u32 pack<float16>(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE u32 transpose_8x8(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d += a * b on one m16n8k16 tile.
template <class T>
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
template <>
DEVICE void mma<bfloat16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma<float16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 0, which the compiler does not know.
DEVICE int zero_in_every_lane() {
  int zero;
  asm("{ .reg .u32 after; mov.u32 after, %%lanemask_gt; mov.u32 %0, %%lanemask_lt; and.b32 %0, %0, after; }" : "=r"(zero));
  return zero;
}

// Asynchronous 16-byte copy to shared memory; writes zeros and reads nothing where !valid.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// The same of what is read once: the line leaves L2 before others do.
DEVICE void copy_async_16_once(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0), "l"(EVICT_FIRST)
               : "memory");
}
// The same for 4 bytes.
DEVICE void copy_async_4(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's latest groups are unfinished. Others see the data after a barrier.
template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers 1 to 15 of some of a CTA's warps; `threads` counts those that sync and those that arrive.
DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Programmatic dependent launch: the next kernel of the stream may start its CTAs wherever there is room, now ...
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// ... and before it reads or writes what an earlier kernel may write or read it waits until all of those have finished. Every kernel
// that calls this is launched early (kernels/compile.py): every thread must call it before all such accesses, and what earlier kernels
// write must not be `const __restrict__` or read by __ldg, because the compiler may move such loads in front of the wait.
//
// A kernel that waits before it lets the next start is a line: whatever is launched behind it, however early it starts, starts after
// all that was launched before. What was written there is settled, and later kernels may read it before they wait.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// One access each: the compiler may take a store of a vector apart.
DEVICE void store_vector(uint2* to, uint2 x) { asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory"); }
DEVICE void store_vector(float4* to, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// Loads that skip L1, for data that another CTA of the same launch wrote.
DEVICE float load_l2(const float* p) { return __ldcg(p); }
DEVICE float2 load_l2(const float2* p) { return __ldcg(p); }
DEVICE float4 load_l2(const float4* p) { return __ldcg(p); }
DEVICE u32 load_l2(const u32* p) { return __ldcg(p); }
DEVICE u64 load_l2(const u64* p) { return __ldcg(p); }
// What other CTAs wrote before they set this is there afterwards.
DEVICE int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

#endif

// exp(x) - exp(-x) over their sum, by one ex2: absolute error near 1e-7, where tanh.approx has 5e-4.
DEVICE float tanh_fast(float x) {
  float e = exp2_fast(fabsf(x) * (-2.0f * LOG2_E));
  return copysignf((1.0f - e) / (1.0f + e), x);
}

// The two numbers that `pack` put together.
template <class T>
DEVICE float2 unpack(u32 pair) {
  return make_float2(to_float(T{(unsigned short)pair}), to_float(T{(unsigned short)(pair >> 16)}));
}

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Sum over a warp, in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
  return x;
}
DEVICE int warp_inclusive_scan(int x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    int below = __shfl_up_sync(FULL_MASK, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

// N elements of T moved as one access; alignment N * sizeof(T).
template <class T, int N>
struct __align__(N * sizeof(T)) Vector {
  T values[N];
};
