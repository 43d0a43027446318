// Quantized linear: what the entry point passes to the kernels of a tier. See ops/formats.py for the packed tile.
#pragma once
#include <stdint.h>

#include "coding.h"
#include "dtype.h"
#include "epilogue.h"

namespace llmrt {

constexpr int64_t kTileN = 32, kTileK = 128;

enum class Compute : int { int8, bf16, f32 };

struct PackedWeight {
  const uint8_t* data;  // [blocks][tiles][tile_bytes]
  int64_t blocks, tiles, tile_bytes, code_bytes, scale_bytes;
  int64_t segment;  // inputs that share a scale: 32, 64 or 128
  int bits, zero;   // zero: of symmetric integers, and of `digits`
  bool asymmetric;
  DType scale;
  Coding coding;
  float book[16];      // of 4-bit codes: the values of float products
  uint8_t digits[16];  // of Coding::book: the factors of int8 products, plus `zero`
  float unit;          // what int8 products are multiples of
};

// Activations as the register tiles read them. Rows come in blocks of `block` (the last one may have fewer, R): codes
// [positions / per dword][R] dwords, so that the R broadcasts of one step are neighbours; a dword is 4 int8, 2 bf16 or
// 1 float. For int8 there is per segment one scale and one code sum, [segments][R]: times -zero for symmetric weights,
// which is what the accumulators start from; negated, as 16 bits and 16 zero bits, for asymmetric ones. For floats
// `scales` holds the negated sum of a segment.
struct Activations {
  uint8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t M, block;
};

struct PrepareArgs {
  const void* x;
  DType dtype;
  int64_t stride, K;
  int64_t group, padded_group;  // input position k stands at (k / group) * padded_group + k % group
  Compute compute;
  bool round_to_bf16;  // bf16 compute on a tier without bf16 products: floats that hold bf16 values
  Activations out;
};

struct MultiplyArgs {
  PackedWeight weight;
  Activations activations;
  Compute compute;
  Epilogue epilogue;
  const void* bias;  // [N] or null
  DType bias_dtype;
  const void* other;  // [M, width], contiguous, dtype of out
  void* out;          // [M, width], contiguous
  DType dtype;
  int64_t N, width;
};

struct LinearKernels {
  int64_t (*block_rows)(Compute, int64_t M);  // the most that a row block can have
  bool bf16_products;
  int64_t panel_bytes;  // scratch of one thread besides 128 bytes per row of its chunk
  void (*prepare)(const PrepareArgs&, const PackedWeight&, int64_t block0, int64_t block1);
  // Rows row0..row1 (row0 at the start of a row block) x blocks block0..block1 of 32 outputs.
  void (*multiply)(const MultiplyArgs&, int64_t row0, int64_t row1, int64_t block0, int64_t block1, void* scratch);
};

}  // namespace llmrt
