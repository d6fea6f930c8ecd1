// The next token from logits, without sorting the vocabulary. Rows do not depend on one another, and nothing depends on the order
// in which threads run: probabilities are summed as integers of 2^-44 of the likeliest one, so every sum is exact, and the drawn token
// is the one of largest logit / temperature + noise, each token with noise of its own (Gumbel-max; Maddison et al. 2014).
//
// "Likelier" is one total order: larger logit; of equal logits, lower id. A token's composite key, the logit's ordered bits above
// the inverted id, sorts that way, so what top-k, top-p and min-p keep is always "composite key >= threshold".
//
// A threshold is found in a few passes over the row: a histogram over -log2(p), 32 bins an octave, each bin with its count and
// its mass; the bin in which the count (top-k) or the mass (top-p) reaches its goal; finer bins inside it if it holds many; then
// the bin's tokens themselves, compared with one another in shared memory. Rows of more than CANDIDATES near-equal logits end in a
// bisection over the composite key, one pass per bit: slow, never wrong.
//
// Defines: DTYPE (of the logits), VECTOR (logits in 16 bytes where rows are aligned to so many, else 1).
#include "device.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;
constexpr int CANDIDATES = 2048;
constexpr float FINE = 65536.0f;        // finest bins per octave: 32 * BINS
constexpr float UNIT = 17592186044416.0f;  // 2^44
constexpr int MASSLESS_BIN = 45 * 32;      // from 45 octaves down a token's mass rounds to 0
constexpr int PER_THREAD = BINS / THREADS;

// What one CTA keeps in shared memory: about 57 KiB.
struct Workspace {
  u32 count[BINS], mass_low[BINS], mass_high[BINS];  // of a histogram's bins; masses as two words, shared memory adds only 32 bits at once
  u64 keys[CANDIDATES], masses[CANDIDATES];
  u64 warp_a[WARPS], warp_b[WARPS];  // for sums and scans over the block
  u64 result[4];
  u32 number[2];
};

// One row and how its probabilities are formed: p = exp2(-(top - x) * per_octave), the likeliest has 1.
struct Row {
  const DTYPE* logits;
  int size;
  float top, per_octave;
};

DEVICE u32 ordered_bits(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);  // + 0: a negative zero equals zero
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE u64 composite_key(float x, int id) { return (u64)ordered_bits(x) << 32 | (0xffffffffu - (u32)id); }
DEVICE int id_of(u64 key) { return (int)(0xffffffffu - (u32)key); }
DEVICE float octaves(const Row& row, float x) { return (row.top - x) * row.per_octave; }
DEVICE u64 mass_of(const Row& row, float x) { return (u64)(exp2_fast(-octaves(row, x)) * UNIT); }
DEVICE int fine_bin(const Row& row, float x) { return (int)fminf(octaves(row, x) * FINE, FINE * 64.0f - 1.0f); }

// visit(logit, id) for every token, all threads together.
template <class Visit>
DEVICE void each_token(const Row& row, Visit visit) {
  for (int base = threadIdx.x * VECTOR; base < row.size; base += THREADS * VECTOR) {
    const auto piece = *(const Vector<DTYPE, VECTOR>*)(row.logits + base);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) visit(to_float(piece.values[i]), base + i);
  }
}

DEVICE u64 block_sum(u64 x, Workspace& w) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) w.warp_a[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < WARPS; ++i) x += w.warp_a[i];
  return x;
}
DEVICE u64 block_max(u64 x, Workspace& w) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const u64 other = __shfl_xor_sync(FULL_MASK, x, offset);
    x = other > x ? other : x;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) w.warp_a[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < WARPS; ++i) x = w.warp_a[i] > x ? w.warp_a[i] : x;
  return x;
}
// Sums of both values over the threads before this one.
DEVICE void block_scan(u64& a, u64& b, Workspace& w) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 x = a, y = b;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const u64 below_x = __shfl_up_sync(FULL_MASK, x, offset), below_y = __shfl_up_sync(FULL_MASK, y, offset);
    if (lane >= offset) x += below_x, y += below_y;
  }
  __syncthreads();
  if (lane == 31) w.warp_a[warp] = x, w.warp_b[warp] = y;
  __syncthreads();
  a = x - a, b = y - b;
  for (int i = 0; i < warp; ++i) a += w.warp_a[i], b += w.warp_b[i];
}

// The likeliest token, and whether all logits are finite: a NaN's bits are above or below those of all numbers.
struct Likeliest {
  int id;
  float logit;
  bool finite;
  DEVICE i64 encoded(int token) const { return finite ? (i64)token : ~(i64)token; }
};
DEVICE float float_of(u32 ordered) { return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered); }
// The largest key of tokens from `first_id` on, and the smallest ordered bits, inverted.
struct Extremes {
  u64 best;
  u32 inverted_least;
  DEVICE Likeliest likeliest() const {
    const float top = float_of((u32)(best >> 32)), bottom = float_of(~inverted_least);
    return Likeliest{id_of(best), top, top - bottom < -NEGATIVE_INFINITY};
  }
};
DEVICE Extremes extremes(const DTYPE* logits, int size, int first_id, Workspace& w) {
  u64 best = 0;
  u32 least = ~0u;
  each_token(Row{logits, size, 0.0f, 0.0f}, [&](float x, int id) {
    const u64 key = composite_key(x, first_id + id);
    best = key > best ? key : best;
    least = (u32)(key >> 32) < least ? (u32)(key >> 32) : least;
  });
  best = block_max(best, w);
  return Extremes{best, (u32)block_max(~least, w)};
}
DEVICE Likeliest likeliest(const DTYPE* logits, int size, Workspace& w) { return extremes(logits, size, 0, w).likeliest(); }

struct Threshold {
  u64 key;   // the least likely token that is kept
  u64 mass;  // of all that are kept
};

// Fills the histogram with the bins of level 0, or with the fine bins inside `inside`.
DEVICE void fill_histogram(const Row& row, int inside, Workspace& w) {
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += THREADS) w.count[i] = w.mass_low[i] = w.mass_high[i] = 0;
  __syncthreads();
  each_token(row, [&](float x, int) {
    const int fine = fine_bin(row, x), coarse = fine / BINS;
    if (inside >= 0 && coarse != inside) return;
    const int bin = inside >= 0 ? fine % BINS : coarse;
    const u64 mass = mass_of(row, x);
    const u32 low = (u32)mass;
    atomicAdd(&w.count[bin], 1u);
    if (mass) {
      const u32 before = atomicAdd(&w.mass_low[bin], low);
      const u32 high = (u32)(mass >> 32) + (before + low < before);
      if (high) atomicAdd(&w.mass_high[bin], high);
    }
  });
  __syncthreads();
}

// The bin in which count or mass reaches `goal`, given what lies before the histogram; adds to it what lies before the bin.
// Returns -1 if the goal is beyond the last bin.
DEVICE int crossing_bin(bool by_mass, u64 goal, u64& count_before, u64& mass_before, u32& count_inside, Workspace& w) {
  if (threadIdx.x == 0) w.result[0] = ~0ull;
  u64 counts[PER_THREAD], masses[PER_THREAD], count = 0, mass = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int bin = threadIdx.x * PER_THREAD + i;
    counts[i] = w.count[bin];
    masses[i] = (u64)w.mass_low[bin] + ((u64)w.mass_high[bin] << 32);
    count += counts[i], mass += masses[i];
  }
  block_scan(count, mass, w);
  count += count_before, mass += mass_before;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const u64 before = by_mass ? mass : count, own = by_mass ? masses[i] : counts[i];
    if (before < goal && goal <= before + own) {
      w.result[0] = threadIdx.x * PER_THREAD + i;
      w.result[1] = count;
      w.result[2] = mass;
      w.number[0] = (u32)counts[i];
    }
    count += counts[i], mass += masses[i];
  }
  __syncthreads();
  const u64 bin = w.result[0];
  if (bin != ~0ull) count_before = w.result[1], mass_before = w.result[2], count_inside = w.number[0];
  __syncthreads();
  return bin == ~0ull ? -1 : (int)bin;
}

// The token at which the count (or the mass) of the likeliest tokens reaches `goal`, 1 <= goal. The histogram of level 0 must be
// filled; it is overwritten only if finer bins are needed, which is noted in `overwritten`. Where `exact` is not asked for, a
// threshold among tokens too unlikely to have any mass becomes 0, which keeps the same masses.
DEVICE Threshold find_threshold(const Row& row, bool by_mass, u64 goal, bool exact, bool& overwritten, Workspace& w) {
  u64 count_before = 0, mass_before = 0;
  u32 inside = 0;
  const int coarse = crossing_bin(by_mass, goal, count_before, mass_before, inside, w);
  if (coarse < 0) return Threshold{0, mass_before};  // everything is kept; the caller does not use the mass
  if (!exact && coarse >= MASSLESS_BIN) return Threshold{0, mass_before};
  int fine = -1;
  if (inside > CANDIDATES) {
    fill_histogram(row, coarse, w);
    overwritten = true;
    fine = crossing_bin(by_mass, goal, count_before, mass_before, inside, w);
  }
  if (inside <= CANDIDATES) {
    if (threadIdx.x == 0) w.number[1] = 0;
    __syncthreads();
    each_token(row, [&](float x, int id) {
      const int bin = fine_bin(row, x);
      if (bin / BINS != coarse || (fine >= 0 && bin % BINS != fine)) return;
      const u32 at = atomicAdd(&w.number[1], 1u);
      w.keys[at] = composite_key(x, id);
      w.masses[at] = mass_of(row, x);
    });
    __syncthreads();
    const int n = (int)inside;
    for (int c = threadIdx.x; c < n; c += THREADS) {
      u64 count = count_before, mass = mass_before;
      const u64 key = w.keys[c];
      for (int i = 0; i < n; ++i)
        if (w.keys[i] > key) count += 1, mass += w.masses[i];
      const u64 before = by_mass ? mass : count, own = by_mass ? w.masses[c] : 1;
      if (before < goal && goal <= before + own) w.result[0] = key, w.result[1] = mass + w.masses[c];
    }
    __syncthreads();
    const Threshold found = {w.result[0], w.result[1]};
    __syncthreads();
    return found;
  }
  // The largest key at or above which count (mass) reaches the goal, bit by bit.
  u64 key = 0, mass_kept = 0;
  for (int bit = 63; bit >= -1; --bit) {
    const u64 trial = bit >= 0 ? key | 1ull << bit : key;
    u64 count = 0, mass = 0;
    each_token(row, [&](float x, int id) {
      if (composite_key(x, id) >= trial) count += 1, mass += mass_of(row, x);
    });
    count = block_sum(count, w);
    mass = block_sum(mass, w);
    if ((by_mass ? mass : count) >= goal) key = trial, mass_kept = mass;
  }
  return Threshold{key, mass_kept};
}

// Grid: [rows, parts of a row]. Block: [1024]. Shared: sizeof(Workspace).
//   out      [rows] int64: the likeliest token; all its bits turned if not all logits of the row are finite
//   logits   [rows, size] DTYPE, row_stride elements from row to row
//   best, inverted_least, arrived  [rows] of what parts of a row have in common: zero before and after; not used if there is one part
extern "C" __global__ void __launch_bounds__(THREADS)
argmax(i64* out, const DTYPE* logits, u64* best, u32* inverted_least, int* arrived, int size, i64 row_stride) {
  SHARED_MEMORY(shared);
  Workspace& w = *(Workspace*)shared;
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x, parts = gridDim.y, part = ceil_div(ceil_div(size, VECTOR), parts) * VECTOR;
  const int first = min(size, (int)blockIdx.y * part);
  Extremes found = extremes(logits + row * row_stride + first, min(part, size - first), first, w);
  if (threadIdx.x > 0) return;
  if (parts > 1) {
    atomicMax(best + row, found.best);
    atomicMax(inverted_least + row, found.inverted_least);
    __threadfence();
    if (atomicAdd(arrived + row, 1) < parts - 1) return;
    __threadfence();
    found = Extremes{load_l2(best + row), load_l2(inverted_least + row)};
    best[row] = 0, inverted_least[row] = 0, arrived[row] = 0;
  }
  const Likeliest likeliest = found.likeliest();
  out[row] = likeliest.encoded(likeliest.id);
}

// Philox4x32-10 (Salmon et al. 2011) of the counter (block, index, position low word, position high word) under the key (seed low
// word, seed high word): the words of the tokens 4 * block to 4 * block + 3.
DEVICE void philox(u32 (&words)[4], u32 block, u64 index, u64 position, u64 seed) {
  u32 c0 = block, c1 = (u32)index, c2 = (u32)position, c3 = (u32)(position >> 32);
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
    const u32 low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// -log(-log(u)) for u = (word + 1/2) / 2^32. Above one half the inner logarithm is taken of 1 - u, which keeps its digits.
DEVICE float gumbel(u32 word) {
  const bool upper = word & 0x80000000u;
  const float x = ((float)(upper ? ~word : word) + 0.5f) * 2.3283064365386963e-10f;
  return -logf(upper ? -log1pf(-x) : -logf(x));
}

// Grid: [rows]. Block: [1024]. Shared: sizeof(Workspace).
//   out          [rows] int64: the drawn token; all its bits turned if not all logits of the row are finite
//   logits       [rows, size] DTYPE, row_stride elements from row to row
//   temperature  [rows] float32; 0 or less takes the likeliest token
//   top_k        [rows] int64, 0 = all;  top_p [rows] float32, 1 or more = all;  min_p [rows] float32, 0 = all
//   seeds        [rows] int64, the bits of an unsigned seed;  indices, positions  [rows] int64
extern "C" __global__ void __launch_bounds__(THREADS)
sample(i64* __restrict__ out, const DTYPE* __restrict__ logits, const float* __restrict__ temperature,
       const i64* __restrict__ top_k, const float* __restrict__ top_p, const float* __restrict__ min_p,
       const i64* __restrict__ seeds, const i64* __restrict__ indices, const i64* __restrict__ positions, int size, i64 row_stride) {
  SHARED_MEMORY(shared);
  Workspace& w = *(Workspace*)shared;
  const int r = blockIdx.x;
  Row row = {logits + r * row_stride, size, 0.0f, 0.0f};
  const Likeliest best = likeliest(row.logits, size, w);
  row.top = best.logit;
  const float heat = temperature[r];
  if (threadIdx.x == 0) out[r] = best.encoded(best.id);  // stays if the row is greedy, or not finite and nothing can be drawn
  if (!(heat > 0.0f) || !(fabsf(row.top) < -NEGATIVE_INFINITY)) return;
  row.per_octave = LOG2_E / heat;

  const u64 k = (u64)top_k[r];
  const bool limited = k > 0 && k < (u64)size, nucleus = top_p[r] < 1.0f;
  Threshold kept = {0, 0};
  bool overwritten = false;
  if (limited || nucleus) fill_histogram(row, -1, w);
  if (limited) kept = find_threshold(row, false, k, false, overwritten, w);
  if (nucleus) {
    if (!limited) {
      u64 mass = 0;
      for (int i = threadIdx.x; i < BINS; i += THREADS) mass += (u64)w.mass_low[i] + ((u64)w.mass_high[i] << 32);
      kept.mass = block_sum(mass, w);
    }
    if (overwritten) fill_histogram(row, -1, w);
    const u64 goal = (u64)ceil((double)top_p[r] * (double)kept.mass);
    // Its goal lies within the mass that top-k keeps, so its threshold is at or above top-k's.
    const Threshold narrower = find_threshold(row, true, goal > 0 ? goal : 1, false, overwritten, w);
    kept.key = narrower.key > kept.key ? narrower.key : kept.key;
  }
  const float least = min_p[r];
  auto is_kept = [&](float x, int id) {
    return composite_key(x, id) >= kept.key && exp2_fast(-octaves(row, x)) >= least && mass_of(row, x) > 0;
  };

  // Four neighbouring tokens share one Philox. Scores are taken from the likeliest token down, so those that can win are small
  // numbers, with digits to spare.
  const float per_nat = 1.0f / heat;
  u64 drawn = 0;
  for (int base = threadIdx.x * 4; base < size; base += THREADS * 4) {
    float x[4];
    bool some = false;
    if (VECTOR > 1) {
      const auto piece = *(const Vector<DTYPE, 4>*)(row.logits + base);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = to_float(piece.values[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (VECTOR == 1) x[j] = base + j < size ? to_float(row.logits[base + j]) : NEGATIVE_INFINITY;
      if (is_kept(x[j], base + j)) some = true;
      else x[j] = NEGATIVE_INFINITY;
    }
    if (!some) continue;
    u32 words[4];
    philox(words, (u32)base / 4, (u64)indices[r], (u64)positions[r], (u64)seeds[r]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (x[j] == NEGATIVE_INFINITY) continue;
      const u64 key = composite_key(gumbel(words[j]) - (row.top - x[j]) * per_nat, base + j);
      drawn = key > drawn ? key : drawn;
    }
  }
  drawn = block_max(drawn, w);
  if (threadIdx.x == 0 && drawn) out[r] = best.encoded(id_of(drawn));
}

// Grid: [rows]. Block: [1024]. Shared: sizeof(Workspace).
//   logprobs      [rows] float32, of the chosen token;  ranks [rows] int64, 1 = likeliest
//   top_ids       [rows, num_top] int64, likeliest first;  top_logprobs [rows, num_top] float32
//   logits        [rows, size] DTYPE, row_stride elements from row to row;  chosen [rows] int64;  num_top <= min(size, CANDIDATES)
extern "C" __global__ void __launch_bounds__(THREADS)
token_logprobs(float* __restrict__ logprobs, i64* __restrict__ ranks, i64* __restrict__ top_ids, float* __restrict__ top_logprobs,
               const DTYPE* __restrict__ logits, const i64* __restrict__ chosen, int num_top, int size, i64 row_stride) {
  SHARED_MEMORY(shared);
  Workspace& w = *(Workspace*)shared;
  const i64 r = blockIdx.x;
  Row row = {logits + r * row_stride, size, 0.0f, LOG2_E};
  row.top = likeliest(row.logits, size, w).logit;
  const int own_id = (int)chosen[r];
  const float own = to_float(row.logits[own_id]);
  const u64 own_key = composite_key(own, own_id);
  u64 mass = 0, rank = 0;
  each_token(row, [&](float x, int id) {
    mass += mass_of(row, x);
    rank += composite_key(x, id) >= own_key;
  });
  mass = block_sum(mass, w);
  rank = block_sum(rank, w);
  const float normaliser = row.top + (float)log((double)mass / (double)UNIT);
  if (threadIdx.x == 0) {
    logprobs[r] = own - normaliser;
    ranks[r] = (i64)rank;
  }
  if (num_top <= 0) return;
  u64 least = 0;
  if (num_top < size) {
    bool overwritten = false;
    fill_histogram(row, -1, w);
    least = find_threshold(row, false, (u64)num_top, true, overwritten, w).key;
  }
  if (threadIdx.x == 0) w.number[1] = 0;
  __syncthreads();
  each_token(row, [&](float x, int id) {
    const u64 key = composite_key(x, id);
    if (key >= least) w.keys[atomicAdd(&w.number[1], 1u)] = key;
  });
  __syncthreads();
  for (int c = threadIdx.x; c < num_top; c += THREADS) {
    const u64 key = w.keys[c];
    int place = 0;
    for (int i = 0; i < num_top; ++i) place += w.keys[i] > key;
    top_ids[r * num_top + place] = id_of(key);
    top_logprobs[r * num_top + place] = to_float(row.logits[id_of(key)]) - normaliser;
  }
}

// Grid: [ceil(size / 1024), rows]. Block: [256]. Shared: none. In place where out = logits.
//   out, logits    [rows, size] float32, row_stride elements from row to row (both)
//   slots          [rows] int64 or null: which row of the state each row has; null: its own number
//   prompt_seen    [slots, size] bool;  output_counts [slots, size] int32, contiguous
//   repetition, presence, frequency  [slots] float32; 1, 0 and 0 change nothing
extern "C" __global__ void __launch_bounds__(256)
apply_penalties(float* out, const float* logits, const i64* __restrict__ slots, const unsigned char* __restrict__ prompt_seen,
                const int* __restrict__ output_counts, const float* __restrict__ repetition, const float* __restrict__ presence,
                const float* __restrict__ frequency, int size, i64 row_stride) {
  const i64 r = blockIdx.y, slot = slots ? slots[r] : r;
  const float factor = repetition[slot], once = presence[slot], each = frequency[slot];
  for (int i = 0; i < 4; ++i) {
    const int id = blockIdx.x * 1024 + i * 256 + threadIdx.x;
    if (id >= size) return;
    float x = logits[r * row_stride + id];
    const int count = output_counts[slot * size + id];
    if (count > 0 || prompt_seen[slot * size + id]) x = x > 0.0f ? x / factor : x * factor;
    x -= each * (float)count;
    out[r * row_stride + id] = x - (count > 0 ? once : 0.0f);
  }
}

// Grid: [ceil(count / 256)]. Block: [256]. Shared: none. No pair of row and id twice.
//   logits  [rows, size] float32, row_stride elements from row to row;  rows, ids [count] int64
//   bias    [count] float32, added; null: the logit becomes -infinity
extern "C" __global__ void __launch_bounds__(256)
adjust_tokens(float* __restrict__ logits, const i64* __restrict__ rows, const i64* __restrict__ ids,
              const float* __restrict__ bias, int count, i64 row_stride) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  float* place = logits + rows[i] * row_stride + ids[i];
  *place = bias ? *place + bias[i] : NEGATIVE_INFINITY;
}
