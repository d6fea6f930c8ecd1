// Matrix products of some tokens with wgmma, for compute capability 9.0: out[B, N] = x[B, K] . weight[N, K]^T for B up to 128.
//
// From some eight tokens on such a product has two streams to keep up with: every weight once from memory, and for every tile of weights
// all tokens from L2. Tiles are as high as a CTA's registers allow (FEATURES rows of weights, the B operand; tokens are the A operand, 64
// a warpgroup), so that tokens are read as seldom as possible. Where there are fewer tiles than multiprocessors, SPLIT CTAs share a tile's K;
// the one that arrives last adds their sums up in the order of K: the same bits every time.
//
// One warpgroup copies, TOKEN_GROUPS warpgroups compute. A stage of the ring is CHUNK = 64 elements of K of a tile's weights and of all
// tokens. The producer fills the ring with weights before the kernel in front has ended, and waits only then for its tokens (programmatic
// dependent launch). It tells of a stage after it has asked for LAG more.
//
// Shared memory of a stage: [FEATURES + 64 * TOKEN_GROUPS][64 elements] in the 128-byte swizzle, see wgmma.cuh.
//
// Defines: DTYPE (bfloat16 | float16), K (multiple of 64), FEATURES (64, 96, 128, 192, 224, 256), TOKEN_GROUPS (1 | 2), SPLIT, STAGES, LAG,
//   EPILOGUE  STORING: out [B, N];  GATING: weight is [2 * N, K], gate rows, then up rows; out [B, N] = silu(gate) * up
#include "hopper.cuh"

#define STORING 0
#define GATING 2

constexpr int CHUNK = 64;
constexpr int CHUNKS = K / CHUNK;
constexpr int TOKENS = TOKEN_GROUPS * 64;
constexpr int THREADS = (TOKEN_GROUPS + 1) * 128;
constexpr int WEIGHTS = FEATURES * CHUNK * 2;           // bytes of a stage's weights
constexpr int STAGE = WEIGHTS + TOKENS * CHUNK * 2;
constexpr int QUADS = FEATURES / 8;                     // of a thread: its sums of eight features
constexpr int COLUMNS = EPILOGUE == GATING ? FEATURES / 2 : FEATURES;  // of out that a tile makes
static_assert(K % CHUNK == 0 && FEATURES % 32 == 0, "whole chunks; a producer's pass of 16 rows has gates or ups");
static_assert(LAG > 0 && STAGES >= LAG + 2 && CHUNKS / SPLIT >= STAGES, "the ring is filled before it turns");

// Grid: [N / COLUMNS, SPLIT]. Block: [THREADS]. Shared: 1024 + STAGES * STAGE + STAGES * 16 + 16 bytes.
//   x [num_tokens, K], out [num_tokens, N], both DTYPE; num_columns N, a multiple of COLUMNS
//   partials   [tiles, SPLIT, QUADS, TOKENS * 2] float4;  arrivals [tiles] int32, zero between launches; both only with SPLIT > 1
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_wgmma(DTYPE* out, const DTYPE* x, const DTYPE* __restrict__ weight, float4* partials, int* arrivals, int num_tokens,
             int num_columns) {
  SHARED_MEMORY(dynamic);
  unsigned char* ring = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // [STAGES][FEATURES + TOKENS][128]
  u64* full = (u64*)(ring + STAGES * STAGE);                                        // [STAGES]
  u64* empty = full + STAGES;                                                       // [STAGES]
  int* is_last = (int*)(empty + STAGES);
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(FULL_MASK, tid / 32, 0);  // so that the compiler sees it is the same in all lanes
  const int tile = blockIdx.x, part = blockIdx.y;
  const int begin = CHUNKS * part / SPLIT, end = CHUNKS * (part + 1) / SPLIT;

  let_next_start();
  if (tid == 0)
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 4);
      barrier_init(empty + i, TOKEN_GROUPS * 4);
    }
  __syncthreads();

  if (warp < 4) {
    const int row = tid / 8, unit = tid % 8;  // a pass copies 16 rows of 128 bytes
    const u32 target = row * 128 + (unit ^ row % 8) * 16;
    const DTYPE* gates = weight + ((i64)tile * COLUMNS + row) * K + unit * 8;
    const DTYPE* ups = gates + (i64)num_columns * K - (i64)COLUMNS * K;  // GATING: the tile's second half
    auto load_weights = [&](int slot, int chunk) {
      unsigned char* to = ring + slot * STAGE + target;
#pragma unroll
      for (int i = 0; i < FEATURES / 16; ++i) {
        const DTYPE* from = EPILOGUE == GATING && i >= FEATURES / 32 ? ups : gates;
        copy_async_16(to + i * 16 * 128, from + i * 16 * K + chunk * CHUNK, true);
      }
    };
    auto load_tokens = [&](int slot, int chunk) {
      unsigned char* to = ring + slot * STAGE + WEIGHTS + target;
#pragma unroll
      for (int i = 0; i < TOKENS / 16; ++i) {
        const int token = i * 16 + row;
        const DTYPE* from = x + (i64)min(token, num_tokens - 1) * K + chunk * CHUNK + unit * 8;
        copy_async_16(to + i * 16 * 128, from, token < num_tokens);
      }
    };
    int done = 0, issued = 0;
    auto deliver = [&]() {
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + done);
      done = done + 1 == STAGES ? 0 : done + 1;
    };
    auto commit = [&]() {
      copy_async_commit();
      if (++issued > LAG) {
        copy_async_wait<LAG>();
        deliver();
      }
    };

#pragma unroll
    for (int i = 0; i < STAGES; ++i) load_weights(i, begin + i);
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
      load_tokens(i, begin + i);
      commit();
    }
    int slot = 0;
    u32 parity = 0;
    for (int chunk = begin + STAGES; chunk < end; ++chunk) {
      barrier_wait(empty + slot, parity);
      load_weights(slot, chunk);
      load_tokens(slot, chunk);
      commit();
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < LAG; ++i) deliver();
    return;
  }

  const int group = warp / 4 - 1, g = lane / 4, t = lane % 4;
  float sums[QUADS][4];
#pragma unroll
  for (int n = 0; n < QUADS; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
  const u64 weight_operand = k_major_operand(ring), token_operand = k_major_operand(ring + WEIGHTS + group * 64 * 128);
  int slot = 0, before = -1;
  u32 parity = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    barrier_wait(full + slot, parity);
    keep_order(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; ++k)
      wgmma<DTYPE, FEATURES>(sums, token_operand + (slot * STAGE + k * 32) / 16, weight_operand + (slot * STAGE + k * 32) / 16, 1);
    wgmma_commit();
    wgmma_wait<1>();  // the products of the stage before have been computed
    if (before >= 0 && lane == 0) barrier_arrive(empty + before);
    before = slot;
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  keep_order(sums);
  wait_for_previous();  // it may still read what this kernel writes

  if (SPLIT > 1) {
    const int thread = tid - 128;
    float4* own = partials + ((i64)(tile * SPLIT + part) * QUADS) * (TOKENS * 2) + thread;
#pragma unroll
    for (int n = 0; n < QUADS; ++n) own[n * (TOKENS * 2)] = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    __threadfence();  // the part before the arrival
    named_barrier_sync(1, TOKENS * 2);
    if (thread == 0) {
      const bool last = atomicAdd(arrivals + tile, 1) == SPLIT - 1;
      if (last) arrivals[tile] = 0;  // for the next launch
      *is_last = last;
      __threadfence();
    }
    named_barrier_sync(1, TOKENS * 2);
    if (!*is_last) return;
  }

  // out of eight features of this thread's two tokens: of gates and ups with GATING
  const int token = group * 64 + warp % 4 * 16 + g;
  DTYPE* to = out + (i64)token * num_columns + tile * COLUMNS + 2 * t;
  auto gated = [](float gate, float up) { return gate / (1.0f + exp2_fast(-gate * LOG2_E)) * up; };
  auto store = [&](int n, float4 y, float4 up) {
    if (EPILOGUE == GATING) y = make_float4(gated(y.x, up.x), gated(y.y, up.y), gated(y.z, up.z), gated(y.w, up.w));
    if (token < num_tokens) *(u32*)(to + n * 8) = pack<DTYPE>(y.x, y.y);
    if (token + 8 < num_tokens) *(u32*)(to + (i64)8 * num_columns + n * 8) = pack<DTYPE>(y.z, y.w);
  };
  constexpr int UPS = EPILOGUE == GATING ? QUADS / 2 : 0;
  if (SPLIT > 1) {
    const float4* parts = partials + ((i64)tile * SPLIT * QUADS) * (TOKENS * 2) + tid - 128;
    auto sum_of_parts = [&](int n) {
      float4 sum = load_l2(parts + n * (TOKENS * 2));
#pragma unroll
      for (int p = 1; p < SPLIT; ++p) {
        const float4 more = load_l2(parts + (p * QUADS + n) * (TOKENS * 2));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      return sum;
    };
#pragma unroll 4
    for (int n = 0; n < COLUMNS / 8; ++n) store(n, sum_of_parts(n), EPILOGUE == GATING ? sum_of_parts(n + UPS) : float4());
  } else {
    auto quad = [&](int n) { return make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]); };
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) store(n, quad(n), quad(n + UPS));
  }
}
