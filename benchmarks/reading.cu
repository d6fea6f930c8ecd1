// For benchmarks.reading: kernels that read and do nothing else. With CHECK they add up all that they have read.
//
// Defines: CHECK (0 | 1), STAGES; for read_pieces PIECE; for read_layer WARPS, SIDE (0 | 1), BOXES (0 | 1).
#include "hopper.cuh"

#ifdef PIECE
// Grid: [CTAs]. Block: [256]. Of `steps` times 16 KiB every CTA reads an equal share, each of its warps 2 KiB at a time.
//   data  steps * 16384 bytes; place [pieces] int32, where in it each of them is;  found [CTAs]: sums of the words read
extern "C" __global__ void __launch_bounds__(256, 1) read_pieces(u32* found, const unsigned char* data, const int* place, int steps) {
  SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, zero = zero_in_every_lane();
  unsigned char* ring = (unsigned char*)((u64)(shared + (warp * STAGES * 2048 + lane * 16)) | (u64)zero);
  const int begin = (int)((i64)steps * blockIdx.x / gridDim.x), end = (int)((i64)steps * (blockIdx.x + 1) / gridDim.x);
  auto load = [&](int step, int stage) {
    if (step < end)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const i64 byte = (i64)step * 16384 + warp * 2048 + i * 512 + lane * 16;
        copy_async_16_once(ring + stage * 2048 + i * 512, data + (i64)place[byte / PIECE] * PIECE + byte % PIECE, true);
      }
    copy_async_commit();
  };
  for (int i = 0; i < STAGES - 1; ++i) load(begin + i, i);
  u32 words = 0;
  for (int step = begin, stage = zero, idle = STAGES - 1 + zero; step < end; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncwarp();
    load(step + STAGES - 1, idle);
    for (int i = 0; i < (CHECK ? 16 : 1); ++i) words += *(const u32*)(ring + stage * 2048 + i / 4 * 512 + i % 4 * 4);
    idle = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  if (CHECK || words == 1) atomicAdd(found + blockIdx.x, words);
}
#else
// Grid: [CTAs]. Block: [WARPS * 32]. Reads all blocks of all sequences, in tiles of a head's keys and values.
//   kv     [blocks, 2, 8, 16, 128] of 2 bytes;  boxes of (64, 16, 2, 2, 1) of it as (64, 16, 2, 2, blocks * 16)
//   table  [blocks], sequences of `length` blocks one after another;  found as above
// SIDE: a warp takes a head of its CTA's blocks; otherwise a CTA's warps take the tiles of (sequence, head, block) in turn.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
read_layer(u32* found, const unsigned char* kv, const __grid_constant__ TensorMap boxes, const int* table, int blocks, int length) {
  constexpr int PITCH = !BOXES ? 272 : 256, TILE = 16 * PITCH;
  SHARED_MEMORY(dynamic);
  unsigned char* shared = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, zero = zero_in_every_lane();
  unsigned char* ring = shared + warp * STAGES * 2 * TILE;
  u64* full = (u64*)(shared + WARPS * STAGES * 2 * TILE) + warp * STAGES;
  if (BOXES && lane == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(full + i, 1);
    barriers_initialised();
  }
  __syncwarp();
  const i64 tiles = SIDE ? blocks : (i64)blocks * 8;
  const int begin = (int)(tiles * blockIdx.x / gridDim.x) + (SIDE ? 0 : warp), end = (int)(tiles * (blockIdx.x + 1) / gridDim.x);
  const int step = SIDE ? 1 : WARPS;
  auto load = [&](int tile, int stage) {
    if (tile < end) {
      const int head = SIDE ? warp : tile / length % 8;
      const int block = table[SIDE ? tile : tile / (8 * length) * length + tile % length];
      unsigned char* to = ring + stage * 2 * TILE;
      const unsigned char* keys = kv + (i64)block * 65536 + head * 4096;
      if (!BOXES) {
        unsigned char* own = (unsigned char*)((u64)(to + lane / 16 * PITCH + lane % 16 * 16) | (u64)zero);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          copy_async_16_once(own + i * 2 * PITCH, keys + i * 512 + lane * 16, true);
          copy_async_16_once(own + TILE + i * 2 * PITCH, keys + 32768 + i * 512 + lane * 16, true);
        }
      } else if (lane == 0) {
        barrier_arrive_expecting(full + stage, 8192);
        copy_box(to, &boxes, full + stage, 0, 0, 0, 0, block * 16 + head, EVICT_FIRST);
      }
    }
    if (!BOXES) copy_async_commit();
  };
  for (int i = 0; i < STAGES - 1; ++i) load(begin + i * step, i);
  u32 words = 0, parity = 0;
  for (int tile = begin, stage = zero, idle = STAGES - 1 + zero; tile < end; tile += step) {
    if (!BOXES) copy_async_wait<STAGES - 2>(); else barrier_wait(full + stage, parity);
    __syncwarp();
    load(tile + (STAGES - 1) * step, idle);
    for (int i = 0; i < (CHECK ? 64 : 1); ++i)
      words += *(const u32*)(ring + stage * 2 * TILE + i / 2 * PITCH + i % 2 * 128 + lane * 4);
    idle = stage;
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    if (stage == 0) parity ^= 1;
  }
  if (!BOXES) copy_async_wait<0>();
  if (CHECK || words == 1) atomicAdd(found + blockIdx.x, words);
}
#endif
