// The largest element of a row: what the kernels return.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct Largest {
  float value;
  int64_t index;
  // Whether this one is chosen although the other stands before it: NaN is above everything.
  bool above(const Largest& other) const { return value != value ? other.value == other.value : value > other.value; }
};

// Among elements begin..end - 1 of a contiguous row. One kernel per dtype, in the order of DType.
struct ArgmaxKernels {
  Largest (*largest[3])(const void* row, int64_t begin, int64_t end);
};

}  // namespace llmrt
