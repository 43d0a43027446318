// Storage types of the tensors that kernels read and write. Arithmetic is float32 unless a kernel says otherwise.
#pragma once
#include <stdint.h>

namespace llmrt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace llmrt
