// Prefill attention over a paged KV cache: causal attention of chunks of new tokens over their sequences' whole contexts, which
// already hold the chunks' own keys and values. The scheme is FlashAttention-2's (arXiv:2307.08691): a tile of queries stays, keys
// and values stream past it, softmax is kept online, nothing of size tokens x tokens is stored.
//
// A row is a (query token, query head of the KV head's group) pair, row = token * group + head: all heads that share keys share
// their reads, and short chunks still fill a tile. A CTA has WARPS * ROW_TILES * 16 rows; a warp has ROW_TILES tiles of 16.
//   S[16 rows][8 tokens] += Q[16][16] . K^T[16][8]     A = Q by ldmatrix,                   B = K by ldmatrix
//   O[16 rows][8 dims]   += P[16][16] . V[16][8]       A = P from S's C fragment, in place,  B = V by ldmatrix.trans
// Keys and values are double buffered with cp.async, block ids travel the same way one tile further ahead.
//
// Defines: DTYPE (bfloat16 | float16), HEAD_DIM (multiple of 16), BLOCK_SIZE, WARPS, ROW_TILES, KV_TILE (multiple of 16), MIN_CTAS.
#include "device.cuh"
#include "prefill_tiles.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int WARP_ROWS = ROW_TILES * 16;
constexpr int ROWS = WARPS * WARP_ROWS;
constexpr int PITCH = HEAD_DIM * 2 + 16;  // bytes of a row in shared memory: an odd number of 16-byte units, so ldmatrix has no conflicts
constexpr int CHUNKS = HEAD_DIM / 8;      // 16-byte pieces of a row
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int TOKEN_TILES = KV_TILE / 8;
static_assert(KV_TILE % 16 == 0 && HEAD_DIM % 16 == 0, "whole mma steps");
static_assert(KV_TILE <= THREADS, "one thread fetches one token's block id");

// Grid: [num_kv_heads, row tiles of CTAs: at least sum over sequences of ceil(tokens * group / ROWS)]. Block: [WARPS * 32].
// Shared: (ROWS + 4 * KV_TILE) * PITCH + 3 * KV_TILE * 4 + (WARPS + 4) * 4 bytes.
//   out, query      [tokens, num_kv_heads * group, HEAD_DIM] DTYPE, out_stride and query_stride elements from token to token
//   kv              one layer of the pool, [blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE: block_stride elements from block to
//                   block, value_offset from keys to values, the rest contiguous; slots beyond context_lens are never read
//   block_tables    [num_seqs, table_stride] int32
//   context_lens    [num_seqs] int32, tokens in the cache, the chunk's included
//   query_start     [num_seqs + 1] int32, sequence s has tokens query_start[s] .. query_start[s + 1], the last of its context
//   group           query heads per KV head;  window: tokens a query sees, itself included, 0 = all;  soft_cap: 0 = none
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
paged_attention_prefill(DTYPE* __restrict__ out, const DTYPE* __restrict__ query, const DTYPE* __restrict__ kv,
                        const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                        const int* __restrict__ query_start, int num_seqs, int group, int table_stride, i64 block_stride,
                        i64 value_offset, i64 query_stride, i64 out_stride, float scale, int window, float soft_cap) {
  SHARED_MEMORY(shared);
  unsigned char* queries = shared;                           // [ROWS][PITCH]
  unsigned char* keys = queries + ROWS * PITCH;              // [2][KV_TILE][PITCH]
  unsigned char* values = keys + 2 * KV_TILE * PITCH;        // [2][KV_TILE][PITCH]
  int* block_ids = (int*)(values + 2 * KV_TILE * PITCH);     // [3][KV_TILE], one per token
  int* scan = block_ids + 3 * KV_TILE;                       // [WARPS]
  int* found = scan + WARPS;                                 // [4]: sequence, tile of the sequence, its first token, its tokens
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.x;

  find_tile<ROWS, WARPS>(query_start, num_seqs, group, scan, found);
  const int seq = found[0];
  if (seq < 0) return;  // the grid is an upper bound
  const int row_base = found[1] * ROWS, first_query = found[2], num_tokens = found[3];
  const int num_rows = num_tokens * group;
  const int context_len = context_lens[seq];
  const int first_position = context_len - num_tokens;  // of the chunk's first token

  // Tokens that any row of this CTA sees.
  const int last_row = min(row_base + ROWS, num_rows) - 1;
  const int visible_end = first_position + last_row / group + 1;
  const int visible_begin = window > 0 ? max(0, first_position + row_base / group + 1 - window) : 0;
  const int first_tile = visible_begin / KV_TILE, end_tile = ceil_div(visible_end, KV_TILE);

  const int* table = block_tables + (i64)seq * table_stride;
  const i64 head_offset = (i64)kv_head * (BLOCK_SIZE * HEAD_DIM);
  auto load_ids = [&](int tile) {
    const int token = tile * KV_TILE + tid;
    if (tid < KV_TILE)
      copy_async_4(block_ids + tile % 3 * KV_TILE + tid, table + (token < visible_end ? token / BLOCK_SIZE : 0),
                   token >= visible_begin && token < visible_end);
  };
  auto load = [&](unsigned char* to, int tile, i64 offset) {  // keys (offset 0) or values of a tile; its ids must be there
    if (tile >= end_tile) return;
    const int* ids = block_ids + tile % 3 * KV_TILE;
    to += tile % 2 * KV_TILE * PITCH;
#pragma unroll
    for (int i = 0; i < ceil_div(KV_TILE * CHUNKS, THREADS); ++i) {
      const int piece = i * THREADS + tid, row = piece / CHUNKS, column = piece % CHUNKS;
      if (KV_TILE * CHUNKS % THREADS && row >= KV_TILE) break;
      const int token = tile * KV_TILE + row;
      const DTYPE* source =
          kv + (i64)ids[row] * block_stride + offset + head_offset + (token % BLOCK_SIZE) * HEAD_DIM + column * 8;
      copy_async_16(to + row * PITCH + column * 16, source, token >= visible_begin && token < visible_end);
    }
  };

  load_ids(first_tile);
  load_ids(first_tile + 1);
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
    const int piece = i * THREADS + tid, row = row_base + piece / CHUNKS, column = piece % CHUNKS;
    const int in = min(row, num_rows - 1);
    const DTYPE* source = query + (i64)(first_query + in / group) * query_stride +
                          (i64)(kv_head * group + in % group) * HEAD_DIM + column * 8;
    copy_async_16(queries + piece / CHUNKS * PITCH + column * 16, source, row < num_rows);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  load(keys, first_tile, 0);
  copy_async_commit();
  load(values, first_tile, value_offset);
  copy_async_commit();

  int row_end[ROW_TILES][2];  // one past the last token that rows g and g + 8 see
  float row_max[ROW_TILES][2], row_sum[ROW_TILES][2], o[ROW_TILES][HEAD_DIM / 8][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = row_base + warp * WARP_ROWS + m * 16 + e * 8 + g;
      row_end[m][e] = first_position + min(row, num_rows - 1) / group + 1;
      row_max[m][e] = NEGATIVE_INFINITY;
      row_sum[m][e] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
  }
  const float scale_log2 = soft_cap > 0.0f ? scale / soft_cap : scale * LOG2_E;
  const float cap_log2 = soft_cap * LOG2_E;
  // Tiles in between are seen whole by every row of the CTA.
  const int lowest_end = first_position + row_base / group + 1;

  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_async_wait<1>();  // this tile's keys and the next one's ids; its values may still be on the way
    __syncthreads();       // for every thread's pieces; and all warps are done with the other buffer
    load(keys, tile + 1, 0);
    load_ids(tile + 2);
    copy_async_commit();
    load(values, tile + 1, value_offset);
    copy_async_commit();

    float s[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    const unsigned char* key_tile = keys + tile % 2 * KV_TILE * PITCH;
#pragma unroll
    for (int k = 0; k < K_STEPS; ++k) {
      u32 a[ROW_TILES][4];  // Q: matrices (rows 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        load_matrix_x4(a[m], queries + (warp * WARP_ROWS + m * 16 + lane % 16) * PITCH + k * 32 + lane / 16 * 16);
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n += 2) {
        u32 b[4];  // K: matrices (tokens 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15): b0, b1 of two token tiles
        load_matrix_x4(b, key_tile + (n * 8 + lane % 8 + lane / 16 * 8) * PITCH + k * 32 + lane / 8 % 2 * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma<DTYPE>(s[m][n], a[m], b[0], b[1]);
          mma<DTYPE>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }

    const int token_base = tile * KV_TILE;
    const bool masked = token_base + KV_TILE > lowest_end || (window > 0 && token_base < visible_end - window);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // rows g and g + 8
        float top = row_max[m][e];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float x = s[m][n][2 * e + c] * scale_log2;
            if (soft_cap > 0.0f) x = tanh_fast(x) * cap_log2;
            if (masked) {
              const int token = token_base + n * 8 + 2 * t + c;
              if (token >= row_end[m][e] || (window > 0 && token < row_end[m][e] - window)) x = NEGATIVE_INFINITY;
            }
            s[m][n][2 * e + c] = x;
            top = fmaxf(top, x);
          }
        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2));
        const float reference = top == NEGATIVE_INFINITY ? 0.0f : top;
        const float factor = exp2_fast(row_max[m][e] - reference);
        row_max[m][e] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float p = exp2_fast(s[m][n][2 * e + c] - reference);
            s[m][n][2 * e + c] = p;
            sum += p;
          }
        row_sum[m][e] = row_sum[m][e] * factor + sum;
        if (__any_sync(FULL_MASK, factor != 1.0f)) {  // maxima seldom grow after the first tiles
#pragma unroll
          for (int n = 0; n < HEAD_DIM / 8; ++n) {
            o[m][n][2 * e] *= factor;
            o[m][n][2 * e + 1] *= factor;
          }
        }
      }
    }

    copy_async_wait<2>();  // this tile's values
    __syncthreads();
    const unsigned char* value_tile = values + tile % 2 * KV_TILE * PITCH;
#pragma unroll
    for (int k = 0; k < KV_TILE / 16; ++k) {
      u32 a[ROW_TILES][4];  // P: C fragments of two token tiles are the A fragment of one 16-token step
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        a[m][0] = pack<DTYPE>(s[m][2 * k][0], s[m][2 * k][1]);
        a[m][1] = pack<DTYPE>(s[m][2 * k][2], s[m][2 * k][3]);
        a[m][2] = pack<DTYPE>(s[m][2 * k + 1][0], s[m][2 * k + 1][1]);
        a[m][3] = pack<DTYPE>(s[m][2 * k + 1][2], s[m][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n += 2) {
        u32 b[4];  // V, transposed: (tokens 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15): b0, b1 of two tiles of 8 dims
        load_matrix_x4_trans(b, value_tile + (k * 16 + lane % 16) * PITCH + n * 16 + lane / 16 * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma<DTYPE>(o[m][n], a[m], b[0], b[1]);
          mma<DTYPE>(o[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  copy_async_wait<0>();

  // Out through this warp's own rows of the query tile, which no other warp reads, so that stores are 16 bytes wide.
  __syncwarp();
  unsigned char* own = queries + warp * WARP_ROWS * PITCH;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = row_sum[m][e];
      sum += __shfl_xor_sync(FULL_MASK, sum, 1);
      sum += __shfl_xor_sync(FULL_MASK, sum, 2);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
        *(u32*)(own + (m * 16 + e * 8 + g) * PITCH + n * 16 + t * 4) =
            pack<DTYPE>(o[m][n][2 * e] * inverse, o[m][n][2 * e + 1] * inverse);
    }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < WARP_ROWS * CHUNKS / 32; ++i) {
    const int piece = i * 32 + lane, row = row_base + warp * WARP_ROWS + piece / CHUNKS, column = piece % CHUNKS;
    if (row < num_rows)
      *(uint4*)(out + (i64)(first_query + row / group) * out_stride + (i64)(kv_head * group + row % group) * HEAD_DIM +
                column * 8) = *(const uint4*)(own + piece / CHUNKS * PITCH + column * 16);
  }
}
