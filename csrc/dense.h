// Linears over floating-point weights: arguments of the kernels.
#pragma once
#include <stdint.h>

#include "dtype.h"
#include "epilogue.h"

namespace llmrt {

// x, weights, biases, other and out have one dtype. Rows are contiguous, ld is the distance of two rows in elements.
struct DenseArgs {
  struct Linear {
    const void* weight;  // [N, K]
    const void* bias;    // [N] or null
    int64_t ld;
  };
  const void* x;  // [M, K]
  Linear linear;
  Linear up;          // of a gated epilogue: act(linear) * up
  const void* other;  // [M, N], of the epilogues add and mul
  void* out;          // [M, N] contiguous
  int64_t M, N, K, ldx, ldo;
  Epilogue epilogue;
};

// One kernel per dtype, in the order of DType.
struct DenseKernels {
  void (*multiply[3])(const DenseArgs&, int64_t n0, int64_t n1);  // columns n0..n1 of out
  void (*finish[3])(const DenseArgs&, int64_t m0, int64_t m1);    // epilogue on rows m0..m1 of out, which has x W^T + b
};

}  // namespace llmrt
