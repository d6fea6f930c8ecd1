// Matrix products with wgmma, for compute capability 9.0: out[B, N] = x[B, K] . weight[N, K]^T, with SwiGLU behind, or with rotation of queries
// and keys (Su et al. 2021) and the cache write.
//
// A product of up to 256 tokens has to read every weight once from memory, and for every tile of weights all tokens from L2, which for some
// hundred tokens is more than L2 delivers. So a tile has all tokens (TOKENS of them, the columns of the products) and ROWS rows of weights,
// CLUSTER CTAs take neighbouring tiles at the same time, and each of them copies a part of the tokens to all. Weights leave L2 first: nobody
// needs them again, and what they would push out costs 2 to 7 % of the time (docs/kernels/linear.md). Where that makes fewer tiles than
// the multiprocessors that it takes to read at full rate, a tile has 64 rows.
//
// One thread copies boxes, a warpgroup for every 64 rows computes. The producer fills the ring with weights before the kernel in front
// has ended, and waits only then for its tokens (programmatic dependent launch).
//
// Shared memory of a stage, CHUNK = 64 elements of K: [ROWS] of weights and [TOKENS] in the 128-byte swizzle, see wgmma.cuh. Rows of weights
// lie in sixteens, with GATING eight gate rows and the eight up rows of the same columns, with ROTATING eight of a head's first half and the
// eight that turn with them, so that one thread has both.
//
// Defines: DTYPE (bfloat16 | float16), K (multiple of 64), ROWS (64 | 128), TOKENS (64 | 96 | 128 | 192 | 256), CLUSTER (1 | 2 | 4), STAGES,
//   SPLIT     CTAs that share a tile's K, 1 unless PARTS
//   EPILOGUE  STORING: out [B, N];  PARTS: out [SPLIT, B, N] float, to be added up by who reads it;
//             GATING: weight is [2 * N, K], gate rows, then up rows; out [B, N] = silu(gate) * up
//             ROTATING: rows of query heads, key heads, value heads; out is the rotated queries, rotated keys and values go to the cache
//   HEAD_DIM  (a multiple of 64), BLOCK_SIZE  with ROTATING
#include "hopper.cuh"

#define STORING 0
#define PARTS 1
#define GATING 2
#define ROTATING 3
#if EPILOGUE == PARTS
typedef float Out;
#else
typedef DTYPE Out;
#endif

constexpr int CHUNK = 64;
constexpr int CHUNKS = K / CHUNK;
constexpr int THREADS = 128 + ROWS / 64 * 128;
constexpr int WEIGHT_BYTES = ROWS * CHUNK * 2, STAGE = WEIGHT_BYTES + TOKENS * CHUNK * 2;
constexpr int QUADS = TOKENS / 8;                                 // of a thread: its sums of eight tokens
constexpr int COLUMNS = EPILOGUE == GATING ? ROWS / 2 : ROWS;     // of out that a tile makes
static_assert(K % CHUNK == 0 && TOKENS % (8 * CLUSTER) == 0 && STAGES >= 2, "whole chunks and swizzle atoms");
static_assert(ROWS % 64 == 0, "whole warpgroups");
#if EPILOGUE == ROTATING
static_assert(ROWS == 64 && HEAD_DIM % 64 == 0, "a tile is a head or a part of one");
#endif
static_assert(SPLIT == 1 || EPILOGUE == PARTS, "nobody adds up what is stored otherwise");

// Grid: [a multiple of CLUSTER]. Block: [THREADS]. Shared: 1024 + STAGES * STAGE + STAGES * 16 bytes.
//   weight  boxes of (64, 8, 2, ROWS / 16) of (K, 8, 2, rows / 16), rows in sixteens as above; with ROTATING of (64, 8, 2, 4, 1) of
//           (K, 8, 2, HEAD_DIM / 16, heads)
//   x       boxes of (64, own_tokens) of (K, num_tokens); own_tokens, which every CTA of a cluster copies: a multiple of 8, at most
//           TOKENS / CLUSTER, together all. Rows of a box that do not exist cost more than rows that do
//   out     [num_tokens, num_columns] as EPILOGUE says; num_columns a multiple of CLUSTER * COLUMNS. With ROTATING [num_tokens, query_heads,
//           HEAD_DIM], and num_columns is that of all heads
//   With ROTATING, else unused:
//   kv            one layer of the pool, [blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE: block_stride elements from block to block,
//                 value_offset from keys to values, the rest contiguous
//   positions     [num_tokens] int64;  cos_sin [positions, HEAD_DIM] float32: cosines, then sines; no kernel writes it
//   slot_mapping  [num_tokens] int64, block * BLOCK_SIZE + offset; below 2^31; negative: the token is not stored
//   settled       whether positions and slot_mapping were written before an earlier launch with 0 (device.cuh)
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
linear_wgmma(Out* out, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, int num_tokens, int own_tokens,
             int num_columns, DTYPE* kv, const i64* positions, const float* __restrict__ cos_sin, const i64* slot_mapping, int query_heads,
             int kv_heads, i64 block_stride, i64 value_offset, int settled) {
  SHARED_MEMORY(dynamic);
  unsigned char* ring = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // [STAGES][ROWS + TOKENS][128]
  u64* full = (u64*)(ring + STAGES * STAGE);                                        // [STAGES]
  u64* empty = full + STAGES;                                                       // [STAGES]
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(FULL_MASK, tid / 32, 0);  // so that the compiler sees it is the same in all lanes
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  // Shares of tiles: those of one tile one after another, a cluster's CTAs at the same share of neighbouring tiles.
  const int shares = num_columns / COLUMNS / CLUSTER * SPLIT, step = gridDim.x / CLUSTER;
  auto tile_of = [&](int share) { return share / SPLIT * CLUSTER + rank; };
  auto first_chunk = [&](int share) { return CHUNKS * (share % SPLIT) / SPLIT; };
  auto last_chunk = [&](int share) { return CHUNKS * (share % SPLIT + 1) / SPLIT; };

  if (EPILOGUE == ROTATING && !settled) wait_for_previous();
  let_next_start();
  if (tid == 0) {
    prefetch_map(&x);  // the weights' is fetched by the first copy, this one would be behind the wait
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, CLUSTER * (ROWS / 16));
    }
    barriers_initialised();
  }
  __syncthreads();
  if (CLUSTER > 1) cluster_sync();

  if (warp == 0) {
    if (lane == 0) {
      // What lies outside x is not copied: nobody stores what is computed from its place.
      const int boxes = min(CLUSTER, ceil_div(num_tokens, own_tokens));
      auto load_weights = [&](int tile, int slot, int chunk) {
        barrier_arrive_expecting(full + slot, WEIGHT_BYTES + boxes * own_tokens * CHUNK * 2);
#if EPILOGUE == ROTATING
        copy_box(ring + slot * STAGE, &weight, full + slot, chunk * CHUNK, 0, 0, tile % (HEAD_DIM / 64) * 4, tile / (HEAD_DIM / 64), EVICT_FIRST);
#else
        copy_box_once(ring + slot * STAGE, &weight, full + slot, chunk * CHUNK, 0, 0, tile * (ROWS / 16));
#endif
      };
      auto load_tokens = [&](int slot, int chunk) {
        if (rank >= boxes) return;
        unsigned char* to = ring + slot * STAGE + WEIGHT_BYTES + rank * own_tokens * CHUNK * 2;
        if (CLUSTER > 1)
          copy_box_to((1 << CLUSTER) - 1, to, &x, full + slot, chunk * CHUNK, rank * own_tokens);
        else
          copy_box(to, &x, full + slot, chunk * CHUNK, rank * own_tokens);
      };
      int share = blockIdx.x / CLUSTER, chunk = first_chunk(share);
      const int filled = min(STAGES, last_chunk(share) - chunk);  // chunks that need not wait for room
      for (int i = 0; i < filled; ++i) load_weights(tile_of(share), i, chunk + i);
      wait_for_previous();
      for (int i = 0; i < filled; ++i) load_tokens(i, chunk + i);
      int slot = filled % STAGES;
      u32 parity = filled < STAGES;
      for (chunk += filled; share < shares; share += step, chunk = first_chunk(share)) {
        for (; chunk < last_chunk(share); ++chunk) {
          barrier_wait(empty + slot, parity);
          load_weights(tile_of(share), slot, chunk);
          load_tokens(slot, chunk);
          if (++slot == STAGES) slot = 0, parity ^= 1;
        }
      }
    }
    __syncwarp();
  } else if (warp >= 4) {
    const int group = warp / 4 - 1, g = lane / 4, t = lane % 4;
    const int sixteen = group * 4 + warp % 4;  // of the tile's rows
    const u64 weight_operand = k_major_operand(ring + group * 64 * 128), token_operand = k_major_operand(ring + WEIGHT_BYTES);
    auto release = [&](int slot) {
      if (CLUSTER > 1) {
        if (lane < CLUSTER) barrier_arrive_at(empty + slot, lane);
      } else if (lane == 0) {
        barrier_arrive(empty + slot);
      }
    };
    float sums[QUADS][4] = {};
    int slot = 0;
    u32 parity = 0;
    for (int share = blockIdx.x / CLUSTER; share < shares; share += step) {
      const int tile = tile_of(share), first = first_chunk(share), last = last_chunk(share);
#if EPILOGUE == ROTATING
      // Of token g of eight, two pairs that turn: columns `column` and the next, and half a head further. Loaded before there are sums.
      const int head = tile / (HEAD_DIM / 64), column = (tile % (HEAD_DIM / 64) * 4 + sixteen) * 8 + 2 * t;
      const bool turns = head < query_heads + kv_heads, stored = head >= query_heads;
      float2 cosine[QUADS], sine[QUADS];
      int slots[QUADS];
#pragma unroll
      for (int n = 0; n < QUADS; ++n) {
        const int token = n * 8 + g;
        const bool exists = token < num_tokens;
        cosine[n] = sine[n] = make_float2(0.0f, 0.0f);
        if (exists && turns) {
          const float* angles = cos_sin + positions[token] * HEAD_DIM + column;
          cosine[n] = *(const float2*)angles, sine[n] = *(const float2*)(angles + HEAD_DIM / 2);
        }
        slots[n] = exists && stored ? (int)slot_mapping[token] : -1;
      }
#endif
      for (int chunk = first, before = -1; chunk < last; ++chunk) {
        barrier_wait(full + slot, parity);
        keep_order(sums);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k)
          wgmma<DTYPE, TOKENS>(sums, weight_operand + (slot * STAGE + k * 32) / 16, token_operand + (slot * STAGE + k * 32) / 16,
                               chunk > first || k > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the products of the stage before have been computed
        if (before >= 0) release(before);
        before = slot;
        if (++slot == STAGES) slot = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      keep_order(sums);
      release(slot == 0 ? STAGES - 1 : slot - 1);
      wait_for_previous();  // it may still read what this kernel writes

      // A thread's sums are of rows g and g + 8 of sixteen and of tokens 2 t and 2 t + 1 of eight.
      if constexpr (EPILOGUE == PARTS) {
        float* to = (float*)out + ((i64)(share % SPLIT) * num_tokens + 2 * t) * num_columns + tile * COLUMNS + sixteen * 16 + g;
#pragma unroll
        for (int n = 0; n < QUADS; ++n, to += (i64)8 * num_columns) {
          if (n * 8 + 2 * t < num_tokens) to[0] = sums[n][0], to[8] = sums[n][2];
          if (n * 8 + 2 * t + 1 < num_tokens) to[num_columns] = sums[n][1], to[num_columns + 8] = sums[n][3];
        }
        continue;
      }
#if EPILOGUE == ROTATING
#pragma unroll
      for (int n = 0; n < QUADS; ++n) {
        const float(&q)[4] = sums[n];
        u32 y = transpose_8x8(pack<DTYPE>(q[0], q[1])), z = transpose_8x8(pack<DTYPE>(q[2], q[3]));
        if (turns) {
          const float2 a = unpack<DTYPE>(y), b = unpack<DTYPE>(z), c = cosine[n], s = sine[n];
          y = pack<DTYPE>(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
          z = pack<DTYPE>(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
        }
        const int token = n * 8 + g;
        const int place = slots[n];
        const int kv_head = turns ? head - query_heads : head - query_heads - kv_heads;
        DTYPE* to = (DTYPE*)out + ((i64)token * query_heads + head) * HEAD_DIM;
        if (stored) {
          const int row = kv_head * BLOCK_SIZE + place % BLOCK_SIZE;  // of a block's keys or values
          to = kv + (i64)(place / BLOCK_SIZE) * block_stride + (turns ? 0 : value_offset) + row * HEAD_DIM;
        }
        if (stored ? place >= 0 : token < num_tokens) *(u32*)(to + column) = y, *(u32*)(to + HEAD_DIM / 2 + column) = z;
      }
#else
      // Transposed, of token g and of columns 2 t and 2 t + 1 of eight.
      DTYPE* to = (DTYPE*)out + (i64)g * num_columns + tile * COLUMNS + sixteen * (COLUMNS * 16 / ROWS) + 2 * t;
#pragma unroll
      for (int n = 0; n < QUADS; ++n, to += (i64)8 * num_columns) {
        const float(&q)[4] = sums[n];
        const bool exists = n * 8 + g < num_tokens;
        if (EPILOGUE == GATING) {
          auto gated = [](float gate, float up) { return __fdividef(gate, 1.0f + exp2_fast(-gate * LOG2_E)) * up; };
          const u32 y = transpose_8x8(pack<DTYPE>(gated(q[0], q[2]), gated(q[1], q[3])));
          if (exists) *(u32*)to = y;
        } else {
          const u32 y = transpose_8x8(pack<DTYPE>(q[0], q[1])), z = transpose_8x8(pack<DTYPE>(q[2], q[3]));
          if (exists) *(u32*)to = y, *(u32*)(to + 8) = z;
        }
      }
#endif
    }
  }
  if (CLUSTER > 1) cluster_sync();  // nobody reaches for shared memory that is gone
}
