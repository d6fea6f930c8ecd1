// Attention over a paged KV cache, written to be read: one CTA per (query token, query head), plain float32 arithmetic. Serves decode
// and prefill of float32 models (token-for-token comparisons) and is the second opinion on the fast kernels in their tests.
//
// Defines: DTYPE (float32 too), HEAD_DIM (at most 256), BLOCK_SIZE.
#include "device.cuh"

constexpr int THREADS = 128;
constexpr int DIMS = (HEAD_DIM + THREADS - 1) / THREADS;  // elements of the output that one thread owns

DEVICE float block_reduce(float x, float* scratch, bool maximum) {
  x = maximum ? warp_max(x) : warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float y = scratch[0];
  for (int w = 1; w < THREADS / 32; ++w) y = maximum ? fmaxf(y, scratch[w]) : y + scratch[w];
  return y;
}

// Grid: [heads, tokens]. Block: [128]. Shared: static.
//   out, query    [tokens, heads, HEAD_DIM] DTYPE, out_stride and query_stride elements from token to token
//   kv            one layer of the pool, [blocks, 2, heads / group, BLOCK_SIZE, HEAD_DIM] DTYPE: block_stride elements from block to
//                 block, value_offset from keys to values, the rest contiguous
//   block_tables  [num_seqs, table_stride] int32;  context_lens [num_seqs] int32, the query tokens included; 0 gives zeros
//   query_start   [num_seqs + 1] int32, first row of each sequence's query tokens; null: query_len rows each
//   window        tokens a query sees, itself included, 0 = all;  soft_cap: 0 = none
extern "C" __global__ void __launch_bounds__(THREADS)
paged_attention_simple(DTYPE* __restrict__ out, const DTYPE* __restrict__ query, const DTYPE* __restrict__ kv,
                       const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                       const int* __restrict__ query_start, int num_seqs, int query_len, int group, int table_stride,
                       i64 block_stride, i64 value_offset, i64 query_stride, i64 out_stride, float scale, int window,
                       float soft_cap) {
  __shared__ float q[HEAD_DIM];
  __shared__ float weights[THREADS];
  __shared__ i64 places[THREADS];
  __shared__ float scratch[THREADS / 32];
  const int tid = threadIdx.x, head = blockIdx.x, row = blockIdx.y;

  int seq = query_start ? 0 : row / query_len;
  int first_row = seq * query_len, rows = query_len;
  if (query_start) {
    int high = num_seqs - 1;  // the last sequence that starts at or before this row
    while (seq < high) {
      int middle = (seq + high + 1) / 2;
      if (query_start[middle] <= row) seq = middle; else high = middle - 1;
    }
    first_row = query_start[seq];
    rows = query_start[seq + 1] - first_row;
    if (row < first_row || row >= first_row + rows) return;  // a row of no sequence
  }
  const int context_len = context_lens[seq];
  const int visible_end = context_len > 0 ? context_len - rows + (row - first_row) + 1 : 0;
  const int visible_begin = window > 0 ? max(0, visible_end - window) : 0;

  for (int d = tid; d < HEAD_DIM; d += THREADS) q[d] = to_float(query[(i64)row * query_stride + (i64)head * HEAD_DIM + d]);
  __syncthreads();

  float acc[DIMS], top = NEGATIVE_INFINITY, sum = 0.0f;
  for (int i = 0; i < DIMS; ++i) acc[i] = 0.0f;
  for (int base = visible_begin; base < visible_end; base += THREADS) {
    const int token = base + tid;
    float x = NEGATIVE_INFINITY;
    if (token < visible_end) {
      const int block = block_tables[(i64)seq * table_stride + token / BLOCK_SIZE];
      const i64 place = (i64)block * block_stride + ((i64)(head / group) * BLOCK_SIZE + token % BLOCK_SIZE) * HEAD_DIM;
      places[tid] = place + value_offset;
      x = 0.0f;
      for (int d = 0; d < HEAD_DIM; ++d) x += q[d] * to_float(kv[place + d]);
      x *= scale;
      if (soft_cap > 0.0f) x = tanhf(x / soft_cap) * soft_cap;
    }
    const float grown = fmaxf(top, block_reduce(x, scratch, true));
    const float weight = token < visible_end ? expf(x - grown) : 0.0f;
    const float factor = expf(top - grown);
    weights[tid] = weight;
    sum = sum * factor + block_reduce(weight, scratch, false);  // its barriers also publish weights and places
    top = grown;
    const int count = min(THREADS, visible_end - base);
    for (int i = 0; i < DIMS; ++i) {
      const int d = tid + i * THREADS;
      float y = acc[i] * factor;
      if (d < HEAD_DIM)
        for (int j = 0; j < count; ++j) y += weights[j] * to_float(kv[places[j] + d]);
      acc[i] = y;
    }
    __syncthreads();  // weights and places are read
  }
  for (int i = 0; i < DIMS; ++i) {
    const int d = tid + i * THREADS;
    if (d < HEAD_DIM) out[(i64)row * out_stride + (i64)head * HEAD_DIM + d] = from_float<DTYPE>(sum > 0.0f ? acc[i] / sum : 0.0f);
  }
}
