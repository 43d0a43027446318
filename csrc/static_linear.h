// Statically quantized linear: what the entry point passes to the kernels of a tier. See ops/static_linear.py.
#pragma once
#include "linear.h"

namespace llmrt {

// Sums of products of 8-bit numbers with so many inputs fit 32 bits.
constexpr int64_t kMostInputs = 1 << 16;

// Of `out`, codes are int8 as for quant_linear: the code of ops/static_linear.py minus 128, 0 where an input does not
// exist; `scales` and `sums` hold one number per row: the scale of the activations, NaN for rows with a NaN, and -128
// times the sum of its codes.
struct StaticPrepareArgs {
  const void* x;
  DType dtype;
  int64_t stride, K, tiles;
  const float* factors;  // [K] or null
  float scale;
  int zero;
  Activations out;
};

struct StaticMultiplyArgs {
  MultiplyArgs linear;  // `compute` is not read
  const int32_t* sums;  // [N]: per output the sum of code - 128
  int zero;
};

struct StaticLinearKernels {
  int64_t (*block_rows)(int64_t M);  // the most that a row block can have
  void (*prepare)(const StaticPrepareArgs&, int64_t block0, int64_t block1);
  // Rows row0..row1 (row0 at the start of a row block) x blocks block0..block1 of 32 outputs.
  void (*multiply)(const StaticMultiplyArgs&, int64_t row0, int64_t row1, int64_t block0, int64_t block1);
};

}  // namespace llmrt
