#pragma once
#include "norm.h"
#include "row.h"

namespace llmrt {
namespace {

// Returns f(pointer) with the pointer in the type that it has in memory.
template <class Function>
inline void with_type(const void* p, DType t, Function f) {
  if (t == DType::f32) return f((const float*)p);
  if (t == DType::bf16) return f((const bf16*)p);
  f((const f16*)p);
}

// The row to normalize and, with a residual, the place of its sum.
template <class T>
struct NormRow {
  const T *x, *residual;
  T *sum, *out;
  NormRow(const NormArgs& a, int64_t m)
      : x((const T*)a.x + m * a.ldx),
        residual(a.residual ? (const T*)a.residual + m * a.ldr : nullptr),
        sum(a.residual ? (T*)a.sum + m * a.K : nullptr),
        out((T*)a.out + m * a.K) {}
  const T* normalized() const { return residual ? sum : x; }
};

// Folds f(vector, n, s) over the row. With a residual the sum is stored on the way and read back, so that the norm is
// taken of the rounded sum and both outputs agree.
template <class T, class Sums, class Function>
inline Sums fold_row(const NormRow<T>& row, int64_t K, Sums zero, Function f) {
  if (!row.residual)
    return fold_vectors(K, zero, [&](int64_t i, auto n, Sums s) { return f(load(row.x + i, n), n, s); });
  return fold_vectors(K, zero, [&](int64_t i, auto n, Sums s) {
    store(row.sum + i, load(row.x + i, n) + load(row.residual + i, n), n);
    return f(load(row.sum + i, n), n, s);
  });
}

// out = x / rms(x) * (weight + offset), given the lanes' sums of squares; out may be x.
template <class T>
inline void scale_row(const T* x, F32 squares, const void* weight, DType weight_dtype, int64_t K, float eps,
                      float offset, T* out) {
  const F32 inverse = F32::set1(1.f / __builtin_sqrtf(sum(squares) / (float)K + eps)), shift = F32::set1(offset);
  with_type(weight, weight_dtype, [&](auto w) {
    for_each_vector(K,
                    [&](int64_t i, auto n) { store(out + i, load(x + i, n) * inverse * (load(w + i, n) + shift), n); });
  });
}

inline F32 add_square(F32 v, F32 s) { return fma(v, v, s); }

// One row as rms_rows has it.
template <class T>
inline void rms_row(const T* x, const void* weight, DType weight_dtype, int64_t K, float eps, float offset, T* out) {
  const F32 squares =
      fold_vectors(K, F32::zero(), [&](int64_t i, auto n, F32 s) { return add_square(load(x + i, n), s); });
  scale_row(x, squares, weight, weight_dtype, K, eps, offset, out);
}

template <class T>
void rms_rows(const NormArgs& a, int64_t row0, int64_t row1) {
  for (int64_t m = row0; m < row1; m++) {
    const NormRow<T> row(a, m);
    const F32 squares = fold_row(row, a.K, F32::zero(), [](F32 v, auto, F32 s) { return add_square(v, s); });
    scale_row(row.normalized(), squares, a.weight, a.weight_dtype, a.K, a.eps, a.offset, row.out);
  }
}

// Differences to a guess of the mean: their sum corrects the guess, and the variance for it.
struct Moments {
  F32 first, second;
};
inline Moments operator+(Moments a, Moments b) { return {a.first + b.first, a.second + b.second}; }

// y * weight + bias for the vector at i; a null weight means ones, a null bias zeros.
template <class W, class N>
inline F32 affine(F32 y, const W* weight, const W* bias, int64_t i, N n) {
  if (weight && bias) return fma(y, load(weight + i, n), load(bias + i, n));
  if (weight) return y * load(weight + i, n);
  return bias ? y + load(bias + i, n) : y;
}

// A lane that does not exist has to stay out of the differences: it holds 0, not the mean.
inline F32 difference(F32 v, F32 mean, Whole) { return v - mean; }
inline F32 difference(F32 v, F32 mean, int64_t n) {
  float lane[F32::lanes] = {};
  store(lane, v - mean, n);
  return load(lane);
}

template <class T>
void layer_rows(const NormArgs& a, int64_t row0, int64_t row1) {
  const float count = (float)a.K;
  for (int64_t m = row0; m < row1; m++) {
    const NormRow<T> row(a, m);
    const F32 total = fold_row(row, a.K, F32::zero(), [](F32 v, auto, F32 s) { return s + v; });
    const F32 guess = F32::set1(sum(total) / count);
    const T* x = row.normalized();
    const Moments moments = fold_vectors(a.K, Moments{F32::zero(), F32::zero()}, [&](int64_t i, auto n, Moments s) {
      const F32 d = difference(load(x + i, n), guess, n);
      return Moments{s.first + d, fma(d, d, s.second)};
    });
    const float shift = sum(moments.first) / count;
    float variance = sum(moments.second) / count - shift * shift;
    if (variance < 0) variance = 0;
    const F32 rest = F32::set1(shift), inverse = F32::set1(1.f / __builtin_sqrtf(variance + a.eps));
    with_type(a.weight, a.weight_dtype, [&](auto weight) {
      const auto bias = (decltype(weight))a.bias;
      for_each_vector(a.K, [&](int64_t i, auto n) {
        // guess + shift would round: a mean far from 0 has an ulp that shows in the differences
        store(row.out + i, affine((load(x + i, n) - guess - rest) * inverse, weight, bias, i, n), n);
      });
    });
  }
}

constexpr NormKernels norm_kernels = {{rms_rows<float>, rms_rows<bf16>, rms_rows<f16>},
                                      {layer_rows<float>, layer_rows<bf16>, layer_rows<f16>}};

}  // namespace
}  // namespace llmrt
