// Rotary position embedding: arguments of the kernels. Strides count elements.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct RopeHeads {
  const void* in;  // [B, S, heads, D], elements of a head contiguous
  void* out;       // likewise; no memory of in
  int64_t heads, stride_b, stride_s, stride_h, out_b, out_s, out_h;
  const void* weight;  // [D] of the RMS norm before the rotation, or null
  DType weight_dtype;
};

// Rows of cos or sin: [B, S, columns], or with positions [P, columns] and stride_s between rows.
struct RopeTable {
  const void* data;
  int64_t stride_b, stride_s;
};

// The rotated keys of row b are written where b % every == 0, token s as token slots[s * stride] of the output.
struct RopeSlots {
  const int64_t* slots;  // or null: token s
  int64_t stride, every;
};

struct RopeArgs {
  RopeHeads query, key;
  RopeSlots key_slots;
  RopeTable cos, sin;
  const int64_t* positions;  // [B, S], or null
  int64_t positions_b, positions_s;
  int64_t S, D, half;  // half the number of rotated elements
  DType table_dtype;
  float eps, offset;  // of the norms
};

// Tokens count b * S + s. One kernel per dtype of query and key, in the order of DType.
struct RopeKernels {
  void (*halves[3])(const RopeArgs&, int64_t token0, int64_t token1);
  void (*interleaved[3])(const RopeArgs&, int64_t token0, int64_t token1);
};

}  // namespace llmrt
