// Float vectors of one ISA tier: `F32` holds `lanes` floats. Included by tier files only, so everything is in an
// anonymous namespace (an inline function shared with a translation unit of another tier could be the copy that the
// linker keeps). load/store convert from and to bf16 and f16; the forms with a count touch only that many elements.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "dtype.h"

#if defined(__AVX512F__)
#include "vec_avx512.h"
#else
#include "vec_avx2.h"
#endif

namespace llmrt {
namespace {

inline F32 operator+(F32 a, F32 b) { return add(a, b); }
inline F32 operator-(F32 a, F32 b) { return sub(a, b); }
inline F32 operator*(F32 a, F32 b) { return mul(a, b); }
inline F32 operator/(F32 a, F32 b) { return div(a, b); }

// min and max return their second operand where one is NaN: in this order NaN passes through.
inline F32 clamp(F32 x, float low, float high) { return min(F32::set1(high), max(F32::set1(low), x)); }

// Elementwise functions: exp to 2 ulp over the whole float range (Cephes expf: reduction by ln 2 and a degree-5
// polynomial).
inline F32 exp(F32 x) {
  x = clamp(x, -103.97f, 88.72283f);
  F32 n = round(x * F32::set1(1.44269504088896341f));
  F32 r = fma(n, F32::set1(-0.693359375f), x);
  r = fma(n, F32::set1(2.12194440e-4f), r);
  F32 p = F32::set1(1.9875691500e-4f);
  p = fma(p, r, F32::set1(1.3981999507e-3f));
  p = fma(p, r, F32::set1(8.3334519073e-3f));
  p = fma(p, r, F32::set1(4.1665795894e-2f));
  p = fma(p, r, F32::set1(1.6666665459e-1f));
  p = fma(p, r, F32::set1(5.0000001201e-1f));
  p = fma(p, r * r, r + F32::set1(1.f));
  return scale_by_power_of_two(p, n);
}
inline F32 sigmoid(F32 x) { return F32::set1(1.f) / (F32::set1(1.f) + exp(F32::zero() - x)); }
inline F32 tanh(F32 x) {
  F32 e = exp(clamp(x, -20.f, 20.f) * F32::set1(2.f));
  return (e - F32::set1(1.f)) / (e + F32::set1(1.f));
}
// Error function as x P(x^2) / Q(x^2) on |x| <= 4 (minimax coefficients as used by Eigen), absolute error below 3e-7.
inline F32 erf(F32 x) {
  x = clamp(x, -4.f, 4.f);
  F32 y = x * x;
  F32 p = F32::set1(-2.72614225801306e-10f);
  p = fma(p, y, F32::set1(2.77068142495902e-08f));
  p = fma(p, y, F32::set1(-2.10102402082508e-06f));
  p = fma(p, y, F32::set1(-5.69250639462346e-05f));
  p = fma(p, y, F32::set1(-7.34990630326855e-04f));
  p = fma(p, y, F32::set1(-2.95459980854025e-03f));
  p = fma(p, y, F32::set1(-1.60960333262415e-02f));
  F32 q = F32::set1(-1.45660718464996e-05f);
  q = fma(q, y, F32::set1(-2.13374055278905e-04f));
  q = fma(q, y, F32::set1(-1.68282697438203e-03f));
  q = fma(q, y, F32::set1(-7.37332916720468e-03f));
  q = fma(q, y, F32::set1(-1.42647390514189e-02f));
  return x * p / q;
}
inline F32 silu(F32 x) { return x * sigmoid(x); }
inline F32 gelu(F32 x) { return F32::set1(0.5f) * x * (F32::set1(1.f) + erf(x * F32::set1(0.70710678118654752f))); }
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u).
inline F32 gelu_tanh(F32 x) {
  return x * sigmoid(F32::set1(1.59576912160573071f) * fma(F32::set1(0.044715f) * x * x, x, x));
}
inline F32 relu(F32 x) { return max(F32::zero(), x); }  // max returns its second operand for NaN: NaN passes through

// Reads and writes of a pointer whose type is known only at run time, `i` in elements.
inline F32 load(const void* p, DType t, int64_t i) {
  if (t == DType::f32) return load((const float*)p + i);
  if (t == DType::bf16) return load((const bf16*)p + i);
  return load((const f16*)p + i);
}
inline F32 load(const void* p, DType t, int64_t i, int64_t count) {
  if (t == DType::f32) return load((const float*)p + i, count);
  if (t == DType::bf16) return load((const bf16*)p + i, count);
  return load((const f16*)p + i, count);
}
inline void store(void* p, DType t, int64_t i, F32 x) {
  if (t == DType::f32) return store((float*)p + i, x);
  if (t == DType::bf16) return store((bf16*)p + i, x);
  return store((f16*)p + i, x);
}
inline void store(void* p, DType t, int64_t i, F32 x, int64_t count) {
  if (t == DType::f32) return store((float*)p + i, x, count);
  if (t == DType::bf16) return store((bf16*)p + i, x, count);
  return store((f16*)p + i, x, count);
}

}  // namespace
}  // namespace llmrt
