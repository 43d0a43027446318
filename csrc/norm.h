// Row normalizations: arguments of the kernels, all matrices row-major with contiguous rows.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct NormArgs {
  const void* x;         // [M, K], row stride ldx
  const void* residual;  // [M, K] contiguous, or null: added to x before the norm
  const void* weight;    // [K], or null (all ones)
  const void* bias;      // [K], or null
  void* sum;             // [M, K] contiguous: x + residual; written when residual is given
  void* out;             // [M, K] contiguous
  int64_t K, ldx;
  double eps;
  float offset;  // added to the weight: 1 for the Gemma form
  DType dtype, weight_dtype;
};

struct NormKernels {
  void (*rms)(const NormArgs&, int64_t row0, int64_t row1);
};

}  // namespace llmrt
