// Matrix products of a few tokens: out[B, N] = x[B, K] . weight[N, K]^T for B up to 32, with the small operations around them.
//
// Such a product reads every weight once and computes next to nothing: all that counts is that memory never idles. Weights stream
// through a ring of stages of every warp; a CTA starts filling its rings before the kernel in front has ended (programmatic
// dependent launch: weights depend on nobody) and waits only then for its tokens, which travel through the same rings.
// Weights are the A operand of mma.m16n8k16, tokens the B operand, so eight tokens cost one mma for 512 bytes of weights.
//
// The work is a flat list of chunks: 32 elements of K of one tile of ROW_TILES * 16 rows of weights. Every CTA takes an equal
// contiguous share, its warps take the share's chunks in turn and add up at the end of a tile. A tile cut by a share's edge leaves
// partial sums; the CTA that arrives last adds them up in the order of CTAs: the same bits every time.
//
// Defines: DTYPE (bfloat16 | float16), K (multiple of 32), ROW_TILES, TOKEN_TILES (of 8 tokens), WARPS, STAGES, MIN_CTAS,
//   NORMED  1: x is a residual stream; RMSNorm by `norm_weight` and the sums of squares that an ADDING product left
//   EPILOGUE  STORING: out DTYPE [B, N];  FLOATING: out float32 [B, N];
//             GATING: weight is [2 * N, K], gate rows, then up rows; out = silu(gate) * up, DTYPE [B, N];
//             ADDING: out DTYPE [B, N] is added to in place (the residual stream), squares_out [B, N / 16] gets the sums of its squares
#include "device.cuh"

#define STORING 0
#define FLOATING 1
#define GATING 2
#define ADDING 3

constexpr int THREADS = WARPS * 32;
constexpr int CHUNK = 32;
constexpr int CHUNKS = K / CHUNK;  // of a tile
constexpr int ROWS = ROW_TILES * 16;
constexpr int TOKENS = TOKEN_TILES * 8;
constexpr int PITCH = CHUNK * 2;  // bytes of a row of weights or tokens in a stage
constexpr int STAGE_BYTES = (ROWS + TOKENS + NORMED) * PITCH;
constexpr int VALUES = ROWS * TOKENS;  // sums of a tile
static_assert(K % CHUNK == 0 && ROWS % 32 == 0, "whole chunks, and one token a warp in the epilogue");
static_assert(VALUES * 4 <= STAGE_BYTES, "a warp's sums take the place of a stage");

// Place of 16-byte unit `unit` of row `row`: turned by the row, so that eight rows of one column lie in different banks.
DEVICE int place(int row, int unit) { return row * PITCH + (unit ^ (row / 2 % 4)) * 16; }

// Grid: [CTAs]. Block: [WARPS * 32]. Shared: WARPS * STAGES * STAGE_BYTES + (TOKENS + WARPS + 1) * 4 bytes.
//   out, weight, squares_out   see EPILOGUE;  x [num_tokens, K] DTYPE;  norm_weight [K] DTYPE;  squares [num_tokens, K / 16] float32
//   partials   [2 * CTAs, TOKENS, ROWS] float32;  arrivals [tiles] int32, zero between launches
//   num_rows   N, a multiple of ROWS (GATING: of ROWS / 2)
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
linear_skinny(void* out, const DTYPE* x, const DTYPE* __restrict__ weight, const DTYPE* __restrict__ norm_weight,
              const float* squares, float* squares_out, float* partials, int* arrivals, int num_tokens, int num_rows, float eps) {
  SHARED_MEMORY(shared);
  float* factors = (float*)(shared + WARPS * STAGES * STAGE_BYTES);  // [TOKENS]
  int* idle_stage = (int*)(factors + TOKENS);                        // [WARPS] byte offset of the stage a warp leaves to the sums
  int* is_last = idle_stage + WARPS;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4;
  unsigned char* ring = shared + warp * STAGES * STAGE_BYTES;

  let_next_start();

  const int num_tiles = EPILOGUE == GATING ? num_rows / (ROWS / 2) : num_rows / ROWS;
  const int total = num_tiles * CHUNKS, share = ceil_div(total, (int)gridDim.x);
  const int begin = min((int)blockIdx.x * share, total), end = min(begin + share, total);

  int next = begin + warp;  // this warp's next chunk to load
  auto load_weights = [&](int stage) {
    if (next >= end) return;
    const int tile = next / CHUNKS, unit = lane % 4;
    const DTYPE* source = weight + next % CHUNKS * CHUNK + unit * 8;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
      const int row = i * 8 + lane / 4;
      // GATING: a tile of 16 is 8 gate rows over the 8 up rows that belong to them.
      const int from = EPILOGUE == GATING ? (tile * ROW_TILES + i / 2) * 8 + row % 8 + i % 2 * num_rows : tile * ROWS + row;
      copy_async_16_once(ring + stage * STAGE_BYTES + place(row, unit), source + (i64)from * K, true);
    }
  };
  auto load_tokens = [&](int stage, int chunk) {
    if (chunk >= end) return;
    const int column = chunk % CHUNKS * CHUNK + lane % 4 * 8;
    unsigned char* to = ring + stage * STAGE_BYTES + ROWS * PITCH;
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
      const int token = i * 8 + lane / 4;
      copy_async_16(to + place(token, lane % 4), x + (i64)min(token, num_tokens - 1) * K + column, token < num_tokens);
    }
    if (NORMED && lane < 4) copy_async_16(to + TOKENS * PITCH + lane * 16, norm_weight + column, true);
  };

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    load_weights(stage);
    next += WARPS;
  }
  wait_for_previous();
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) load_tokens(stage, begin + warp + stage * WARPS);
  copy_async_commit();
  if (NORMED) {  // what normalises each token; first read behind the barrier of a tile's end
    for (int token = warp; token < num_tokens; token += WARPS) {
      float sum = 0.0f;
#pragma unroll 8
      for (int i = lane; i < K / 16; i += 32) sum += squares[(i64)token * (K / 16) + i];
      sum = warp_sum(sum);
      if (lane == 0) factors[token] = rsqrtf(sum / K + eps);
    }
  }
  copy_async_wait<0>();

  int flat = begin + warp;  // this warp's next chunk to read
  int stage = 0, idle = STAGES - 1;
  for (int segment = begin; segment < end;) {
    const int tile = segment / CHUNKS, tile_begin = tile * CHUNKS, tile_end = tile_begin + CHUNKS;
    const int segment_end = min(tile_end, end);
    float sums[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;

    for (; flat < segment_end; flat += WARPS) {
      copy_async_wait<STAGES - 2>();
      __syncwarp();  // every lane's pieces are there, and every lane is done with the idle stage
      load_weights(idle);
      load_tokens(idle, next);
      next += WARPS;
      copy_async_commit();
      const unsigned char* rows = ring + stage * STAGE_BYTES;
      const unsigned char* tokens = rows + ROWS * PITCH;
      u32 b[TOKEN_TILES][4];  // tokens: matrices of k 0-7, 8-15, 16-23, 24-31
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) {
        load_matrix_x4(b[n], tokens + place(n * 8 + lane % 8, lane / 8));
        if (NORMED) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            b[n][j] = multiply_pairs<DTYPE>(b[n][j], *(const u32*)(tokens + TOKENS * PITCH + j * 16 + t * 4));
        }
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          u32 a[4];  // weights: matrices (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
          load_matrix_x4(a, rows + place(m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n) mma<DTYPE>(sums[m][n], a, b[n][2 * k], b[n][2 * k + 1]);
        }
      idle = stage;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // Add up the warps: each leaves its sums in its idle stage, [TOKENS][ROWS].
    __syncwarp();
    float* own = (float*)(ring + idle * STAGE_BYTES);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) own[(n * 8 + 2 * t + e % 2) * ROWS + m * 16 + g + e / 2 * 8] = sums[m][n][e];
    if (lane == 0) idle_stage[warp] = (int)((unsigned char*)own - shared);
    __syncthreads();
    auto summed = [&](int i) {  // i = token * ROWS + row
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += ((const float*)(shared + idle_stage[w]))[i];
      return sum;
    };
    const bool whole = tile_begin >= begin && tile_end <= end;
    const int first_cta = tile_begin / share, last_cta = (tile_end - 1) / share;
    bool finishes = true;
    if (!whole) {
      float* to = partials + (2 * blockIdx.x + (tile_begin > begin)) * VALUES;
      for (int i = tid; i < VALUES; i += THREADS) to[i] = summed(i);
      __threadfence();  // the part before the arrival
      __syncthreads();
      if (tid == 0) {
        const bool last = atomicAdd(arrivals + tile, 1) == last_cta - first_cta;
        if (last) arrivals[tile] = 0;  // for the next launch
        *is_last = last;
        __threadfence();
      }
      __syncthreads();
      finishes = *is_last;
    }
    if (finishes) {
      auto value = [&](int i) {
        float sum = 0.0f;
        if (whole) {
          sum = summed(i);
        } else {
          for (int c = first_cta; c <= last_cta; ++c) sum += load_l2(partials + (2 * c + (tile_begin > c * share)) * VALUES + i);
        }
        return NORMED ? sum * factors[i / ROWS] : sum;
      };
      for (int i = tid; i < VALUES; i += THREADS) {  // whole warps
        const int token = i / ROWS, row = i % ROWS;
        if (token >= num_tokens) break;  // for all lanes alike: ROWS is a multiple of 32
        if (EPILOGUE == GATING) {
          if (row % 16 < 8) {
            const float gate = value(i), up = value(i + 8);
            ((DTYPE*)out)[(i64)token * num_rows + tile * (ROWS / 2) + row / 16 * 8 + row % 8] =
                from_float<DTYPE>(gate / (1.0f + exp2_fast(-gate * LOG2_E)) * up);
          }
        } else {
          const i64 at = (i64)token * num_rows + tile * ROWS + row;
          const float y = value(i);
          if (EPILOGUE == ADDING) {
            const DTYPE sum = from_float<DTYPE>(to_float(((const DTYPE*)out)[at]) + y);
            ((DTYPE*)out)[at] = sum;
            float square = to_float(sum) * to_float(sum);
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2) square += __shfl_xor_sync(FULL_MASK, square, offset);
            if (row % 16 == 0) squares_out[at / 16] = square;
          } else if (EPILOGUE == FLOATING) {
            ((float*)out)[at] = y;
          } else {
            ((DTYPE*)out)[at] = from_float<DTYPE>(y);
          }
        }
      }
    }
    __syncthreads();  // the sums' places are stages again
    segment = segment_end;
  }
  copy_async_wait<0>();
}
