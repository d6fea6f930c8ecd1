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

struct Angles {
  Vector<float, VECTOR> cosine, sine;
};

// Of item `item` of a head. cos_sin: HALF cosines, then HALF sines.
DEVICE Angles load_angles(const float* cos_sin, int item) {
  Angles angles = {};
  if (item < TURNS) {
    angles.cosine = *(const Vector<float, VECTOR>*)(cos_sin + item * VECTOR);
    angles.sine = *(const Vector<float, VECTOR>*)(cos_sin + HALF + item * VECTOR);
  }
  return angles;
}

// Rotates (or copies) item `item` of one head from `in` to `out`.
DEVICE void turn(DTYPE* out, const DTYPE* in, const Angles& angles, int item) {
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
    const float c = angles.cosine.values[j], s = angles.sine.values[j];
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

// Grid: [tokens]. Block: any number of threads; best a multiple of ITEMS, so that a thread needs the angles of one item. Shared: none.
//   query_out     [tokens, query_heads, HEAD_DIM] DTYPE, contiguous; the rotated queries
//   key_out       [tokens, kv_heads, HEAD_DIM] DTYPE, contiguous, or null: the rotated keys, besides the cache
//   kv            one layer of the pool, [blocks, 2, kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE, or null: block_stride elements from block
//                 to block, value_offset from keys to values, the rest contiguous
//   query, key, value  [tokens, heads, HEAD_DIM] DTYPE, *_stride elements from token to token, heads contiguous
//   positions     [tokens] int64;  cos_sin [positions, ROTARY_DIM] float32: cosines, then sines; no kernel writes it
//   slot_mapping  [tokens] int64, block * BLOCK_SIZE + offset; negative: the token is not stored
//   settled       whether positions and slot_mapping were written before an earlier launch with 0 (device.cuh)
extern "C" __global__ void
rope_and_cache(DTYPE* query_out, DTYPE* key_out, DTYPE* kv,
               const DTYPE* query, const DTYPE* key, const DTYPE* value,
               const i64* positions, const float* __restrict__ cos_sin, const i64* slot_mapping,
               int query_heads, int kv_heads, i64 query_stride, i64 key_stride, i64 value_stride, i64 block_stride,
               i64 value_offset, int settled) {
  if (!settled) wait_for_previous();
  let_next_start();
  const i64 token = blockIdx.x;
  const float* row = ROTARY_DIM > 0 ? cos_sin + positions[token] * ROTARY_DIM : cos_sin;
  const i64 slot = kv ? slot_mapping[token] : -1;
  const bool one_item = blockDim.x % ITEMS == 0;
  const Angles own = load_angles(row, threadIdx.x % ITEMS);
  if (settled) wait_for_previous();

  DTYPE* place = slot >= 0 ? kv + slot / BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * HEAD_DIM : nullptr;
  constexpr int COPIES = HEAD_DIM / VECTOR;
  const int turns = (query_heads + kv_heads) * ITEMS, copies = slot >= 0 ? kv_heads * COPIES : 0;
  for (int i = threadIdx.x; i < turns + copies; i += blockDim.x) {
    if (i >= turns) {
      const int head = (i - turns) / COPIES, at = (i - turns) % COPIES * VECTOR;
      *(Packed*)(place + value_offset + (i64)head * (BLOCK_SIZE * HEAD_DIM) + at) =
          *(const Packed*)(value + token * value_stride + head * HEAD_DIM + at);
      continue;
    }
    const int head = i / ITEMS, item = i % ITEMS;
    const Angles angles = one_item ? own : load_angles(row, item);
    if (head < query_heads) {
      turn(query_out + (token * query_heads + head) * HEAD_DIM, query + token * query_stride + head * HEAD_DIM, angles, item);
      continue;
    }
    const int kv_head = head - query_heads;
    const DTYPE* from = key + token * key_stride + kv_head * HEAD_DIM;
    if (key_out) turn(key_out + (token * kv_heads + kv_head) * HEAD_DIM, from, angles, item);
    if (slot >= 0) turn(place + (i64)kv_head * (BLOCK_SIZE * HEAD_DIM), from, angles, item);
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
