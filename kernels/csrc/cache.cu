// Into the KV cache, and about in it: rotary embedding (Su et al. 2021) with the cache write, and copies of whole blocks.
//
// Defines of rope_and_cache: DTYPE, HEAD_DIM, ROTARY_DIM (elements that turn, even; 0 = none), BLOCK_SIZE, INTERLEAVED (0: pairs
// (i, i + ROTARY_DIM / 2); 1: pairs (2i, 2i + 1)), VECTOR (elements of one access; divides HEAD_DIM, ROTARY_DIM / 2).
// copy_blocks needs none of them beyond a value.
#include "device.cuh"

constexpr int HALF = ROTARY_DIM / 2;
constexpr int TURNS = HALF / VECTOR;                       // work items of a head that turn 2 * VECTOR elements
constexpr int ITEMS = TURNS + (HEAD_DIM - ROTARY_DIM) / VECTOR;  // and those that copy VECTOR
static_assert(HALF % VECTOR == 0 && HEAD_DIM % VECTOR == 0, "whole items");
typedef Vector<DTYPE, VECTOR> Packed;

// Rotates (or copies) item `item` of one head from `in` to `out`. cos_sin: HALF cosines, then HALF sines.
DEVICE void turn(DTYPE* out, const DTYPE* in, const float* cos_sin, int item) {
  if (item >= TURNS) {
    const int at = ROTARY_DIM + (item - TURNS) * VECTOR;
    *(Packed*)(out + at) = *(const Packed*)(in + at);
    return;
  }
  const int angle = item * VECTOR;
  const int first = INTERLEAVED ? 2 * angle : angle, second = INTERLEAVED ? 2 * angle + VECTOR : angle + HALF;
  const Packed a = *(const Packed*)(in + first), b = *(const Packed*)(in + second);
  DTYPE x[2 * VECTOR], y[2 * VECTOR];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) x[j] = a.values[j], x[VECTOR + j] = b.values[j];
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    const int low = INTERLEAVED ? 2 * j : j, high = INTERLEAVED ? 2 * j + 1 : VECTOR + j;
    const float c = cos_sin[angle + j], s = cos_sin[HALF + angle + j];
    const float p = to_float(x[low]), q = to_float(x[high]);
    y[low] = from_float<DTYPE>(p * c - q * s);
    y[high] = from_float<DTYPE>(q * c + p * s);
  }
  Packed d, e;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) d.values[j] = y[j], e.values[j] = y[VECTOR + j];
  *(Packed*)(out + first) = d;
  *(Packed*)(out + second) = e;
}

// Grid: [tokens]. Block: any number of threads. Shared: none.
//   query_out     [tokens, query_heads, HEAD_DIM] DTYPE, contiguous; the rotated queries
//   key_out       [tokens, kv_heads, HEAD_DIM] DTYPE, contiguous, or null: the rotated keys, besides the cache
//   kv            one layer of the pool, [blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE, or null: block_stride elements from block
//                 to block, value_offset from keys to values, the rest contiguous
//   query, key, value  [tokens, heads, HEAD_DIM] DTYPE, *_stride elements from token to token, heads contiguous
//   positions     [tokens] int64;  cos_sin [positions, ROTARY_DIM] float32: cosines, then sines
//   slot_mapping  [tokens] int64, block * BLOCK_SIZE + offset; negative: the token is not stored
extern "C" __global__ void
rope_and_cache(DTYPE* query_out, DTYPE* key_out, DTYPE* kv,
               const DTYPE* query, const DTYPE* key, const DTYPE* value,
               const i64* positions, const float* __restrict__ cos_sin, const i64* slot_mapping,
               int query_heads, int kv_heads, i64 query_stride, i64 key_stride, i64 value_stride, i64 block_stride,
               i64 value_offset) {
  let_next_start();
  wait_for_previous();
  const i64 token = blockIdx.x;
  const float* angles = ROTARY_DIM > 0 ? cos_sin + positions[token] * ROTARY_DIM : cos_sin;
  for (int i = threadIdx.x; i < query_heads * ITEMS; i += blockDim.x) {
    const int head = i / ITEMS;
    turn(query_out + (token * query_heads + head) * HEAD_DIM, query + token * query_stride + head * HEAD_DIM, angles, i % ITEMS);
  }
  if (key_out)
    for (int i = threadIdx.x; i < kv_heads * ITEMS; i += blockDim.x) {
      const int head = i / ITEMS;
      turn(key_out + (token * kv_heads + head) * HEAD_DIM, key + token * key_stride + head * HEAD_DIM, angles, i % ITEMS);
    }
  const i64 slot = kv ? slot_mapping[token] : -1;
  if (slot < 0) return;
  DTYPE* place = kv + slot / BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM;
  for (int i = threadIdx.x; i < kv_heads * ITEMS; i += blockDim.x) {
    const int head = i / ITEMS;
    turn(place + (i64)head * (BLOCK_SIZE * HEAD_DIM), key + token * key_stride + head * HEAD_DIM, angles, i % ITEMS);
  }
  constexpr int COPIES = HEAD_DIM / VECTOR;
  for (int i = threadIdx.x; i < kv_heads * COPIES; i += blockDim.x) {
    const int head = i / COPIES, at = i % COPIES * VECTOR;
    *(Packed*)(place + value_offset + (i64)head * (BLOCK_SIZE * HEAD_DIM) + at) =
        *(const Packed*)(value + token * value_stride + head * HEAD_DIM + at);
  }
}

// Grid: [ceil(words / (256 * 4)), copies]. Block: [256]. Shared: none.
//   to, from          pools (or a pool and a mapped host arena) of blocks of `words` 16-byte words
//   to_ids, from_ids  [copies] int64;  no block is written twice, none is both read and written
extern "C" __global__ void __launch_bounds__(256)
copy_blocks(uint4* __restrict__ to, const uint4* __restrict__ from, const i64* __restrict__ to_ids,
            const i64* __restrict__ from_ids, i64 words) {
  uint4* target = to + to_ids[blockIdx.y] * words;
  const uint4* source = from + from_ids[blockIdx.y] * words;
  const i64 base = (i64)blockIdx.x * (256 * 4) + threadIdx.x;
  uint4 held[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (base + i * 256 < words) held[i] = source[base + i * 256];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (base + i * 256 < words) target[base + i * 256] = held[i];
}
