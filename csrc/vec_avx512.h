// 16 floats in a zmm register (AVX-512 F, BW, VL, DQ; conversions to bf16 by instruction where AVX512_BF16 is there).
#pragma once

namespace llmrt {
namespace {

struct F32 {
  static constexpr int64_t lanes = 16;
  __m512 v;
  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 set1(float x) { return {_mm512_set1_ps(x)}; }
};

inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 scale_by_power_of_two(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float max_of(F32 a) { return _mm512_reduce_max_ps(a.v); }

inline __mmask16 first(int64_t count) { return (__mmask16)((1u << count) - 1); }  // count 0..16

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const float* p, int64_t count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
inline F32 from_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
inline F32 load(const bf16* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
inline F32 load(const bf16* p, int64_t count) { return from_bf16(_mm256_maskz_loadu_epi16(first(count), p)); }
inline F32 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline F32 load(const f16* p, int64_t count) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p))}; }

// Round to nearest even; NaN stays NaN.
inline __m256i to_bf16(F32 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  __m512i u = _mm512_castps_si512(x.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
inline __m256i to_f16(F32 x) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, F32 x, int64_t count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
inline void store(bf16* p, F32 x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
inline void store(bf16* p, F32 x, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), to_bf16(x)); }
inline void store(f16* p, F32 x) { _mm256_storeu_si256((__m256i*)p, to_f16(x)); }
inline void store(f16* p, F32 x, int64_t count) { _mm256_mask_storeu_epi16(p, first(count), to_f16(x)); }

}  // namespace
}  // namespace llmrt
