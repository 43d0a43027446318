// Gated activations: arguments of the kernels.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct GatedArgs {
  const void *gate, *up;  // [M, K], row strides ld_gate and ld_up
  void* out;              // [M, K] contiguous
  int64_t K, ld_gate, ld_up;
};

// begin and end count elements of out. One kernel per dtype of gate, up and out, in the order of DType.
struct GatedKernels {
  void (*silu[3])(const GatedArgs&, int64_t begin, int64_t end);
  void (*gelu[3])(const GatedArgs&, int64_t begin, int64_t end);
  void (*gelu_tanh[3])(const GatedArgs&, int64_t begin, int64_t end);
};

}  // namespace llmrt
