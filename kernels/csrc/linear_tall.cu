// Gate and up projection of some hundred and more tokens with SwiGLU behind, by wgmma, for compute capability 9.0:
// out[B, N] = silu(x . gate^T) * (x . up^T).
//
// A tile of 256 tokens and 224 rows of weights has its sums in seven eighths of a multiprocessor's registers. So large a tile reads shared memory
// and L2 29 % less often for as many operations than one of 256 x 128, and the 28672 rows of Llama-3.1-8B are 128 of them, for 132
// multiprocessors. Two warpgroups have 224 sums a thread, and no register is left for a producer: one of the threads that compute copies boxes
// as well. What it waits for, that all have multiplied the chunk before, is nearly over when it looks, and the products of the next one are
// under way meanwhile. CTAs are in pairs that take neighbouring tiles, and each copies half of the tokens to both.
//
// A warpgroup does nothing for sixty-four tokens that do not exist: a tile's time is that of those it has. TILES_AT_ONCE tiles of tokens are
// multiplied by all weights before the next ones, so that CTAs which run at the same time need the same.
//
// Shared memory, in the 128-byte swizzle of wgmma.cuh: rings of chunks, 64 elements of K. Of a chunk's rows of weights the first half are gate
// rows, the second the up rows of the same columns; each half in sixteens, whose place 8 q + 2 t + e has row 4 t + 2 q + e: so a thread has
// four columns in a row, and four threads write all of a 32-byte sector.
//
// Defines: DTYPE (bfloat16 | float16), K (multiple of 64), GROUPS warpgroups with BLOCKS (1 | 2) blocks of 64 tokens each, ROWS (of wgmma.cuh's
//   widths, a multiple of 32), STAGES of tokens, EXTRA (0 | 1) stages more of weights, for tokens so few that memory is what limits
#include "hopper.cuh"

constexpr int CHUNK = 64;
constexpr int CHUNKS = K / CHUNK;
constexpr int BOXES = GROUPS * BLOCKS, TOKENS = 64 * BOXES, THREADS = 128 * GROUPS;
constexpr int BOX_BYTES = 64 * CHUNK * 2;                         // of tokens
constexpr int TOKEN_STAGE = BOXES * BOX_BYTES, WEIGHT_STAGE = ROWS * CHUNK * 2, WEIGHT_STAGES = STAGES + EXTRA;
constexpr int QUADS = ROWS / 8;                                   // of a thread's block: its sums of eight rows of weights
constexpr int COLUMNS = ROWS / 2;                                 // of out that a tile makes
constexpr int TILES_AT_ONCE = 8;                                  // of tokens
constexpr int PAIR = 2;                                           // CTAs of a cluster
static_assert(K % CHUNK == 0 && ROWS % 32 == 0 && STAGES >= 2, "whole chunks");
static_assert((BLOCKS == 1 || BLOCKS == 2) && (EXTRA == 0 || EXTRA == 1), "as below");

// Where a ring is.
template <int N>
struct Slot {
  int slot = 0;
  u32 parity = 0;
  DEVICE void next() {
    if (++slot == N) slot = 0, parity ^= 1;
  }
};

// All of a tile's chunks, with the first PRESENT of a warpgroup's blocks of tokens. Not a branch around the other block's products: the compiler
// would wait for products where branches meet.
template <int PRESENT, class Release>
DEVICE void multiply(float (&sums)[BLOCKS][QUADS][4], u64 token_operand, u64 weight_operand, u64* tokens_there, u64* weights_there,
                     Slot<STAGES>& tokens, Slot<WEIGHT_STAGES>& weights, const Release& release) {
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    barrier_wait(tokens_there + tokens.slot, tokens.parity);
    barrier_wait(weights_there + weights.slot, weights.parity);
#pragma unroll
    for (int b = 0; b < PRESENT; ++b) keep_order(sums[b]);
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < PRESENT; ++b)
#pragma unroll
      for (int k = 0; k < CHUNK / 16; ++k)
        wgmma<DTYPE, ROWS>(sums[b], token_operand + (tokens.slot * TOKEN_STAGE + b * GROUPS * BOX_BYTES + k * 32) / 16,
                           weight_operand + (weights.slot * WEIGHT_STAGE + k * 32) / 16, chunk > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();  // the products of the chunk before have been computed
    if (chunk > 0) release();
    tokens.next();
    weights.next();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int b = 0; b < PRESENT; ++b) keep_order(sums[b]);
  release();
}

// Grid: [an even number]. Block: [THREADS]. Shared: 1024 + STAGES * TOKEN_STAGE + WEIGHT_STAGES * WEIGHT_STAGE + 3 * 8 * WEIGHT_STAGES bytes.
//   gate, up  boxes of (64, 2, 4, 2, ROWS / 32) of (K, 2, 4, 2, num_columns / 16), as above
//   x         boxes of (64, 64) of (K, num_tokens)
//   out       [num_tokens, num_columns]; num_columns a multiple of 16
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
linear_tall(DTYPE* out, const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
            int num_tokens, int num_columns) {
  SHARED_MEMORY(dynamic);
  unsigned char* token_ring = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // [STAGES][TOKENS][128]
  unsigned char* weight_ring = token_ring + STAGES * TOKEN_STAGE;                         // [WEIGHT_STAGES][ROWS][128]
  u64* weights_there = (u64*)(weight_ring + WEIGHT_STAGES * WEIGHT_STAGE);                // [WEIGHT_STAGES]
  u64* tokens_there = weights_there + WEIGHT_STAGES;                                      // [STAGES]
  u64* multiplied = tokens_there + STAGES;                                                // [STAGES]: the chunk of these tokens, by all warps
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(FULL_MASK, tid / 32, 0);  // so that the compiler sees it is the same in all lanes
  const int group = warp / 4, rank = cluster_rank();
  const int neighbours = ceil_div(num_columns, COLUMNS * PAIR), token_tiles = ceil_div(num_tokens, TOKENS);
  const int shares = neighbours * token_tiles, step = gridDim.x / PAIR;
  struct Place {
    int tile, token;
  };
  // Of a share: a tile of weights and the first of its tokens. Tiles of tokens take turns, so that all CTAs get the last one, which is shorter.
  auto place_of = [&](int share) -> Place {
    const int first = share / (neighbours * TILES_AT_ONCE) * TILES_AT_ONCE, tiles = min(TILES_AT_ONCE, token_tiles - first);
    const int place = share % (neighbours * TILES_AT_ONCE), turn = step % tiles ? 0 : place / step;
    return {place / tiles * PAIR + rank, (first + (place + turn) % tiles) * TOKENS};
  };

  let_next_start();
  if (tid == 0) {
    for (int i = 0; i < WEIGHT_STAGES; ++i) barrier_init(weights_there + i, 1);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(tokens_there + i, 1);
      barrier_init(multiplied + i, PAIR * GROUPS * 4);
    }
    barriers_initialised();
  }
  __syncthreads();
  cluster_meet();

  // The producer's: what it copies next, and where. Boxes that lie outside x are not copied: nobody multiplies what is in their place.
  int load_share = blockIdx.x / PAIR, load_chunk = 0;
  Place load_place = place_of(load_share);
  const u64 policy = token_tiles == 1 ? EVICT_FIRST : EVICT_NORMAL;
  auto load_weights = [&](int slot) {
    if (load_share >= shares) return;
    barrier_arrive_expecting(weights_there + slot, WEIGHT_STAGE);
    unsigned char* to = weight_ring + slot * WEIGHT_STAGE;
    copy_box(to, &gate, weights_there + slot, load_chunk * CHUNK, 0, 0, 0, load_place.tile * (ROWS / 32), policy);
    copy_box(to + WEIGHT_STAGE / 2, &up, weights_there + slot, load_chunk * CHUNK, 0, 0, 0, load_place.tile * (ROWS / 32), policy);
  };
  auto load_tokens = [&](int slot) {
    if (load_share >= shares) return;
    barrier_arrive_expecting(tokens_there + slot, min(BOXES, ceil_div(num_tokens - load_place.token, 64)) * BOX_BYTES);
#pragma unroll
    for (int i = 0; i < BOXES; i += PAIR) {
      const int box = i + rank, token = load_place.token + box * 64;
      if (token >= num_tokens || box >= BOXES) break;
      unsigned char* to = token_ring + slot * TOKEN_STAGE + box * BOX_BYTES;
      copy_box_to(3, to, &x, tokens_there + slot, load_chunk * CHUNK, token);
    }
  };
  auto next_chunk = [&] {
    if (++load_chunk < CHUNKS) return;
    load_chunk = 0;
    load_share += step;
    if (load_share < shares) load_place = place_of(load_share);
  };
  if (tid == 0) {
    for (int i = 0; i < WEIGHT_STAGES; ++i, next_chunk()) load_weights(i);
    load_share = blockIdx.x / PAIR, load_chunk = 0;
    load_place = place_of(load_share);
    wait_for_previous();
    for (int i = 0; i < STAGES; ++i, next_chunk()) load_tokens(i);
  }
  __syncwarp();
  Slot<STAGES> behind;
  Slot<WEIGHT_STAGES> weights_behind;
  // The chunk before has been multiplied by this warp: says so, and once all warps have, copies the next boxes to its place.
  auto release = [&] {
    if (lane < PAIR) barrier_arrive_at(multiplied + behind.slot, lane);
    if (tid == 0 && load_share < shares) {
      barrier_wait(multiplied + behind.slot, behind.parity);
      load_tokens(behind.slot);
      if (EXTRA) next_chunk();
      load_weights(weights_behind.slot);
      if (!EXTRA) next_chunk();
    }
    __syncwarp();
    behind.next();
    weights_behind.next();
  };

  const int g = lane / 4, t = lane % 4;
  const u64 weight_operand = k_major_operand(weight_ring), token_operand = k_major_operand(token_ring + group * BOX_BYTES);
  float sums[BLOCKS][QUADS][4] = {};
  Slot<STAGES> token_slot;
  Slot<WEIGHT_STAGES> weight_slot;
  for (int share = blockIdx.x / PAIR; share < shares; share += step) {
    const Place place = place_of(share);
    const int tokens = num_tokens - place.token - group * 64, columns = num_columns - place.tile * COLUMNS;  // from here on
    const int blocks = ceil_div(tokens, GROUPS * 64);
    if (blocks >= BLOCKS)
      multiply<BLOCKS>(sums, token_operand, weight_operand, tokens_there, weights_there, token_slot, weight_slot, release);
    else if (BLOCKS == 2 && blocks == 1)
      multiply<1>(sums, token_operand, weight_operand, tokens_there, weights_there, token_slot, weight_slot, release);
    else
      multiply<0>(sums, token_operand, weight_operand, tokens_there, weights_there, token_slot, weight_slot, release);
    wait_for_previous();  // it may still read what this kernel writes

    // A thread's sums are of tokens g and g + 8 of sixteen; those of two quads are of columns 4 t to 4 t + 3 of sixteen.
    auto gated = [](float gate, float up) { return __fdividef(gate, 1.0f + exp2_fast(-gate * LOG2_E)) * up; };
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      const int row = b * GROUPS * 64 + warp % 4 * 16 + g;
      DTYPE* to = out + (i64)(place.token + group * 64 + row) * num_columns + place.tile * COLUMNS + 4 * t;
      DTYPE* below = to + (i64)8 * num_columns;
#pragma unroll
      for (int n = 0; n < QUADS / 2; n += 2) {
        u32 y[2], z[2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const float(&gate)[4] = sums[b][n + q], (&up)[4] = sums[b][QUADS / 2 + n + q];
          y[q] = pack<DTYPE>(gated(gate[0], up[0]), gated(gate[1], up[1]));
          z[q] = pack<DTYPE>(gated(gate[2], up[2]), gated(gate[3], up[3]));
        }
        if (row < tokens && n * 8 < columns) *(uint2*)(to + n * 8) = {y[0], y[1]};
        if (row + 8 < tokens && n * 8 < columns) *(uint2*)(below + n * 8) = {z[0], z[1]};
      }
    }
  }
  cluster_meet();  // nobody reaches for shared memory that is gone
}
