// Prefill attention over a paged KV cache with wgmma, for compute capability 9.0: what attention_prefill.cu computes, in the scheme of
// FlashAttention-3 (arXiv:2407.08608). Arguments, rows and the order of CTAs are as there.
//
// One warpgroup copies, CONSUMERS warpgroups compute, 64 rows each.
//   The producer fills a ring of STAGES slots of one tile (KV_TILE tokens of keys or of values), in the order in which the consumers use
//   them up: K0, K1, V0, K2, V1, .. , V(n-1). 16 tokens that are all seen come as boxes of a tensor map; others are copied by lanes,
//   with zeros for what is not seen: nobody may have written it. A slot's `full` barrier says that all of that is there, its `empty`
//   barrier that all consumers have read it.
//   A consumer issues S = Q . K of a tile, then O += P . V of the tile before, and does the softmax of S while the latter runs. Two
//   consumers take turns at issuing (PING_PONG), so that one's softmax hides behind the other's products.
//
// Shared memory of queries and of each slot: [HEAD_DIM / 64][rows or tokens][64 elements] in the 128-byte swizzle, see wgmma.cuh.
//
// With SHARED_PREFIX, all tokens see the whole context (the queries of many sequences, and what these have in common at their
// beginning); out is float32 then, and the logarithms of the sums go out beside it, for attention_decode.cu to go on from.
//
// Defines: DTYPE (bfloat16 | float16), HEAD_DIM (64, 128, 256), BLOCK_SIZE (16 or more), CONSUMERS, KV_TILE (64, 128, 256), STAGES,
// PING_PONG (0 | 1), SOFT_CAP (0 | 1: there is one), SHARED_PREFIX (0 | 1), PRODUCER_REGISTERS, CONSUMER_REGISTERS.
#include "hopper.cuh"
#include "prefill_tiles.cuh"

constexpr int WARPS = 4 * (CONSUMERS + 1);
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = CONSUMERS * 64;
constexpr int CHUNKS = HEAD_DIM / 8;             // 16-byte pieces of a row
constexpr int QUERY_PANEL = ROWS * 128;          // bytes of 64 elements of all rows
constexpr int PANEL = KV_TILE * 128;             // bytes of 64 elements of a tile
constexpr int SLOT = HEAD_DIM / 64 * PANEL;
constexpr int GROUPS = KV_TILE / 16;             // 16 tokens, which lie together in one block
constexpr int WARP_GROUPS = GROUPS / 4;         // that one of the producer's warps copies
constexpr int LANE_ROWS = 32 / CHUNKS;           // tokens that a warp copies at a time
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM <= 256, "whole swizzle atoms, a warp copies whole rows");
static_assert(KV_TILE % 64 == 0 && BLOCK_SIZE % 16 == 0, "a group of tokens lies in one block");
static_assert(STAGES >= 3, "consumers hold two slots while they wait for a third");
static_assert(!PING_PONG || CONSUMERS == 2, "two take turns");

// Grid: [num_kv_heads, row tiles of CTAs: at least sum over sequences of ceil(tokens * group / ROWS)]. Block: [THREADS].
// boxes: of (64, 16, 1, 1, 1) of the layer as (64, BLOCK_SIZE, HEAD_DIM / 64, 2, heads), as attention_decode.cu has it.
// lse: with SHARED_PREFIX, [tokens, heads] float32, the base-2 logarithm of the sum of 2^score, as attention_decode.cu has it.
// Shared: 1024 + HEAD_DIM * 2 * (ROWS + STAGES * KV_TILE) + STAGES * 16 + (WARPS + 4) * 4 bytes. scale must be positive.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
paged_attention_prefill_hopper(DTYPE* __restrict__ out, const DTYPE* __restrict__ query, const DTYPE* __restrict__ kv,
                               const int* __restrict__ block_tables, const int* __restrict__ context_lens,
                               const int* __restrict__ query_start, int num_seqs, int group, int table_stride, i64 block_stride,
                               i64 value_offset, i64 query_stride, i64 out_stride, float scale, int window, float soft_cap,
                               const __grid_constant__ TensorMap boxes, float* __restrict__ lse) {
  SHARED_MEMORY(dynamic);
  unsigned char* queries = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // [HEAD_DIM / 64][ROWS][128]
  unsigned char* ring = queries + HEAD_DIM / 64 * QUERY_PANEL;                         // [STAGES][HEAD_DIM / 64][KV_TILE][128]
  u64* full = (u64*)(ring + STAGES * SLOT);                                            // [STAGES]
  u64* empty = full + STAGES;                                                          // [STAGES]
  int* scan = (int*)(empty + STAGES);                                                  // [WARPS]
  int* found = scan + WARPS;  // [4]: sequence, tile of the sequence, its first token, its tokens
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(FULL_MASK, tid / 32, 0);  // so that the compiler sees it is the same in all lanes
  const int kv_head = blockIdx.x;

  if (tid == 0) {
    prefetch_map(&boxes);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 4);
      barrier_init(empty + i, CONSUMERS * 4);
    }
    barriers_initialised();
  }
  find_tile<ROWS, WARPS>(query_start, num_seqs, group, scan, found);  // its barriers are also those of the lines above
  const int seq = found[0];
  if (seq < 0) return;  // the grid is an upper bound
  const int row_base = found[1] * ROWS, first_query = found[2], num_tokens = found[3];
  const int num_rows = num_tokens * group;
  const int context_len = context_lens[seq];
  if (SHARED_PREFIX && context_len <= 0) return;  // nothing is shared
  const int first_position = context_len - num_tokens;  // of the chunk's first token

  // Tokens that any row of this CTA sees.
  const int last_row = min(row_base + ROWS, num_rows) - 1;
  const int visible_end = SHARED_PREFIX ? context_len : first_position + last_row / group + 1;
  const int visible_begin = window > 0 ? max(0, first_position + row_base / group + 1 - window) : 0;
  const int first_tile = visible_begin / KV_TILE, end_tile = ceil_div(visible_end, KV_TILE);

  if (warp < 4) {
    give_registers<PRODUCER_REGISTERS>();
    const int* table = block_tables + (i64)seq * table_stride;
    const DTYPE* lane_source = kv + (i64)kv_head * (BLOCK_SIZE * HEAD_DIM) + lane * 8;  // a group of tokens is contiguous
    const int chunk = lane % CHUNKS, lane_row = lane / CHUNKS;
    const u32 lane_target = chunk / 8 * PANEL + lane_row * 128;
    const u32 unit = chunk % 8 ^ lane_row;
    const int block_heads = (int)(block_stride / (BLOCK_SIZE * HEAD_DIM));
    int slot = 0;
    u32 parity = 1;

    auto load_ids = [&](int (&ids)[WARP_GROUPS], int tile) {
#pragma unroll
      for (int i = 0; i < WARP_GROUPS; ++i) {
        const int token = tile * KV_TILE + (warp + 4 * i) * 16;
        const bool visible = token < visible_end && token + 16 > visible_begin;
        ids[i] = visible ? table[token / BLOCK_SIZE] : 0;
      }
    };
    auto load = [&](const int (&ids)[WARP_GROUPS], int tile, bool of_values) {
      barrier_wait(empty + slot, parity);
      unsigned char* tile_target = ring + slot * SLOT;
      auto first_of = [&](int i) { return tile * KV_TILE + (warp + 4 * i) * 16; };
      auto seen_whole = [&](int i) { return first_of(i) >= visible_begin && first_of(i) + 16 <= visible_end; };
      int whole = 0;
#pragma unroll
      for (int i = 0; i < WARP_GROUPS; ++i) {
        whole += seen_whole(i);
        if (seen_whole(i)) continue;
        const DTYPE* source = lane_source + (i64)ids[i] * block_stride + of_values * value_offset + first_of(i) % BLOCK_SIZE * HEAD_DIM;
#pragma unroll
        for (int r = 0; r < 16; r += LANE_ROWS) {
          const int token = first_of(i) + r + lane_row;
          copy_async_16(tile_target + lane_target + ((warp + 4 * i) * 16 + r) * 128 + (unit ^ r % 8) * 16, source + r * HEAD_DIM,
                        token >= visible_begin && token < visible_end);
        }
      }
      if (whole < WARP_GROUPS) {
        copy_async_commit();
        copy_async_wait<0>();
        fence_async_proxy();
        __syncwarp();
      }
      if (lane == 0) {
        barrier_arrive_expecting(full + slot, whole * (16 * HEAD_DIM * 2));
#pragma unroll
        for (int i = 0; i < WARP_GROUPS; ++i)
          if (seen_whole(i))
#pragma unroll
            for (int panel = 0; panel < HEAD_DIM / 64; ++panel)
              copy_box(tile_target + panel * PANEL + (warp + 4 * i) * (16 * 128), &boxes, full + slot, 0, first_of(i) % BLOCK_SIZE, panel,
                       of_values, ids[i] * block_heads + kv_head, EVICT_NORMAL);
      }
      if (++slot == STAGES) slot = 0, parity ^= 1;
    };

    int keys[WARP_GROUPS], values[WARP_GROUPS], next[WARP_GROUPS];
    load_ids(keys, first_tile);
    load_ids(next, first_tile + 1);
    load(keys, first_tile, false);
    for (int tile = first_tile + 1; tile < end_tile; ++tile) {
#pragma unroll
      for (int i = 0; i < WARP_GROUPS; ++i) values[i] = keys[i], keys[i] = next[i];
      load_ids(next, tile + 1);
      load(keys, tile, false);
      load(values, tile - 1, true);
    }
    load(keys, end_tile - 1, true);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const int consumer = warp / 4 - 1, g = lane / 4, t = lane % 4;
    const int own_rows = consumer * 64;  // this warpgroup's, of the CTA's
    const int own_row = own_rows + warp % 4 * 16;

#pragma unroll
    for (int i = 0; i < 64 * CHUNKS / 128; ++i) {
      const int piece = i * 128 + tid % 128, row = own_rows + piece / CHUNKS, column = piece % CHUNKS;
      const int in = min(row_base + row, num_rows - 1);
      const DTYPE* source = query + (i64)(first_query + in / group) * query_stride +
                            (i64)(kv_head * group + in % group) * HEAD_DIM + column * 8;
      copy_async_16(queries + column / 8 * QUERY_PANEL + row * 128 + (column % 8 ^ row % 8) * 16, source, row_base + row < num_rows);
    }
    copy_async_commit();

    int row_end[2];  // one past the last token that rows g and g + 8 of this warp see
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = row_base + own_row + e * 8 + g;
      row_end[e] = SHARED_PREFIX ? context_len : first_position + min(row, num_rows - 1) / group + 1;
    }
    // Between these, tiles are seen whole by every row of this warpgroup.
    const int lowest_end = SHARED_PREFIX ? context_len : first_position + min(row_base + own_rows, num_rows - 1) / group + 1;
    const int highest_end = SHARED_PREFIX ? context_len : first_position + min(row_base + own_rows + 63, num_rows - 1) / group + 1;
    const float scale_log2 = scale * LOG2_E;

    float s[KV_TILE / 8][4], o[HEAD_DIM / 8][4], row_max[2], row_sum[2], factor[2];
    u32 p[KV_TILE / 16][4];
    row_max[0] = row_max[1] = NEGATIVE_INFINITY;
    row_sum[0] = row_sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;

    int slot = 0;
    u32 parity = 0;
    const u64 query_operand = k_major_operand(queries + own_rows * 128);
    const u64 key_operand = k_major_operand(ring), value_operand = n_major_operand(ring, PANEL);
    auto wait_full = [&]() -> int {
      barrier_wait(full + slot, parity);
      const int mine = slot;
      if (++slot == STAGES) slot = 0, parity ^= 1;
      return mine;
    };
    auto release = [&](int which) {
      if (lane == 0) barrier_arrive(empty + which);
    };
    auto issue_scores = [&](int which) {  // s = Q . K
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < HEAD_DIM / 16; ++k)
        wgmma<DTYPE, KV_TILE>(s, query_operand + (k / 4 * QUERY_PANEL + k % 4 * 32) / 16,
                              key_operand + which * (SLOT / 16) + (k / 4 * PANEL + k % 4 * 32) / 16, k > 0);
      wgmma_commit();
    };
    auto issue_output = [&](int which) {  // o += P . V
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < KV_TILE / 16; ++k)
        wgmma<DTYPE, HEAD_DIM>(o, p[k], value_operand + which * (SLOT / 16) + k * (16 * 128 / 16));
      wgmma_commit();
    };
    auto softmax = [&](int tile) {  // s to exponentials; row_max, row_sum; factor of what was summed before
      const int token_base = tile * KV_TILE;
      if (SOFT_CAP) {
        const float inner = scale / soft_cap, outer = soft_cap / scale;
#pragma unroll
        for (int i = 0; i < KV_TILE / 2; ++i) s[i / 4][i % 4] = tanh_fast(s[i / 4][i % 4] * inner) * outer;
      }
      if (token_base + KV_TILE > lowest_end || (window > 0 && token_base < highest_end - window)) {
#pragma unroll
        for (int i = 0; i < KV_TILE / 2; ++i) {
          const int token = token_base + i / 4 * 8 + 2 * t + i % 2, end = row_end[i / 2 % 2];
          if (token >= end || (window > 0 && token < end - window)) s[i / 4][i % 4] = NEGATIVE_INFINITY;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // rows g and g + 8
        float top = row_max[e];
#pragma unroll
        for (int n = 0; n < KV_TILE / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * e], s[n][2 * e + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2));
        const float reference = top == NEGATIVE_INFINITY ? 0.0f : top * scale_log2;
        factor[e] = exp2_fast(row_max[e] * scale_log2 - reference);
        row_max[e] = top;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KV_TILE / 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float x = exp2_fast(s[n][2 * e + c] * scale_log2 - reference);
            s[n][2 * e + c] = x;
            sum += x;
          }
        row_sum[e] = row_sum[e] * factor[e] + sum;
      }
    };
    auto pack_scores = [&]() {  // C fragments of two tiles of 8 tokens are the A fragment of one step of 16
#pragma unroll
      for (int k = 0; k < KV_TILE / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[k][i] = pack<DTYPE>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
    };
    // Barrier 1 + consumer is its turn to issue products; 3 + consumer is its own warps'.
    auto take_turn = [&]() {
      if (PING_PONG) named_barrier_sync(1 + consumer, 256);
    };
    auto pass_turn = [&]() {
      if (PING_PONG) named_barrier_arrive(2 - consumer, 256);
    };

    copy_async_wait<0>();
    fence_async_proxy();
    named_barrier_sync(3 + consumer, 128);  // all of this warpgroup's queries are there
    if (consumer == 1) pass_turn();

    int key_slot = wait_full();
    take_turn();
    issue_scores(key_slot);
    pass_turn();
    wgmma_wait<0>();
    keep_order(s);
    release(key_slot);
    softmax(first_tile);
    pack_scores();
    for (int tile = first_tile + 1; tile < end_tile; ++tile) {
      key_slot = wait_full();
      take_turn();
      keep_order(s);
      issue_scores(key_slot);
      const int value_slot = wait_full();
      keep_order(o);
      issue_output(value_slot);
      pass_turn();
      wgmma_wait<1>();
      keep_order(s);
      release(key_slot);
      softmax(tile);
      // ptxas moves a wait for products up across arithmetic, even to before the softmax that should run beside them, but not
      // across a loop: so wait for the next slot here (its turn comes next anyway).
      keep_order(s);
      barrier_wait(full + slot, parity);
      wgmma_wait<0>();
      keep_order(o);
      release(value_slot);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) o[i / 4][i % 4] *= factor[i / 2 % 2];
      pack_scores();
    }
    if (consumer == 0) take_turn();  // meets the other's last pass_turn
    const int value_slot = wait_full();
    keep_order(o);
    issue_output(value_slot);
    wgmma_wait<0>();
    keep_order(o);

    if (SHARED_PREFIX) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = row_sum[e];
        sum += __shfl_xor_sync(FULL_MASK, sum, 1);
        sum += __shfl_xor_sync(FULL_MASK, sum, 2);
        const int row = row_base + own_row + e * 8 + g;
        if (row >= num_rows) continue;
        const int token = first_query + row / group, head = kv_head * group + row % group;
        float* to = (float*)out + (i64)token * out_stride + (i64)head * HEAD_DIM + 2 * t;
        const float inverse = 1.0f / sum;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
          *(float2*)(to + n * 8) = make_float2(o[n][2 * e] * inverse, o[n][2 * e + 1] * inverse);
        if (t == 0) lse[(i64)token * (gridDim.x * group) + head] = row_max[e] * scale_log2 + log2f(sum);
      }
      return;
    }

    // Out through this warp's own rows of the queries, which nothing reads any more, so that stores are 16 bytes wide.
    named_barrier_sync(3 + consumer, 128);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = row_sum[e];
      sum += __shfl_xor_sync(FULL_MASK, sum, 1);
      sum += __shfl_xor_sync(FULL_MASK, sum, 2);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      unsigned char* to = queries + (own_row + e * 8 + g) * 128 + t * 4;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
        *(u32*)(to + n / 8 * QUERY_PANEL + (n % 8 ^ g) * 16) =
            pack<DTYPE>(o[n][2 * e] * inverse, o[n][2 * e + 1] * inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
      const int piece = i * 32 + lane, row = own_row + piece / CHUNKS, column = piece % CHUNKS;
      if (row_base + row < num_rows) {
        const int in = row_base + row;
        *(uint4*)(out + (i64)(first_query + in / group) * out_stride + (i64)(kv_head * group + in % group) * HEAD_DIM + column * 8) =
            *(const uint4*)(queries + column / 8 * QUERY_PANEL + row * 128 + (column % 8 ^ row % 8) * 16);
      }
    }
  }
}
