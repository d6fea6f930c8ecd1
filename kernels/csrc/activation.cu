// SwiGLU's middle: silu(gate) * up (Shazeer 2020), and rows gathered by id.
//
// Defines: DTYPE.
#include "device.cuh"

constexpr int VECTOR = 16 / sizeof(DTYPE);
typedef Vector<DTYPE, VECTOR> Packed;

// Grid: [ceil(width / VECTOR / 256), rows]. Block: [256]. Shared: none.
//   out      [rows, width] DTYPE, contiguous
//   gate_up  [rows, 2 * width] DTYPE, gate first, row_stride elements from row to row;  width a multiple of 16 bytes
extern "C" __global__ void __launch_bounds__(256)
silu_and_mul(DTYPE* out, const DTYPE* gate_up, int width, i64 row_stride) {
  let_next_start();
  wait_for_previous();
  const int column = (blockIdx.x * 256 + threadIdx.x) * VECTOR;
  if (column >= width) return;
  const DTYPE* row = gate_up + blockIdx.y * row_stride;
  const Packed gate = *(const Packed*)(row + column), up = *(const Packed*)(row + width + column);
  Packed y;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    const float x = to_float(gate.values[j]);
    y.values[j] = from_float<DTYPE>(x / (1.0f + exp2_fast(-LOG2_E * x)) * to_float(up.values[j]));
  }
  *(Packed*)(out + (i64)blockIdx.y * width + column) = y;
}

// Grid: [ceil(width / VECTOR / 256), rows]. Block: [256]. Shared: none.
//   out    [rows, width] DTYPE: table[ids[row]], zeros where the id is outside 0 .. table_rows
//   table  [table_rows, width] DTYPE, contiguous;  ids [rows] int64;  width a multiple of 16 bytes
extern "C" __global__ void __launch_bounds__(256)
gather_rows(DTYPE* out, const DTYPE* table, const i64* ids, int width, i64 table_rows) {
  let_next_start();
  wait_for_previous();
  const int column = (blockIdx.x * 256 + threadIdx.x) * VECTOR;
  if (column >= width) return;
  const i64 id = ids[blockIdx.y];
  Packed y = {};
  if (id >= 0 && id < table_rows) y = *(const Packed*)(table + id * width + column);
  *(Packed*)(out + (i64)blockIdx.y * width + column) = y;
}
