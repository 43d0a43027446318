// Mixture of experts: what the entry point passes to the kernels beside those of the quantized linear.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct AddRowsArgs {
  const float* rows;      // [count, H], of one expert
  const int64_t* places;  // [count]: which element of `scores` a row belongs to; its row of `sums` is places[i] / k
  const void* scores;     // [M, k]
  DType dtype;            // of scores
  float* sums;            // [M, H]
  int64_t count, k, H;
};

struct ExpertKernels {
  // sums[places[i] / k] += scores[places[i]] * rows[i] for the columns begin..end.
  void (*add_rows)(const AddRowsArgs&, int64_t begin, int64_t end);
  // out[i] = sums[i], rounded, for the elements begin..end.
  void (*round)(const float* sums, void* out, DType dtype, int64_t begin, int64_t end);
};

}  // namespace llmrt
