// A CUDA device on a CPU, for running kernels/csrc in tests. Slow, sequential, suspicious.
//
// Every CUDA thread is a fiber. Fibers run one at a time, in an order that changes with the seed, until they reach a barrier or a
// warp-wide instruction. Those instructions are written from the fragment tables of the PTX manual, not from the kernels.
// To find mistakes that a lucky run would hide:
//   shared memory starts as NaN, for every CTA anew; a cp.async poisons its destination and copies only when waited for;
//   warp-wide instructions check that all 32 lanes execute the same one; ldmatrix and cp.async check alignment and bounds;
//   ldmatrix counts bank conflicts; a barrier that not every thread reaches is reported as a deadlock.
// CTAs of one cluster run at the same time, clusters one after another (in shuffled order), so only code that never waits for a CTA outside its
// cluster works, which is all of ours.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__
#define __shared__ static __attribute__((section("shared_variables")))
#define __align__(n) alignas(n)
#define DEVICE inline
#define NEGATIVE_INFINITY (-INFINITY)
#define SHARED_MEMORY(name) unsigned char* name = emulator::cta->shared_memory
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::cta->index)
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

struct Index3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace emulator {

constexpr size_t STACK = 256 * 1024, SHARED_LIMIT = 227 * 1024, LANE_BYTES = 64;
constexpr int CLUSTER_LIMIT = 8;

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

struct Warp {
  alignas(16) unsigned char slots[2][32][LANE_BYTES];
  int operation[2];
  int arrived = 0;
  unsigned generation = 0;
};

struct NamedBarrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Cta {
  alignas(1024) unsigned char shared_memory[SHARED_LIMIT];
  bool unfenced[SHARED_LIMIT / 16];  // 16-byte units that cp.async wrote and no proxy fence followed
  Index3 index;
  int rank;  // in its cluster
  int barrier_arrived, live;
  unsigned barrier_generation;
  NamedBarrier named_barriers[16];
  std::vector<Warp> warps;
  std::vector<unsigned char> variables;  // its __shared__ ones while another CTA of the cluster runs
};

struct Fiber {
  ucontext_t context;
  Index3 index;
  int lane;
  Cta* cta;
  Warp* warp;
  bool done;
  bool waited;  // for the kernels before
  const unsigned* place;  // it need not run while the bits of `mask` there are `value`
  unsigned mask, value;
  std::deque<std::vector<Copy>> groups;
  std::vector<int> unfenced_units;
  std::unique_ptr<char[]> stack;
};

// What the kernel before has yet to write: all bits set until a thread waits for it.
struct Late {
  unsigned char* place;
  std::vector<unsigned char> value;
};
inline std::vector<Late> late;
inline void arrive() {
  for (auto& one : late) std::memcpy(one.place, one.value.data(), one.value.size());
}

inline Fiber* current;
[[noreturn]] void fail(const char* why);

// Bytes that are copied, whenever they land.
inline void must_be_there(const void* from, size_t bytes) {
  if (current->waited) return;
  for (auto& one : late)
    if ((const unsigned char*)from < one.place + one.value.size() && (const unsigned char*)from + bytes > one.place)
      fail("a copy of what the kernel before has yet to write");
}
inline std::vector<std::unique_ptr<Cta>> cluster;
inline Cta* cta;  // of the running thread
inline Index3 block_size, grid_size;
inline size_t shared_bytes;
inline std::mt19937 randomness;
inline ucontext_t scheduler;
inline long events, bank_conflicts, warp_instructions;
inline const char* failure;
inline std::function<void()> body;
inline void (*cluster_begins)();  // hooks of hopper.h
inline void (*thread_ends)();
inline void (*time_passes)();
inline bool (*all_wait)();        // whether something happened that a thread may wait for

// All __shared__ variables together; the linker names the ends, where there are any.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_shared_variables[], __stop_shared_variables[];

inline void yield() { swapcontext(&current->context, &scheduler); }

// Until others have changed the bits of `mask` at `place` to something else than `value`.
inline void wait_while(const void* place, unsigned mask, unsigned value) {
  current->mask = mask;
  current->value = value;
  current->place = (const unsigned*)place;
  while ((*current->place & mask) == value) yield();
  current->place = nullptr;
}

inline void switch_to(Cta* next) {
  const size_t bytes = __stop_shared_variables - __start_shared_variables;
  if (next == cta) return;
  if (bytes) {
    std::memcpy(cta->variables.data(), __start_shared_variables, bytes);
    std::memcpy(__start_shared_variables, next->variables.data(), bytes);
  }
  cta = next;
}

[[noreturn]] inline void fail(const char* why) {
  failure = why;
  for (;;) yield();
}

inline void entry() {
  body();
  if (!current->groups.empty() && !current->groups.back().empty()) failure = "a thread ended with asynchronous copies not committed";
  if (thread_ends) thread_ends();
  current->done = true;
  --cta->live;
  ++events;
  for (;;) yield();
}

inline void barrier() {
  ++events;
  if (++cta->barrier_arrived == int(block_size.x)) {
    cta->barrier_arrived = 0;
    ++cta->barrier_generation;
  } else {
    wait_while(&cta->barrier_generation, ~0u, cta->barrier_generation);
  }
}

// All lanes of the warp give a value and get everyone's.
template <class T>
const T* exchange(int operation, const T& value) {
  static_assert(sizeof(T) <= LANE_BYTES);
  Warp& warp = *current->warp;
  unsigned generation = warp.generation;
  auto& slots = warp.slots[generation % 2];
  if (warp.arrived == 0) warp.operation[generation % 2] = operation;
  if (warp.operation[generation % 2] != operation) fail("lanes of one warp execute different warp-wide instructions");
  static_assert(LANE_BYTES % alignof(T) == 0);
  std::memcpy(reinterpret_cast<T*>(&slots[0][0]) + current->lane, &value, sizeof(T));
  ++events;
  ++warp_instructions;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_while(&warp.generation, ~0u, generation);
  }
  return reinterpret_cast<const T*>(&slots[0][0]);
}

inline bool in_shared(const void* p, size_t bytes) {
  auto* q = (const unsigned char*)p;
  return q >= cta->shared_memory && q + bytes <= cta->shared_memory + shared_bytes;
}

// 0, or -1 with `failure` set. Clusters of `ctas` CTAs that follow one another in the grid's x.
inline int launch(Index3 grid, int threads, size_t shared, int ctas, unsigned seed) {
  failure = nullptr;
  if (shared > SHARED_LIMIT) return failure = "more shared memory than a CTA can have", -1;
  if (threads % 32 || threads > 1024) return failure = "a block is not a number of warps, or too large", -1;
  if (ctas < 1 || ctas > CLUSTER_LIMIT || grid.x % ctas) return failure = "a grid is not a number of clusters, or they are too large", -1;
  randomness.seed(seed);
  grid_size = grid;
  block_size = {unsigned(threads), 1, 1};
  shared_bytes = shared;
  const size_t variables = __stop_shared_variables - __start_shared_variables;
  if (variables) std::memset(__start_shared_variables, 0xff, variables);
  cluster.resize(ctas);
  for (int rank = 0; rank < ctas; ++rank) {
    if (!cluster[rank]) cluster[rank].reset(new Cta);
    cluster[rank]->rank = rank;
    cluster[rank]->warps.resize(threads / 32);
  }
  std::vector<Fiber> fibers(ctas * threads);
  for (auto& fiber : fibers) fiber.stack.reset(new char[STACK]);
  std::vector<u64> clusters(u64(grid.x) * grid.y * grid.z / ctas);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), randomness);
  for (u64 number : clusters) {
    cta = cluster[0].get();
    if (variables) std::memset(__start_shared_variables, 0xff, variables);
    for (auto& member : cluster) {
      const u64 i = number * ctas + member->rank;
      member->index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      std::memset(member->shared_memory, 0xff, sizeof member->shared_memory);
      std::memset(member->unfenced, 0, sizeof member->unfenced);
      member->variables.assign(variables, 0xff);
      member->barrier_arrived = 0;
      member->live = threads;
      for (auto& barrier : member->named_barriers) barrier = {};
      for (auto& warp : member->warps) warp = Warp();
    }
    for (auto& one : late) std::memset(one.place, 0xff, one.value.size());
    if (cluster_begins) cluster_begins();
    std::vector<int> order(fibers.size());
    for (size_t i = 0; i < fibers.size(); ++i) {
      const unsigned t = i % threads;
      Fiber& f = fibers[order[i] = int(i)];
      f.index = {t, 0, 0};
      f.lane = t % 32;
      f.cta = cluster[i / threads].get();
      f.warp = &f.cta->warps[t / 32];
      f.done = f.waited = false;
      f.place = nullptr;
      f.groups.clear();
      f.unfenced_units.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = STACK;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    auto is_live = [](const std::unique_ptr<Cta>& member) { return member->live > 0; };
    while (std::any_of(cluster.begin(), cluster.end(), is_live)) {
      long before = events;
      std::shuffle(order.begin(), order.end(), randomness);
      for (int i : order) {
        Fiber& f = fibers[i];
        if (f.done || (f.place && (*f.place & f.mask) == f.value)) continue;
        current = &f;
        switch_to(f.cta);
        swapcontext(&scheduler, &f.context);
        if (failure) return -1;
      }
      if (time_passes) time_passes();
      const bool stuck = events == before && !(all_wait && all_wait());
      if (stuck && !failure) failure = "deadlock: a barrier or warp-wide instruction that not every thread reaches";
      if (failure) return -1;
    }
  }
  return 0;
}

template <class A>
A argument(const void* from) {
  A value;
  std::memcpy(&value, from, sizeof value);  // it may be aligned worse than A is
  return value;
}
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(argument<A>(arguments[I])...);
}
template <class... A>
int run(void (*kernel)(A...), Index3 grid, int threads, size_t shared, int ctas, void** arguments, unsigned seed) {
  body = [=] { call(kernel, arguments, std::index_sequence_for<A...>()); };
  return launch(grid, threads, shared, ctas, seed);
}

enum Operation { SYNC_WARP, SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, VOTE, LDMATRIX, LDMATRIX_TRANS, MOVMATRIX, MMA, CLUSTER_SYNC };

}  // namespace emulator

// Scalars.
inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  u32 bits = u32(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(float16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {(unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  _Float16 y = (_Float16)x;
  float16 z;
  std::memcpy(&z, &y, 2);
  return z;
}
template <class T>
u32 pack(float low, float high) {
  return u32(from_float<T>(low).bits) | u32(from_float<T>(high).bits) << 16;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
inline i64 max(i64 a, i64 b) { return a > b ? a : b; }
inline u32 __float_as_uint(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int x) { return __uint_as_float(u32(x)); }
inline u32 __umulhi(u32 a, u32 b) { return u32((u64(a) * b) >> 32); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(u32(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T load_l2(const T* p) { return *p; }
template <class T>
void store_vector(T* to, T x) { *to = x; }
inline int load_acquire(const int* p) { return *p; }
template <class T>
T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
inline u32 atomicMax(u32* p, u32 x) { u32 old = *p; *p = std::max(old, x); return old; }
inline u64 atomicMax(u64* p, u64 x) { u64 old = *p; *p = std::max(old, x); return old; }
inline void __threadfence() {}

// Kernels run one after another: nobody starts early, and everything before has finished but what `emulated_late` has named.
inline void let_next_start() {}
inline void wait_for_previous() {
  emulator::current->waited = true;
  emulator::arrive();
}

// Barriers and warp-wide instructions.
inline void __syncthreads() { emulator::barrier(); }
inline void named_barrier_arrive(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) emulator::fail("named barriers are 1 to 15, of whole warps");
  auto& b = emulator::cta->named_barriers[id];
  ++emulator::events;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
}
inline void named_barrier_sync(int id, int threads) {
  const unsigned& generation = emulator::cta->named_barriers[id & 15].generation;
  const unsigned before = generation;
  named_barrier_arrive(id, threads);
  emulator::wait_while(&generation, ~0u, before);
}
inline void __syncwarp(u32 = FULL_MASK) { emulator::exchange(emulator::SYNC_WARP, 0); }
template <class T>
T __shfl_sync(u32, T x, int source) { return emulator::exchange(emulator::SHUFFLE, x)[source & 31]; }
template <class T>
T __shfl_xor_sync(u32, T x, int mask) { return emulator::exchange(emulator::SHUFFLE_XOR, x)[emulator::current->lane ^ mask]; }
template <class T>
T __shfl_up_sync(u32, T x, int delta) {
  int source = emulator::current->lane - delta;
  const T* all = emulator::exchange(emulator::SHUFFLE_UP, x);
  return source < 0 ? x : all[source];
}
template <class T>
T __shfl_down_sync(u32, T x, int delta) {
  int source = emulator::current->lane + delta;
  const T* all = emulator::exchange(emulator::SHUFFLE_DOWN, x);
  return source > 31 ? x : all[source];
}
inline u32 __ballot_sync(u32, bool x) {
  const int* all = emulator::exchange(emulator::VOTE, int(x));
  u32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= u32(all[i] != 0) << i;
  return mask;
}
inline bool __any_sync(u32 mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(u32 mask, bool x) { return __ballot_sync(mask, x) == FULL_MASK; }

namespace emulator {
inline unsigned short element(const void* row, int i) {
  unsigned short x;
  std::memcpy(&x, (const char*)row + 2 * i, 2);
  return x;
}
inline void load_matrices(u32 (&r)[4], const void* row, bool transposed) {
  if ((uintptr_t)row % 16 || !in_shared(row, 16)) fail("ldmatrix reads outside shared memory or unaligned");
  const void* const* rows = exchange(transposed ? LDMATRIX_TRANS : LDMATRIX, row);
  const int g = current->lane / 4, t = current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    if (current->lane == 0) {
      int banks = 0;
      for (int j = 0; j < 8; ++j) banks |= 1 << ((uintptr_t)rows[8 * i + j] / 16 % 8);
      bank_conflicts += 8 - __builtin_popcount(banks);
    }
    if (transposed) r[i] = element(rows[8 * i + 2 * t], g) | u32(element(rows[8 * i + 2 * t + 1], g)) << 16;
    else r[i] = element(rows[8 * i + g], 2 * t) | u32(element(rows[8 * i + g], 2 * t + 1)) << 16;
  }
}
}  // namespace emulator

inline void load_matrix_x4(u32 (&r)[4], const void* row) { emulator::load_matrices(r, row, false); }
inline void load_matrix_x4_trans(u32 (&r)[4], const void* row) { emulator::load_matrices(r, row, true); }
inline u32 transpose_8x8(u32 x) {
  const u32* all = emulator::exchange(emulator::MOVMATRIX, x);
  const int g = emulator::current->lane / 4, t = emulator::current->lane % 4;
  auto at = [&](int row, int column) { return all[row * 4 + column / 2] >> (column % 2 * 16) & 0xffffu; };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}
template <class T>
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Operands {
    u32 a[4], b[2];
  };
  const Operands* all = emulator::exchange(emulator::MMA, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  auto value = [](u32 pair, int i) { return to_float(T{(unsigned short)(pair >> (i * 16))}); };
  const int g = emulator::current->lane / 4, t = emulator::current->lane % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    double sum = d[e];
    for (int k = 0; k < 16; ++k) {
      const Operands& left = all[row % 8 * 4 + k % 8 / 2];
      const Operands& right = all[column * 4 + k % 8 / 2];
      sum += double(value(left.a[row / 8 + k / 8 * 2], k % 2)) * value(right.b[k / 8], k % 2);
    }
    d[e] = float(sum);
  }
}

namespace emulator {
inline void copy_async(void* to, const void* from, int size, bool valid) {
  if (valid) must_be_there(from, size);
  if ((uintptr_t)to % size || (uintptr_t)from % size || !in_shared(to, size)) fail("cp.async outside shared memory or unaligned");
  std::memset(to, 0xff, size);
  if (current->groups.empty()) current->groups.emplace_back();
  current->groups.back().push_back({to, from, valid ? size : 0, size});
}
inline void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.bytes);
}
inline int unit(const Copy& copy) { return int(((unsigned char*)copy.to - cta->shared_memory) / 16); }
}  // namespace emulator
inline void copy_async_16(void* to, const void* from, bool valid) { emulator::copy_async(to, from, 16, valid); }
inline int zero_in_every_lane() { return 0; }
inline void copy_async_16_once(void* to, const void* from, bool valid) { copy_async_16(to, from, valid); }
inline void copy_async_4(void* to, const void* from, bool valid) { emulator::copy_async(to, from, 4, valid); }
inline void copy_async_commit() {
  if (emulator::current->groups.empty()) emulator::current->groups.emplace_back();
  emulator::current->groups.emplace_back();
}
template <int PENDING>
void copy_async_wait() {
  auto& groups = emulator::current->groups;  // the last is open, not committed
  while (int(groups.size()) - 1 > PENDING) {
    for (auto& copy : groups.front()) {
      emulator::land(copy);
      emulator::cta->unfenced[emulator::unit(copy)] = true;
      emulator::current->unfenced_units.push_back(emulator::unit(copy));
    }
    groups.pop_front();
  }
}
