// Quantization by rounding to nearest: see ops/formats.py for the formulas and the canonical tensors.
#pragma once
#include <stdint.h>

#include "coding.h"
#include "dtype.h"

namespace llmrt {

struct QuantizeArgs {
  const void* weight;  // [N, K], row stride ldw
  DType dtype;
  int64_t K, ldw, group, groups;
  Coding coding;
  int bits, zero;  // zero: of symmetric integers
  float absmax;    // what the largest magnitude of a group becomes
  bool asymmetric, fullrange;
  // Of a book: its midpoints, rising. A value's code is first_code and the steps of all midpoints that it exceeds.
  int midpoints, first_code;
  float midpoint[15];
  int step[15];
  DType scale_dtype;
  uint8_t* codes;  // [N, row_bytes]
  int64_t row_bytes;
  void* scales;    // [N, groups]
  uint8_t* zeros;  // [N, groups] when asymmetric
};

struct QuantizeKernels {
  // Rows row0..row1; `buffer` has K + kQuantizeSlack bytes. Returns false if a value is NaN or infinite.
  bool (*rows)(const QuantizeArgs&, int64_t row0, int64_t row1, uint8_t* buffer);
};

constexpr int64_t kQuantizeSlack = 64;  // vectors may write past the last code

}  // namespace llmrt
