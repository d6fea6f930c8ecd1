// What a step begins and ends with: its rows' inputs from the batch, the batch moved on, and few words between host and device.
//
// Defines: BLOCK_SIZE (a power of two; only decode_inputs needs more than a value).
#include "device.cuh"

// Grid: [rows]. Block: [128]. Shared: none.
//   slots         [rows] int64, the rows' places in the batch
//   tokens        [3, tokens_stride] int64: by slot the token sampled last, the number of known tokens (0: padding), of prompt tokens
//   block_tables  [slots, table_stride] int32
//   known, output_lens, token_ids, positions, slot_mapping  [rows] int64, the outputs; slot_mapping -1 in padding
//   tables        [rows, columns] int32;  context_lens  [rows] int32
extern "C" __global__ void __launch_bounds__(128)
decode_inputs(i64* known, i64* output_lens, i64* token_ids, i64* positions, i64* slot_mapping, int* tables, int* context_lens,
              const i64* slots, const i64* tokens, const int* block_tables, i64 tokens_stride, i64 table_stride,
              int columns) {
  let_next_start();
  wait_for_previous();
  const i64 row = blockIdx.x, slot = slots[row];
  const int* table = block_tables + slot * table_stride;
  for (int column = threadIdx.x; column < columns; column += 128) tables[row * columns + column] = table[column];
  if (threadIdx.x > 0) return;
  const i64 count = tokens[tokens_stride + slot], position = count > 0 ? count - 1 : 0;
  known[row] = count;
  context_lens[row] = (int)count;
  output_lens[row] = count - tokens[2 * tokens_stride + slot];
  token_ids[row] = tokens[slot];
  positions[row] = position;
  slot_mapping[row] = count > 0 ? (i64)table[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE : -1;
}

// Grid: [ceil(rows / 128)]. Block: [128]. Shared: none.
//   tokens, slots, known  as above; of rows with known tokens the last token and their number move on
//   out, encoded          [rows] int64: what rows have sampled, all bits turned where that is no number to go by; may be one
extern "C" __global__ void __launch_bounds__(128)
move_on(i64* out, i64* tokens, const i64* slots, const i64* known, const i64* encoded, i64 tokens_stride, int rows) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= rows) return;
  const i64 sampled = encoded[row], slot = slots[row], count = known[row];
  out[row] = sampled;
  if (count == 0) return;
  tokens[slot] = sampled < 0 ? ~sampled : sampled;
  tokens[tokens_stride + slot] = count + 1;
}

// Grid: [ceil(words / 256)]. Block: [256]. Shared: none.
//   to, from  [words] u32; one of them may be pinned memory of the host
extern "C" __global__ void __launch_bounds__(256)
copy_words(u32* to, const u32* from, int words) {
  let_next_start();
  wait_for_previous();
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < words) to[i] = from[i];
}
