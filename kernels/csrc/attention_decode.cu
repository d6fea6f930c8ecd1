// Decode attention over a paged KV cache (PagedAttention, arXiv:2309.06180, section 4.1), for one or a few query tokens per sequence.
//
// The work is a flat list of tiles: 16 tokens of one unit, a unit being (sequence, KV head, row tile). Every team takes an equal
// contiguous share of the list, found on the device from context_lens, so one captured graph serves any lengths and no team waits
// for a longer one. A long unit cut by a share's edge leaves partial results; the team that arrives last combines them. A short one
// is never cut: it belongs to the share it begins in, for combining costs more than what the shares then differ by.
//
// Where there is enough to read, a CTA's warps stand side by side: each takes the same tokens of another head. A layer's heads lie next
// to each other in a block, so memory is read in long pieces, which it is faster at; and no warp waits for another at a unit's end.
// Elsewhere TEAM warps are a team. They take the tiles of its share in turn, and merge at the end of a unit's segment through shared
// memory while the next tiles are in flight. Each warp has its own pipeline of stages: the main loop has no barrier of several warps.
//
// Stages are filled by boxes of a tensor map where there are such (BOXES), a tile's keys and values in one: copies of long pieces are faster
// and cost less power than those of 16 bytes a lane by cp.async (docs/kernels/decode.md). A box has a tile's slots that nobody has
// written, too: their scores are masked, and their values must be, for they may be NaN. Where half of a tile is enough, half of it is copied.
//
// The query heads of one KV head (times the query tokens of the sequence) are the N side of mma.m16n8k16, tokens the M side:
//   S^T[16 tokens][8 rows]  = K[16][D] . Q^T[D][8]          A = K by ldmatrix,         B = Q from registers
//   O^T[D][8 rows]         += V^T[D][16] . P^T[16][8]       A = V by ldmatrix.trans,   B = P by movmatrix from S^T's C fragment
// so 8 rows (or 16, QUERY_TILES = 2) cost one (two) mma per 16 x 16 elements of the cache, and softmax state is two floats per lane.
//
// With SHARED_PREFIX, another kernel has attended to what many sequences have in common at their beginning, once for all of them
// (attention_prefill_hopper.cu): tiles begin behind it, and its result is one more part of the combination at the end.
//
// Launched early, a CTA does what it can before it waits for the kernel before: from a model's second layer on it knows its share, and
// fills its pipelines with what earlier steps have stored, while that kernel rotates and stores this step's tokens (`settled`).
//
// Defines: DTYPE, HEAD_DIM (multiple of 16), BLOCK_SIZE, QUERY_TILES (1: at most 8 rows in a tile, 2: 16), WARPS, TEAM (divides WARPS),
// STAGES, MIN_CTAS, UNCUT (tiles of a short unit), SHARED_PREFIX (0 | 1; 1: query_len is 1 and there is no window), BOXES (0 | 1; 1: compute
// capability 9.0, HEAD_DIM a multiple of 64, BLOCK_SIZE at least 16).
#include "hopper.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int TILE = 16;                           // tokens of one step of one warp
constexpr int ROWS = 8 * QUERY_TILES;              // (query token, query head) rows of a row tile
constexpr int PITCH = HEAD_DIM * 2 + 16;           // bytes of a row that cp.async wrote: an odd number of 16-byte units, so ldmatrix has no conflicts
constexpr int TILE_BYTES = BOXES ? TILE * HEAD_DIM * 2 : TILE * PITCH;
constexpr int CHUNKS = HEAD_DIM / 8;               // 16-byte pieces of a row
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int PIECES = HEAD_DIM / 4;               // of a row of results, four elements each
constexpr int MERGE_PITCH = HEAD_DIM + 4;          // floats of a row of the merge buffer, which is one idle stage
constexpr int MERGE_BYTES = ROWS * MERGE_PITCH * 4;
constexpr int STAGE_BYTES = 2 * TILE_BYTES >= MERGE_BYTES ? 2 * TILE_BYTES : (MERGE_BYTES + 1023) / 1024 * 1024;  // keys, then values
static_assert(!BOXES || (HEAD_DIM % 64 == 0 && BLOCK_SIZE >= TILE && STAGE_BYTES % 1024 == 0), "whole swizzle atoms and tiles");
constexpr int LEAST_SIDE_SHARE = 16;               // tiles from which on warps side by side are worth it,
constexpr int MOST_PARTS = 4;                      // if no unit has many more parts
constexpr int TEAMS = WARPS / TEAM;                // of a CTA
constexpr bool QUERIES_AHEAD = QUERY_TILES * K_STEPS <= 8;  // whether registers have room for the next unit's queries all along
static_assert(STAGES >= 2, "a stage is filled while another is read");
static_assert(WARPS % TEAM == 0, "whole teams");

// A place in the flat list: which unit it lies in, and where that unit begins and ends.
struct Unit {
  int seq, head, begin, end;  // head = KV head * row tiles + row tile
};

// How the flat list has a sequence's heads: one after another, or as many as there are warps side by side.
struct Heads {
  int groups;       // how often the sequence's tiles are in the list
  int side, own;    // heads of a group; which of them is this warp's
};

// Moves `unit` forward to the one that holds `flat`. prefix[s] = tiles per head of the sequences before s; bounded by their number.
DEVICE void seek_sequence(Unit& unit, int flat, const int* prefix, const Heads& heads) {
  while (flat >= prefix[unit.seq + 1] * heads.groups) ++unit.seq;
}

DEVICE void seek(Unit& unit, int flat, const int* prefix, const Heads& heads) {
  seek_sequence(unit, flat, prefix, heads);
  int tiles = prefix[unit.seq + 1] - prefix[unit.seq];
  int begin = prefix[unit.seq] * heads.groups;
  int group = (flat - begin) / tiles;
  unit.head = group * heads.side + heads.own;
  unit.begin = begin + group * tiles;
  unit.end = unit.begin + tiles;
}

// Whether an edge at `flat`, which lies in the unit, must move behind it.
DEVICE bool would_cut_short(const Unit& unit, int flat) { return unit.begin < flat && unit.end - unit.begin <= UNCUT; }

// How long a sequence is, as memory has it: to be loaded well before it is used.
struct Length {
  int context, shared;  // shared: tokens at the beginning that another kernel has attended to, unless it is all there are
};

DEVICE Length load_length(const int* context_lens, const int* shared_lens, int seq) {
  return {context_lens[seq], SHARED_PREFIX ? shared_lens[seq] : 0};
}

// The first token this kernel reads of the sequence: that any query sees and that is not shared.
DEVICE int first_visible(const Length& len, int query_len, int window) {
  if (SHARED_PREFIX) return len.shared < len.context ? len.shared : 0;
  return window > 0 ? max(0, len.context - query_len + 1 - window) : 0;
}

// Grid: [CTAs], at most as many as are resident at once is best; any number is correct. Block: [WARPS * 32].
// Shared: with BOXES 1024 + WARPS * STAGES * 8; WARPS * STAGES * STAGE_BYTES + WARPS * ROWS * 8 + (2 * WARPS + num_seqs + 1) * 4 bytes.
//   out             [num_seqs * query_len, heads, HEAD_DIM] DTYPE, out_stride elements from token to token; zeros where context_len = 0
//   query           like out, query_stride
//   kv              one layer of the pool, [blocks, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM] DTYPE: block_stride elements from block to
//                   block, value_offset from keys to values, the rest contiguous; slots beyond context_lens are never read
//   boxes           with BOXES: boxes of (64, 16, HEAD_DIM / 64, 2, 1) of that layer as (64, BLOCK_SIZE, HEAD_DIM / 64, 2, heads), where heads are
//                   those of a block, BLOCK_SIZE * HEAD_DIM elements each, and as many places further as block_stride has of them the next block's
//   half_boxes      the same in boxes of (64, 8, 1, 1, 1)
//   block_tables    [num_seqs, table_stride] int32
//   context_lens    [num_seqs] int32, tokens in the cache, the query tokens (the last query_len) included
//   partial_out     [2 * CTAs * WARPS, ROWS, HEAD_DIM] float32, scratch;  partial_stats the same without HEAD_DIM, (max, sum)
//   arrivals        [num_seqs * num_kv_heads * row tiles] int32, zero before the first launch; every launch leaves it zero
//   group           query heads per KV head;  window: tokens a query sees, itself included, 0 = all;  soft_cap: 0 = none
//   settled         what no kernel writes that may still run: 0 nothing; 1 block_tables, context_lens and shared_lens; 2 also the cache,
//                   but for the last query_len tokens of every sequence. Before a launch with 1 or 2 came one with 0 (device.cuh)
//   shared_lens     [num_seqs] int32, multiples of 16: tokens at the beginning that shared_out is about; 0 or as many as the context: none
//   shared_out      [num_seqs, heads, HEAD_DIM] float32, attention to those tokens alone
//   shared_lse      [num_seqs, heads] float32, the base-2 logarithm of the sum of their exponentials, 2^score
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
paged_attention_decode(DTYPE* out, const DTYPE* query, const DTYPE* kv, const __grid_constant__ TensorMap boxes,
                       const __grid_constant__ TensorMap half_boxes, const int* block_tables, const int* context_lens, float* partial_out,
                       float2* partial_stats, int* arrivals, int num_seqs, int query_len, int num_kv_heads, int group,
                       int table_stride, i64 block_stride, i64 value_offset, i64 query_stride, i64 out_stride, float scale,
                       int window, float soft_cap, int settled, const int* shared_lens, const float* shared_out,
                       const float* shared_lse) {
  SHARED_MEMORY(dynamic);
  unsigned char* shared = dynamic + (BOXES ? (1024 - shared_address(dynamic) % 1024) % 1024 : 0);
  if (BOXES && threadIdx.x == 0) prefetch_map(&boxes), prefetch_map(&half_boxes);
  if (settled == 0) wait_for_previous();
  let_next_start();
  bool waited = settled == 0;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int g = lane / 4, t = lane % 4;
  const int num_rows = query_len * group;
  const int row_tiles = ceil_div(num_rows, ROWS);
  const int all_heads = num_kv_heads * row_tiles;

  unsigned char* stages = shared + warp * STAGES * STAGE_BYTES;
  float2* merge_stats = (float2*)(shared + WARPS * STAGES * STAGE_BYTES);  // [WARPS][ROWS]
  int* idle_stage = (int*)(merge_stats + WARPS * ROWS);                    // [WARPS] byte offset of the stage a warp leaves to the merge
  int* scan = idle_stage + WARPS;                                          // [WARPS]
  int* is_last = scan;                                                     // [WARPS], afterwards: whether a team arrived last
  u64* full = (u64*)(scan + WARPS) + warp * STAGES;                        // BOXES: [WARPS][STAGES] whether a stage's boxes have landed
  int* prefix = scan + WARPS + (BOXES ? WARPS * STAGES * 2 : 0);           // [num_seqs + 1]

  // Tiles of every sequence, summed up. Where there are several for a thread it takes a run of neighbours, of odd length for the banks
  // of shared memory, whose lengths all threads have loaded before, eight in flight each.
  {
    auto tiles_of = [&](Length len) {
      len.context = max(len.context, 0);
      return ceil_div(len.context, TILE) - first_visible(len, query_len, window) / TILE;
    };
    const bool one_each = num_seqs <= THREADS;
    const int run = one_each ? 1 : ceil_div(num_seqs, THREADS) | 1;
    const int first = min(tid * run, num_seqs), last = min(first + run, num_seqs);
    int sum = 0;
    if (one_each) {
      if (first < last) sum = tiles_of(load_length(context_lens, shared_lens, first));
    } else {
      constexpr int BATCH = 8;
      for (int base = tid; base < num_seqs; base += BATCH * THREADS) {
        Length len[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
          len[b] = base + b * THREADS < num_seqs ? load_length(context_lens, shared_lens, base + b * THREADS) : Length{0, 0};
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
          if (base + b * THREADS >= num_seqs) break;
          prefix[base + b * THREADS + 1] = tiles_of(len[b]);
        }
      }
      __syncthreads();
      for (int s = first; s < last; ++s) sum += prefix[s + 1];
    }
    if (tid == 0) prefix[0] = 0;
    int running = warp_inclusive_scan(sum, lane) - sum;
    if (num_seqs > 32) {
      if (lane == 31) scan[warp] = running + sum;
      __syncthreads();
      for (int w = 0; w < warp; ++w) running += scan[w];
    }
    if (one_each) {
      if (first < last) prefix[first + 1] = running + sum;
    } else {
      for (int s = first; s < last; ++s) prefix[s + 1] = running += prefix[s + 1];
    }
    __syncthreads();
  }

  // Short units are not cut, so warps stand side by side if most CTAs have equally many; long ones if their parts are neither too short
  // nor too many.
  const int ctas = gridDim.x, tiles = prefix[num_seqs], groups = all_heads / WARPS;
  const bool units_are_short = tiles <= num_seqs * UNCUT;
  const int rounds = ceil_div(num_seqs * groups, ctas), in_last_round = num_seqs * groups - (rounds - 1) * ctas;
  const bool side_by_side = TEAM < WARPS && all_heads % WARPS == 0 &&
                            (units_are_short ? rounds > 6 || in_last_round * 8 >= ctas * 5
                                             : (i64)tiles * groups >= (i64)ctas * LEAST_SIDE_SHARE && num_seqs * groups * MOST_PARTS >= ctas);

  // From here on barriers are the team's, and warps side by side meet no other.
  const Heads heads = side_by_side ? Heads{groups, WARPS, warp} : Heads{all_heads, 1, 0};
  const int total = tiles * heads.groups;
  const int team_warps = side_by_side ? 1 : TEAM, team_threads = team_warps * 32;
  const int first_warp = warp / team_warps * team_warps, member = warp - first_warp, team_tid = member * 32 + lane;
  const int team = side_by_side ? (int)blockIdx.x : (int)blockIdx.x * TEAMS + warp / TEAM, teams = side_by_side ? ctas : ctas * TEAMS;
  auto meet = [&]() {
    if (side_by_side || TEAM == 1) __syncwarp();
    else if (TEAM == WARPS) __syncthreads();
    else named_barrier_sync(1 + warp / TEAM, TEAM * 32);
  };

  auto wait = [&]() {
    if (!waited) wait_for_previous();
    waited = true;
  };
  // Rows of a captured graph that no sequence uses have length 0: leave them zero.
  auto wait_and_clear_unused = [&]() {
    wait();
    for (int s = blockIdx.x; s < num_seqs; s += gridDim.x) {
      if (prefix[s + 1] == prefix[s]) {
        const int width = num_kv_heads * group * HEAD_DIM;
        for (int i = tid; i < query_len * width; i += THREADS)
          out[(i64)(s * query_len + i / width) * out_stride + i % width] = from_float<DTYPE>(0.0f);
      }
    }
  };

  const int share = max(ceil_div(total, teams), team_warps);  // every warp gets a tile
  const i64 share_begin = (i64)team * share;
  if (share_begin >= total) return wait_and_clear_unused();
  int begin = (int)share_begin, end = min(begin + share, total);

  Unit unit;
  {
    int low = 0, high = num_seqs - 1;  // the sequence that holds tile `begin`
    while (low < high) {
      int middle = (low + high) / 2;
      if (prefix[middle + 1] * heads.groups <= begin) low = middle + 1; else high = middle;
    }
    unit.seq = low;
  }
  seek(unit, begin, prefix, heads);
  if (end < total) {
    Unit other = unit;
    seek_sequence(other, end, prefix, heads);
    if (prefix[other.seq + 1] - prefix[other.seq] <= UNCUT) {
      seek(other, end, prefix, heads);
      if (would_cut_short(other, end)) end = other.end;
    }
  }
  if (would_cut_short(unit, begin)) {
    begin = unit.end;
    if (begin >= end) return wait_and_clear_unused();
    seek(unit, begin, prefix, heads);
  }

  // Producer: `pending` is this warp's next tile to load; its block ids are fetched one step before they are used.
  Unit next = unit;
  int next_flat = begin + member;
  int next_token = 0, next_first = 0, next_len = 0, next_block = 0, next_kv_head = 0;
  bool pending = false;
  int next_seq_len = 0;
  auto refresh = [&](bool same_seq) {  // what depends on the unit only
    next_kv_head = next.head / row_tiles;
    if (same_seq) return;
    const Length len = load_length(context_lens, shared_lens, next.seq);
    next_seq_len = len.context;
    next_first = first_visible(len, query_len, window);
  };
  auto fetch = [&]() {
    pending = next_flat < end;
    if (!pending) return;
    if (next_flat >= next.end) {
      const int seq = next.seq;
      seek(next, next_flat, prefix, heads);
      refresh(next.seq == seq);
    }
    next_len = next_seq_len;
    next_token = (next_first / TILE + next_flat - next.begin) * TILE;
    const int* table = block_tables + (i64)next.seq * table_stride;
    if (BLOCK_SIZE >= TILE) {
      next_block = table[next_token / BLOCK_SIZE];
    } else {  // lane r (and r + 16) knows the block of row r
      int token = next_token + lane % TILE;
      next_block = token >= next_first && token < next_len ? table[token / BLOCK_SIZE] : 0;
    }
    next_flat += team_warps;
  };
  // Where the address that a copy goes to is a sum with a part that is the same in all lanes, such as where shared memory begins,
  // ptxas 13 gives it and the copy's policy registers that the H100 refuses (illegal instruction). So it must not know any such part.
  const int zero = BOXES ? 0 : zero_in_every_lane();
  unsigned char* copied_to = (unsigned char*)((u64)stages | (u64)zero);
  auto load = [&](int stage) {
    if (BOXES) {
      if (pending && lane == 0) {
        const int head = next_block * (int)(block_stride / (BLOCK_SIZE * HEAD_DIM)) + next_kv_head;
        unsigned char* to = stages + stage * STAGE_BYTES;
        if (next_len - next_token > TILE / 2) {
          barrier_arrive_expecting(full + stage, 2 * TILE_BYTES);
          copy_box(to, &boxes, full + stage, 0, next_token % BLOCK_SIZE, 0, 0, head, EVICT_FIRST);
        } else {
          barrier_arrive_expecting(full + stage, TILE_BYTES);
#pragma unroll
          for (int i = 0; i < 2 * HEAD_DIM / 64; ++i)
            copy_box(to + i * TILE * 128, &half_boxes, full + stage, 0, next_token % BLOCK_SIZE, i % (HEAD_DIM / 64), i / (HEAD_DIM / 64), head,
                     EVICT_FIRST);
        }
      }
      return;
    }
    if (pending) {
      unsigned char* keys = copied_to + stage * STAGE_BYTES;
      const i64 head_offset = (i64)next_kv_head * (BLOCK_SIZE * HEAD_DIM);
      const DTYPE* tile = kv + (i64)next_block * block_stride + head_offset + (next_token % BLOCK_SIZE) * HEAD_DIM;
#pragma unroll
      for (int i = 0; i < TILE * CHUNKS / 32; ++i) {
        const int piece = i * 32 + lane, row = piece / CHUNKS, column = piece % CHUNKS;
        const int token = next_token + row;
        const bool valid = token >= next_first && token < next_len;
        const DTYPE* source;
        if (BLOCK_SIZE >= TILE) {
          source = tile + piece * 8;
        } else {
          const int block = __shfl_sync(FULL_MASK, next_block, row);
          source = kv + (i64)block * block_stride + head_offset + (token % BLOCK_SIZE) * HEAD_DIM + column * 8;
        }
        copy_async_16_once(keys + row * PITCH + column * 16, source, valid);
        copy_async_16_once(keys + TILE_BYTES + row * PITCH + column * 16, source + value_offset, valid);
      }
    }
    copy_async_commit();  // also when empty: one group per step keeps the wait's count right
  };

  // B fragments of a unit's Q^T: row g, dims 16 k + 2t, and + 8.
  auto load_queries = [&](const Unit& of, u32 (&to)[QUERY_TILES][K_STEPS][2]) {
    const int first_head = of.head / row_tiles * group, first_row = of.head % row_tiles * ROWS;
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n) {
      const int row = first_row + n * 8 + g;
      const DTYPE* source =
          query + (i64)(of.seq * query_len + row / group) * query_stride + (i64)(first_head + row % group) * HEAD_DIM;
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        to[n][k][0] = row < num_rows ? *(const u32*)(source + k * 16 + 2 * t) : 0u;
        to[n][k][1] = row < num_rows ? *(const u32*)(source + k * 16 + 2 * t + 8) : 0u;
      }
    }
  };

  if (BOXES) {
    if (lane == 0) {
      for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + stage, 1);
      barriers_initialised();
    }
    __syncwarp();
  }

  // What a segment begins with is loaded while the one before it is read, so that no load stands between them. Queries too, or, where
  // there are no registers for that, before the merge.
  refresh(false);
  fetch();
  Unit coming = unit;
  Length coming_len = load_length(context_lens, shared_lens, coming.seq);
  u32 q[QUERY_TILES][K_STEPS][2], coming_q[QUERY_TILES][K_STEPS][2];
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (settled < 2 || (pending && next_token + TILE > next_len - query_len)) wait();
    load(stage);
    fetch();
  }
  wait_and_clear_unused();
  load_queries(coming, QUERIES_AHEAD ? coming_q : q);

  int flat = begin + member;     // this warp's next tile to read
  int stage = zero;              // its stage
  int idle = STAGES - 1 + zero;  // the stage read last, not yet refilled
  u32 parity = 0;                // BOXES: of the phase in which a stage is filled

  // Where lanes read keys and values in a tile, and how far 16 elements further are.
  const int key_row = lane % 16, key_piece = lane / 16, value_row = lane % 8 + lane / 16 * 8, value_piece = lane / 8 % 2;
  auto place = [&](int row, int piece, int sixteen) {
    if (!BOXES) return row * PITCH + sixteen * 32 + piece * 16;
    return sixteen / 4 * (TILE * 128) + ((row * 128 + (piece ^ row % 8) * 16) ^ sixteen % 4 * 32);
  };
  const float scale_log2 = soft_cap > 0.0f ? scale / soft_cap : scale * LOG2_E;
  const float cap_log2 = soft_cap * LOG2_E;

  // Adds what the other kernel found to a row's sums, which are relative to 2^top.
  auto add_shared = [&](int seq, int head, int column, int shared_len, float top, float& sum, float4& acc) {
    if (!SHARED_PREFIX || shared_len == 0) return;
    const i64 row = (i64)seq * (num_kv_heads * group) + head;
    const float4 x = *(const float4*)(shared_out + row * HEAD_DIM + column);
    const float lse = shared_lse[row], grown = fmaxf(top, lse);
    const float factor = exp2_fast(top - grown), weight = exp2_fast(lse - grown);
    sum = sum * factor + weight;
    acc.x = acc.x * factor + weight * x.x, acc.y = acc.y * factor + weight * x.y;
    acc.z = acc.z * factor + weight * x.z, acc.w = acc.w * factor + weight * x.w;
  };

  for (int segment = begin; segment < end;) {
    unit = coming;
    const int segment_end = min(unit.end, end);
    const int context_len = coming_len.context;
    const int first_token = first_visible(coming_len, query_len, window);
    const int kv_head = unit.head / row_tiles;
    const int row_base = (unit.head % row_tiles) * ROWS;
    const int rows = min(ROWS, num_rows - row_base);
    if (QUERIES_AHEAD) {
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) q[n][k][0] = coming_q[n][k][0], q[n][k][1] = coming_q[n][k][1];
    }
    if (segment_end < end) {
      seek(coming, segment_end, prefix, heads);
      coming_len = load_length(context_lens, shared_lens, coming.seq);
      if (QUERIES_AHEAD) load_queries(coming, coming_q);
    }

    int visible_end[QUERY_TILES][2];  // of rows 2t and 2t + 1
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        visible_end[n][e] = context_len - query_len + 1 + min((row_base + n * 8 + 2 * t + e) / group, query_len - 1);

    float row_max[QUERY_TILES][2], row_sum[QUERY_TILES][2], o[K_STEPS][QUERY_TILES][4];
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n) {
      row_max[n][0] = row_max[n][1] = NEGATIVE_INFINITY;
      row_sum[n][0] = row_sum[n][1] = 0.0f;
#pragma unroll
      for (int m = 0; m < K_STEPS; ++m) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0.0f;
    }

    for (; flat < segment_end; flat += team_warps) {
      if (BOXES) barrier_wait(full + stage, parity); else copy_async_wait<STAGES - 2>();
      __syncwarp();  // every lane's pieces of this stage are there, and every lane is done with the idle one
      load(idle);
      fetch();
      const unsigned char* keys = stages + stage * STAGE_BYTES;
      const unsigned char* values = keys + TILE_BYTES;

      float s[2][QUERY_TILES][4];  // two chains of mma, even and odd steps, to halve the latency
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][n][e] = s[1][n][e] = 0.0f;
#pragma unroll
      for (int k = 0; k < K_STEPS; ++k) {
        u32 a[4];  // K[token][dim]: matrices (tokens 0-7, dims 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
        load_matrix_x4(a, keys + place(key_row, key_piece, k));
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) mma<DTYPE>(s[k % 2][n], a, q[n][k][0], q[n][k][1]);
      }

      const int token = (first_token / TILE + flat - unit.begin) * TILE;
      const bool masked = token + TILE > context_len - query_len + 1 || (window > 0 && token < context_len - window);
      u32 written[2] = {~0u, ~0u};  // bits of values of tokens 2t and 2t + 1, and 8 further
      if (BOXES && masked) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int position = token + 2 * t + e / 2 * 8 + e % 2;
          if (position < first_token || position >= context_len) written[e / 2] &= e % 2 ? 0x0000ffffu : 0xffff0000u;
        }
      }
      float tile_max[QUERY_TILES][2];
      bool grew = false;
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // e = 0, 1: token g, rows 2t and 2t + 1; e = 2, 3: token g + 8
          float x = (s[0][n][e] + s[1][n][e]) * scale_log2;
          if (soft_cap > 0.0f) x = tanh_fast(x) * cap_log2;
          if (masked) {
            const int position = token + g + (e / 2) * 8, visible = visible_end[n][e % 2];
            if (position >= visible || (window > 0 && position < visible - window)) x = NEGATIVE_INFINITY;
          }
          s[0][n][e] = x;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x = fmaxf(s[0][n][e], s[0][n][e + 2]);
          x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 4));
          x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 8));
          x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 16));
          tile_max[n][e] = x;
          grew |= x > row_max[n][e];
        }
      }
      if (__any_sync(FULL_MASK, grew)) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float grown = fmaxf(row_max[n][e], tile_max[n][e]);
            const float factor = grown == NEGATIVE_INFINITY ? 1.0f : exp2_fast(row_max[n][e] - grown);
            row_max[n][e] = grown;
            row_sum[n][e] *= factor;
#pragma unroll
            for (int m = 0; m < K_STEPS; ++m) {
              o[m][n][e] *= factor;
              o[m][n][e + 2] *= factor;
            }
          }
      }
      u32 p[QUERY_TILES][2];  // B fragments of P^T: row g, tokens 2t, and + 8
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float reference = row_max[n][e % 2] == NEGATIVE_INFINITY ? 0.0f : row_max[n][e % 2];
          s[0][n][e] = exp2_fast(s[0][n][e] - reference);
        }
        row_sum[n][0] += s[0][n][0] + s[0][n][2];
        row_sum[n][1] += s[0][n][1] + s[0][n][3];
        p[n][0] = transpose_8x8(pack<DTYPE>(s[0][n][0], s[0][n][1]));
        p[n][1] = transpose_8x8(pack<DTYPE>(s[0][n][2], s[0][n][3]));
      }
#pragma unroll
      for (int m = 0; m < K_STEPS; ++m) {
        u32 a[4];  // V^T[dim][token]: matrices in memory (tokens 0-7, dims 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), transposed
        load_matrix_x4_trans(a, values + place(value_row, value_piece, m));
        if (BOXES) a[0] &= written[0], a[1] &= written[0], a[2] &= written[1], a[3] &= written[1];
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) mma<DTYPE>(o[m][n], a, p[n][0], p[n][1]);
      }
      idle = stage;
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      if (stage == 0) parity ^= 1;
    }

    if (!QUERIES_AHEAD && segment_end < end) load_queries(coming, q);

    // Where all other teams of a cut unit have delivered, this one need not say that it has.
    const bool whole = unit.begin >= begin && unit.end <= end;
    const int first_team = whole ? 0 : unit.begin / share, last_team = whole ? 0 : (unit.end - 1) / share;
    int* arrived = arrivals + unit.seq * all_heads + unit.head;
    const bool others_have = !whole && team_tid == 0 && load_acquire(arrived) == last_team - first_team;

    // Four elements of a row of the output, from its sums, which are relative to 2^top.
    auto put = [&](int row, int column, float top, float sum, float4 acc) {
      const int r = row_base + row, head = kv_head * group + r % group;
      add_shared(unit.seq, head, column, SHARED_PREFIX ? first_token : 0, top, sum, acc);
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      const uint2 y = {pack<DTYPE>(acc.x * inverse, acc.y * inverse), pack<DTYPE>(acc.z * inverse, acc.w * inverse)};
      store_vector((uint2*)(out + (i64)(unit.seq * query_len + r / group) * out_stride + (i64)head * HEAD_DIM + column), y);
    };
    // Where a team leaves what it has of this unit: a share cuts at most the one it begins in and the one it ends in.
    auto slot_of = [&](int of) { return 2 * (of * heads.side + heads.own) + (unit.begin > of * share); };
    // Puts together what all teams have of this unit.
    auto combine = [&]() {
      constexpr int PIECES_AT_A_TIME = TEAM < WARPS ? 2 : 1, BATCH = 8;  // loads in flight: their product
      for (int i = team_tid; i < rows * PIECES; i += PIECES_AT_A_TIME * team_threads) {
        float top[PIECES_AT_A_TIME], sum[PIECES_AT_A_TIME];
        float4 acc[PIECES_AT_A_TIME];
        auto row = [&](int n) { return (i + n * team_threads) / PIECES; };
        auto column = [&](int n) { return (i + n * team_threads) % PIECES * 4; };
#pragma unroll
        for (int n = 0; n < PIECES_AT_A_TIME; ++n) {
          top[n] = NEGATIVE_INFINITY, sum[n] = 0.0f;
          acc[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        for (int c = first_team; c <= last_team; c += BATCH) {
          // No branch, so that all is loaded at the same time.
          float2 stats[PIECES_AT_A_TIME][BATCH];
          float4 x[PIECES_AT_A_TIME][BATCH];
#pragma unroll
          for (int b = 0; b < BATCH; ++b) {
            const i64 slot = (i64)slot_of(min(c + b, last_team)) * ROWS;
#pragma unroll
            for (int n = 0; n < PIECES_AT_A_TIME; ++n) {
              const int of = min(row(n), rows - 1);
              stats[n][b] = load_l2(&partial_stats[slot + of]);
              if (c + b > last_team) stats[n][b].x = NEGATIVE_INFINITY;
              x[n][b] = load_l2((const float4*)(partial_out + (slot + of) * HEAD_DIM + column(n)));
            }
          }
#pragma unroll
          for (int n = 0; n < PIECES_AT_A_TIME; ++n) {
            float grown = top[n];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) grown = fmaxf(grown, stats[n][b].x);
            const float reference = grown == NEGATIVE_INFINITY ? 0.0f : grown;
            const float factor = exp2_fast(top[n] - reference);
            sum[n] *= factor, acc[n].x *= factor, acc[n].y *= factor, acc[n].z *= factor, acc[n].w *= factor;
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
              const float weight = exp2_fast(stats[n][b].x - reference);
              sum[n] += weight * stats[n][b].y;
              acc[n].x += weight * x[n][b].x, acc[n].y += weight * x[n][b].y;
              acc[n].z += weight * x[n][b].z, acc[n].w += weight * x[n][b].w;
            }
            top[n] = grown;
          }
        }
#pragma unroll
        for (int n = 0; n < PIECES_AT_A_TIME; ++n)
          if (row(n) < rows) put(row(n), column(n), top[n], sum[n], acc[n]);
      }
    };

    // Merge the team's warps: each writes its O and (max, sum) to its idle stage, then all threads add them up.
    __syncwarp();  // the idle stage's last reads are done
    float* own = (float*)(stages + idle * STAGE_BYTES);
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = row_sum[n][e];
        sum += __shfl_xor_sync(FULL_MASK, sum, 4);
        sum += __shfl_xor_sync(FULL_MASK, sum, 8);
        sum += __shfl_xor_sync(FULL_MASK, sum, 16);
        const int row = n * 8 + 2 * t + e;
        if (row < rows) {
          if (g == 0) merge_stats[warp * ROWS + row] = make_float2(row_max[n][e], sum);
#pragma unroll
          for (int m = 0; m < K_STEPS; ++m) {
            own[row * MERGE_PITCH + m * 16 + g] = o[m][n][e];
            own[row * MERGE_PITCH + m * 16 + g + 8] = o[m][n][e + 2];
          }
        }
      }
    if (lane == 0) idle_stage[warp] = (int)((unsigned char*)own - shared) | (int)others_have;  // in a bit that places do not have
    meet();

    const bool at_once = idle_stage[first_warp] & 1;
    const int slot = slot_of(team);
    for (int i = team_tid; i < rows * PIECES; i += team_threads) {
      const int row = i / PIECES, column = i % PIECES * 4;
      float top = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < TEAM; ++w)
        if (w < team_warps) top = fmaxf(top, merge_stats[(first_warp + w) * ROWS + row].x);
      const float reference = top == NEGATIVE_INFINITY ? 0.0f : top;
      float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < TEAM; ++w) {
        // No branch, so that all warps' parts are loaded at the same time.
        const float2 stats = w < team_warps ? merge_stats[(first_warp + w) * ROWS + row] : make_float2(NEGATIVE_INFINITY, 0.0f);
        const float weight = exp2_fast(stats.x - reference);
        const float* part = (const float*)(shared + (w < team_warps ? idle_stage[first_warp + w] & ~1 : 0)) + row * MERGE_PITCH + column;
        const float4 x = w < team_warps ? *(const float4*)part : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sum += weight * stats.y;
        acc.x += weight * x.x, acc.y += weight * x.y, acc.z += weight * x.z, acc.w += weight * x.w;
      }
      if (whole) {
        put(row, column, top, sum, acc);
      } else {
        store_vector((float4*)(partial_out + ((i64)slot * ROWS + row) * HEAD_DIM + column), acc);
        if (column == 0) partial_stats[slot * ROWS + row] = make_float2(top, sum);
      }
    }
    if (BOXES) fence_async_proxy();  // boxes come to the merge buffers again
    if (!whole) {
      if (at_once) {
        if (team_tid == 0) *arrived = 0;  // for the next launch
        meet();
      } else {
        __threadfence();  // the partial results before the arrival
        meet();
        if (team_tid == 0) {
          const bool last = atomicAdd(arrived, 1) == last_team - first_team;
          if (last) *arrived = 0;
          is_last[first_warp] = last;
          __threadfence();
        }
        meet();
      }
      if (at_once || is_last[first_warp]) combine();
    } else {
      meet();  // the merge buffers are stages again
    }
    segment = segment_end;
  }
  copy_async_wait<0>();
}
