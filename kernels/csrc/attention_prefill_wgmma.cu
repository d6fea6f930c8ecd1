// Prefill attention over a paged KV cache on Hopper: `attention_prefill.cu` with warpgroup matrix products (wgmma).
//
// Rows, tiles and softmax are as there. A warpgroup (four warps) has 64 rows, a warp 16 of them; keys, values and queries lie in shared
// memory in wgmma's 128-byte swizzle, HEAD_DIM / 64 panels of 64 elements each.
//   S[64 rows][KV_TILE tokens] = Q . K^T    A = Q, B = K, both from shared memory
//   O[64 rows][HEAD_DIM]      += P . V      A = P from S's registers, in place; B = V, tokens along k
// Products of values and the next tile's scores follow one another without a wait; while one warpgroup is at its softmax, the others'
// products run.
//
// Defines: DTYPE (bfloat16 | float16), HEAD_DIM (64 | 128), BLOCK_SIZE, WARPS (multiple of 4), KV_TILE (64 | 128), MIN_CTAS.
#include "device.cuh"
#include "prefill_tiles.cuh"
#include "wgmma.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;
constexpr int CHUNKS = HEAD_DIM / 8;  // 16-byte pieces of a row
constexpr int PANELS = HEAD_DIM / 64;
constexpr int QUERY_PANEL = ROWS * 128, PANEL = KV_TILE * 128;  // bytes
constexpr int TILE_BYTES = PANELS * PANEL;
static_assert(KV_TILE <= THREADS, "one thread fetches one token's block id");

// Byte offset of 16-byte piece `piece` of a row; `panel_bytes` from panel to panel.
DEVICE int place(int row, int piece, int panel_bytes) {
  return piece / 8 * panel_bytes + row * 128 + ((piece ^ row) % 8) * 16;
}

// Grid: [num_kv_heads, row tiles of CTAs: at least sum over sequences of ceil(tokens * group / ROWS)]. Block: [WARPS * 32].
// Shared: 1024 + (ROWS + 4 * KV_TILE) * HEAD_DIM * 2 + 3 * KV_TILE * 4 + (WARPS + 4) * 4 bytes.
//   out, query      [tokens, num_kv_heads * group, HEAD_DIM] DTYPE, out_stride and query_stride elements from token to token
//   kv              one layer of the pool, [blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE: block_stride elements from block to
//                   block, value_offset from keys to values, the rest contiguous; slots beyond context_lens are never read
//   block_tables    [num_seqs, table_stride] int32
//   context_lens    [num_seqs] int32, tokens in the cache, the chunk's included
//   query_start     [num_seqs + 1] int32, sequence s has tokens query_start[s] .. query_start[s + 1], the last of its context
//   group           query heads per KV head;  window: tokens a query sees, itself included, 0 = all;  soft_cap: 0 = none
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
paged_attention_prefill_wgmma(DTYPE* __restrict__ out, const DTYPE* __restrict__ query, const DTYPE* __restrict__ kv,
                              const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                              const int* __restrict__ query_start, int num_seqs, int group, int table_stride, i64 block_stride,
                              i64 value_offset, i64 query_stride, i64 out_stride, float scale, int window, float soft_cap) {
  SHARED_MEMORY(raw);
  unsigned char* shared = raw + (1024 - shared_address(raw) % 1024) % 1024;  // swizzling looks at address bits
  unsigned char* queries = shared;                            // [PANELS][ROWS][128 bytes]
  unsigned char* keys = queries + PANELS * QUERY_PANEL;       // [2][PANELS][KV_TILE][128 bytes]
  unsigned char* values = keys + 2 * TILE_BYTES;              // the same
  int* block_ids = (int*)(values + 2 * TILE_BYTES);           // [3][KV_TILE], one per token
  int* scan = block_ids + 3 * KV_TILE;                        // [WARPS]
  int* found = scan + WARPS;                                  // [4]
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
    if (tile < end_tile) {
      const int* ids = block_ids + tile % 3 * KV_TILE;
      to += tile % 2 * TILE_BYTES;
#pragma unroll
      for (int i = 0; i < ceil_div(KV_TILE * CHUNKS, THREADS); ++i) {
        const int piece = i * THREADS + tid, row = piece / CHUNKS, column = piece % CHUNKS;
        if (KV_TILE * CHUNKS % THREADS && row >= KV_TILE) break;
        const int token = tile * KV_TILE + row;
        const DTYPE* source =
            kv + (i64)ids[row] * block_stride + offset + head_offset + (token % BLOCK_SIZE) * HEAD_DIM + column * 8;
        copy_async_16(to + place(row, column, PANEL), source, token >= visible_begin && token < visible_end);
      }
    }
    copy_async_commit();
  };

  load_ids(first_tile);
  load_ids(first_tile + 1);
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
    const int piece = i * THREADS + tid, row = row_base + piece / CHUNKS, column = piece % CHUNKS;
    const int in = min(row, num_rows - 1);
    const DTYPE* source = query + (i64)(first_query + in / group) * query_stride +
                          (i64)(kv_head * group + in % group) * HEAD_DIM + column * 8;
    copy_async_16(queries + place(piece / CHUNKS, column, QUERY_PANEL), source, row < num_rows);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  load(keys, first_tile, 0);
  load(values, first_tile, value_offset);

  int row_end[2];  // one past the last token that rows g and g + 8 of this warp see
  float row_max[2], row_sum[2], o[HEAD_DIM / 8][4];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = row_base + warp * 16 + e * 8 + g;
    row_end[e] = first_position + min(row, num_rows - 1) / group + 1;
    row_max[e] = NEGATIVE_INFINITY;
    row_sum[e] = 0.0f;
  }
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
  const float scale_log2 = soft_cap > 0.0f ? scale / soft_cap : scale * LOG2_E;
  const float cap_log2 = soft_cap * LOG2_E;
  // Tiles in between are seen whole by every row of the CTA.
  const int lowest_end = first_position + row_base / group + 1;
  const u64 query_operand = k_major_operand(queries + warp / 4 * (64 * 128));
  const u64 key_operand = k_major_operand(keys), value_operand = n_major_operand(values, PANEL);

  for (int tile = first_tile; tile < end_tile; ++tile) {
    copy_async_wait<1>();  // this tile's keys and the next one's ids; its values may still be on the way
    fence_async_proxy();
    __syncthreads();  // for every thread's pieces; and all warps have done with the other keys
    load_ids(tile + 2);
    load(keys, tile + 1, 0);

    float s[KV_TILE / 8][4];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)  // 16-byte units: 2 for 16 elements, a panel for 64
      wgmma<DTYPE, KV_TILE>(s, query_operand + k / 4 * (QUERY_PANEL / 16) + k % 4 * 2,
                            key_operand + tile % 2 * (TILE_BYTES / 16) + k / 4 * (PANEL / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
    wgmma_wait<0>();  // and the values' products of the tile before

    const int token_base = tile * KV_TILE;
    const bool masked = token_base + KV_TILE > lowest_end || (window > 0 && token_base < visible_end - window);
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // rows g and g + 8
      float top = row_max[e];
#pragma unroll
      for (int n = 0; n < KV_TILE / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float x = s[n][2 * e + c] * scale_log2;
          if (soft_cap > 0.0f) x = tanh_fast(x) * cap_log2;
          if (masked) {
            const int token = token_base + n * 8 + 2 * t + c;
            if (token >= row_end[e] || (window > 0 && token < row_end[e] - window)) x = NEGATIVE_INFINITY;
          }
          s[n][2 * e + c] = x;
          top = fmaxf(top, x);
        }
      top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
      top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2));
      const float reference = top == NEGATIVE_INFINITY ? 0.0f : top;
      const float factor = exp2_fast(row_max[e] - reference);
      row_max[e] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < KV_TILE / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float p = exp2_fast(s[n][2 * e + c] - reference);
          s[n][2 * e + c] = p;
          sum += p;
        }
      row_sum[e] = row_sum[e] * factor + sum;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        o[n][2 * e] *= factor;
        o[n][2 * e + 1] *= factor;
      }
    }
    u32 p[KV_TILE / 16][4];  // S's fragments of two token octets are P's fragment of one 16-token step
#pragma unroll
    for (int k = 0; k < KV_TILE / 16; ++k) {
      p[k][0] = pack<DTYPE>(s[2 * k][0], s[2 * k][1]);
      p[k][1] = pack<DTYPE>(s[2 * k][2], s[2 * k][3]);
      p[k][2] = pack<DTYPE>(s[2 * k + 1][0], s[2 * k + 1][1]);
      p[k][3] = pack<DTYPE>(s[2 * k + 1][2], s[2 * k + 1][3]);
    }

    copy_async_wait<1>();  // this tile's values
    fence_async_proxy();
    __syncthreads();  // and all warps have done with the other values
    load(values, tile + 1, value_offset);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KV_TILE / 16; ++k)
      wgmma<DTYPE, HEAD_DIM>(o, p[k], value_operand + tile % 2 * (TILE_BYTES / 16) + k * (16 * 128 / 16));
    wgmma_commit();
#ifdef WAIT_AT_ONCE
    wgmma_wait<0>();
#endif
  }
  wgmma_wait<0>();
  copy_async_wait<0>();
  __syncthreads();  // every warp has done with the queries

  // Out through this warp's own rows of the query tile, so that stores are 16 bytes wide.
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum = row_sum[e];
    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    const int row = warp * 16 + e * 8 + g;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
      *(u32*)(queries + place(row, n, QUERY_PANEL) + t * 4) = pack<DTYPE>(o[n][2 * e] * inverse, o[n][2 * e + 1] * inverse);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
    const int piece = i * 32 + lane, own = warp * 16 + piece / CHUNKS, column = piece % CHUNKS, row = row_base + own;
    if (row < num_rows)
      *(uint4*)(out + (i64)(first_query + row / group) * out_stride + (i64)(kv_head * group + row % group) * HEAD_DIM +
                column * 8) = *(const uint4*)(queries + place(own, column, QUERY_PANEL));
  }
}
