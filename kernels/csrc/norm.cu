// RMSNorm, with or without adding to the residual stream first (Zhang and Sennrich 2019). One read, one write; float32 inside.
//
// Defines: DTYPE, WIDTH (elements of a row, a multiple of 16 bytes), ROW_WARPS (warps that share a row), CTA_ROWS (rows of a CTA;
// 1 unless ROW_WARPS is 1), PARTS (0: `hidden` of add_rms_norm is DTYPE; else it is the sum of so many float arrays).
#include "device.cuh"

#if PARTS
typedef float Hidden;
#else
typedef DTYPE Hidden;
#endif

constexpr int VECTOR = 16 / sizeof(DTYPE);
constexpr int VECTORS = WIDTH / VECTOR;                         // of a row
constexpr int ROW_THREADS = ROW_WARPS * 32;
constexpr int OWN = (VECTORS + ROW_THREADS - 1) / ROW_THREADS;  // of a thread
static_assert(WIDTH % VECTOR == 0, "rows are read 16 bytes at a time");
static_assert(CTA_ROWS == 1 || ROW_WARPS == 1, "rows of one CTA do not share barriers");
typedef Vector<DTYPE, VECTOR> Packed;

// One thread's part of the weights, which no kernel writes: loaded before the wait.
DEVICE void load_weights(Packed (&own)[OWN], const DTYPE* weight, int lane_in_row) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int v = i * ROW_THREADS + lane_in_row;
    if (v < VECTORS) own[i] = *(const Packed*)(weight + v * VECTOR);
  }
}

// One thread's part of a row: sums squares over the row, writes the normalised values.
DEVICE void normalise(const float (&x)[OWN][VECTOR], const Packed (&weight)[OWN], DTYPE* out, float eps, int lane_in_row,
                      float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum += x[i][j] * x[i][j];
  sum = warp_sum(sum);
  if (ROW_WARPS > 1) {
    if (lane_in_row % 32 == 0) scratch[lane_in_row / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int w = 0; w < ROW_WARPS; ++w) sum += scratch[w];
  }
  const float factor = rsqrtf(sum / WIDTH + eps);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int v = i * ROW_THREADS + lane_in_row;
    if (v < VECTORS) {
      Packed y;
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) y.values[j] = from_float<DTYPE>(x[i][j] * factor * to_float(weight[i].values[j]));
      *(Packed*)(out + v * VECTOR) = y;
    }
  }
}

// Grid: [ceil(rows / CTA_ROWS)]. Block: [CTA_ROWS * ROW_WARPS * 32]. Shared: static.
//   out     [rows, WIDTH] DTYPE, contiguous
//   hidden  [rows / heads, heads, WIDTH] DTYPE, token_stride elements from one group of `heads` rows to the next
//   weight  [WIDTH] DTYPE
extern "C" __global__ void __launch_bounds__(CTA_ROWS * ROW_THREADS)
rms_norm(DTYPE* out, const DTYPE* hidden, const DTYPE* weight, int rows, int heads,
         i64 token_stride, float eps) {
  __shared__ float scratch[ROW_WARPS];
  let_next_start();
  const int lane_in_row = threadIdx.x % ROW_THREADS;
  Packed own_weight[OWN];
  load_weights(own_weight, weight, lane_in_row);
  wait_for_previous();
  const int row = blockIdx.x * CTA_ROWS + threadIdx.x / ROW_THREADS;
  if (row >= rows) return;  // whole warps, and whole CTAs where a row has more than one
  const DTYPE* source = hidden + (i64)(row / heads) * token_stride + (i64)(row % heads) * WIDTH;
  float x[OWN][VECTOR];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int v = i * ROW_THREADS + lane_in_row;
    Packed in = {};
    if (v < VECTORS) in = *(const Packed*)(source + v * VECTOR);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) x[i][j] = to_float(in.values[j]);
  }
  normalise(x, own_weight, out + (i64)row * WIDTH, eps, lane_in_row, scratch);
}

// Grid, block and shared as above.
//   out       [rows, WIDTH] DTYPE: rms_norm(total)
//   total     [rows, WIDTH] DTYPE: hidden + residual, rounded; may be `residual` itself or `hidden` itself
//   hidden    [rows, WIDTH] DTYPE, or [PARTS, rows, WIDTH] float;  residual [rows, WIDTH] DTYPE;  weight [WIDTH] DTYPE
extern "C" __global__ void __launch_bounds__(CTA_ROWS * ROW_THREADS)
add_rms_norm(DTYPE* out, DTYPE* total, const Hidden* hidden, const DTYPE* residual, const DTYPE* weight, int rows,
             float eps) {
  __shared__ float scratch[ROW_WARPS];
  let_next_start();
  const int lane_in_row = threadIdx.x % ROW_THREADS;
  Packed own_weight[OWN];
  load_weights(own_weight, weight, lane_in_row);
  wait_for_previous();
  const int row = blockIdx.x * CTA_ROWS + threadIdx.x / ROW_THREADS;
  if (row >= rows) return;
  const i64 base = (i64)row * WIDTH;
  float x[OWN][VECTOR];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int v = i * ROW_THREADS + lane_in_row;
    Packed held = {};
    Vector<Hidden, VECTOR> in[PARTS ? PARTS : 1] = {};
    if (v < VECTORS) {
#pragma unroll
      for (int part = 0; part < (PARTS ? PARTS : 1); ++part)
        in[part] = *(const Vector<Hidden, VECTOR>*)(hidden + (i64)part * rows * WIDTH + base + v * VECTOR);
      held = *(const Packed*)(residual + base + v * VECTOR);
    }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      float added = to_float(in[0].values[j]);
#pragma unroll
      for (int part = 1; part < PARTS; ++part) added += to_float(in[part].values[j]);
      held.values[j] = from_float<DTYPE>(added + to_float(held.values[j]));
      x[i][j] = to_float(held.values[j]);
    }
    if (v < VECTORS) *(Packed*)(total + base + v * VECTOR) = held;
  }
  normalise(x, own_weight, out + base, eps, lane_in_row, scratch);
}
