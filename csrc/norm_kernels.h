#pragma once
#include "norm.h"
#include "vec.h"

namespace llmrt {
namespace {

// Calls f(i, count) for each vector of a row of K elements; count is F32::lanes except at the end.
template <class Function>
inline void for_each_vector(int64_t K, Function f) {
  int64_t i = 0;
  for (; i + F32::lanes <= K; i += F32::lanes) f(i, F32::lanes);
  if (i < K) f(i, K - i);
}

void rms_rows(const NormArgs& a, int64_t row0, int64_t row1) {
  for (int64_t m = row0; m < row1; m++) {
    const char* x = (const char*)a.x + m * a.ldx * size_of(a.dtype);
    if (a.residual) {
      const char* residual = (const char*)a.residual + m * a.K * size_of(a.dtype);
      char* sum_row = (char*)a.sum + m * a.K * size_of(a.dtype);
      for_each_vector(a.K, [&](int64_t i, int64_t n) {
        store(sum_row, a.dtype, i, load(x, a.dtype, i, n) + load(residual, a.dtype, i, n), n);
      });
      x = sum_row;  // the norm is taken of the sum as stored, so that both outputs agree
    }
    F32 squares = F32::zero();
    for_each_vector(a.K, [&](int64_t i, int64_t n) {
      F32 v = load(x, a.dtype, i, n);
      squares = fma(v, v, squares);
    });
    const F32 inverse = F32::set1(1.f / __builtin_sqrtf(sum(squares) / (float)a.K + (float)a.eps));
    const F32 offset = F32::set1(a.offset);
    void* out = (char*)a.out + m * a.K * size_of(a.dtype);
    for_each_vector(a.K, [&](int64_t i, int64_t n) {
      F32 y = load(x, a.dtype, i, n) * inverse;
      if (a.weight) y = y * (load(a.weight, a.weight_dtype, i, n) + offset);
      store(out, a.dtype, i, y, n);
    });
  }
}

constexpr NormKernels norm_kernels = {rms_rows};

}  // namespace
}  // namespace llmrt
