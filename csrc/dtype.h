// Storage types of the tensors that kernels read and write. Arithmetic is float32 unless a kernel says otherwise.
#pragma once
#include <stdint.h>

namespace llmrt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, e8m0 = 4 };  // i8: rows of a cache only; e8m0: scales only

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {
  int8_t code;
};

inline constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::i8 || t == DType::e8m0 ? 1 : 2; }

// A row of an int8 cache: its codes, then their scale as a float.
inline constexpr int64_t kScaleBytes = 4;

}  // namespace llmrt
