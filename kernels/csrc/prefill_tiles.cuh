// Which rows of which sequence a CTA of a prefill kernel has.
#pragma once
#include "device.cuh"

// CTAs (blockIdx.y) are numbered over all sequences' tiles of NUM_ROWS rows (query token, head of the group), a sequence's last tile first,
// since the last sees the most tokens. found[0..3]: sequence (-1: this CTA has none), tile of the sequence, its first token in the
// batch, its tokens. scan [NUM_WARPS] and found [4] are shared memory; a barrier follows the last write.
template <int NUM_ROWS, int NUM_WARPS>
DEVICE void find_tile(const int* query_start, int num_seqs, int group, int* scan, int* found) {
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  if (tid == 0) found[0] = -1;
  int before = 0;
  for (int base = 0; base < num_seqs; base += NUM_WARPS * 32) {
    const int s = base + tid;
    const int tokens = s < num_seqs ? query_start[s + 1] - query_start[s] : 0;
    const int tiles = ceil_div(tokens * group, NUM_ROWS);
    int upto = warp_inclusive_scan(tiles, lane);
    if (lane == 31) scan[warp] = upto;
    __syncthreads();
    upto += before;
    for (int w = 0; w < warp; ++w) upto += scan[w];
    const int target = blockIdx.y;
    if (target < upto && target >= upto - tiles) {
      found[0] = s;
      found[1] = upto - 1 - target;
      found[2] = query_start[s];
      found[3] = tokens;
    }
    for (int w = 0; w < NUM_WARPS; ++w) before += scan[w];
    __syncthreads();
  }
}
