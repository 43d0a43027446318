// Row normalizations: arguments of the kernels, all matrices row-major with contiguous rows.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct NormArgs {
  const void* x;         // [M, K], row stride ldx
  const void* residual;  // [M, K], row stride ldr, or null: added to x before the norm
  const void* weight;    // [K], or null (all ones)
  const void* bias;      // [K] of the weight's dtype, or null (layer only)
  void* sum;             // [M, K] contiguous: x + residual; written when residual is given
  void* out;             // [M, K] contiguous
  int64_t K, ldx, ldr;
  float eps;
  float offset;  // added to the weight: 1 for the Gemma form (rms only)
  DType weight_dtype;
};

// One kernel per dtype of x, residual, sum and out, in the order of DType.
struct NormKernels {
  void (*rms[3])(const NormArgs&, int64_t row0, int64_t row1);
  void (*layer[3])(const NormArgs&, int64_t row0, int64_t row1);
};

}  // namespace llmrt
