// 8 floats in a ymm register (AVX2, FMA, F16C).
#pragma once

namespace llmrt {
namespace {

struct F32 {
  static constexpr int64_t lanes = 8;
  __m256 v;
  static F32 zero() { return {_mm256_setzero_ps()}; }
  static F32 set1(float x) { return {_mm256_set1_ps(x)}; }
};

inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
// a * 2^n for |n| up to 252, in two steps so that results may be subnormal or reach 2^127.
inline F32 scale_by_power_of_two(F32 a, F32 n) {
  __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
  const __m256i bias = _mm256_set1_epi32(127);
  __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, x), y)};
}
inline float sum(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float max_of(F32 a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline __m256i first(int64_t count) {  // count 0..8
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m128i load_16bit(const void* p, int64_t count) {
  uint16_t lane[8] = {};
  memcpy(lane, p, 2 * count);
  return _mm_loadu_si128((const __m128i*)lane);
}

inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F32 load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, first(count))}; }
inline F32 from_bf16(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
inline F32 load(const bf16* p) { return from_bf16(_mm_loadu_si128((const __m128i*)p)); }
inline F32 load(const bf16* p, int64_t count) { return from_bf16(load_16bit(p, count)); }
inline F32 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline F32 load(const f16* p, int64_t count) { return {_mm256_cvtph_ps(load_16bit(p, count))}; }

// Round to nearest even; NaN stays NaN.
inline __m128i to_bf16(F32 x) {
  __m256i u = _mm256_castps_si256(x.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
  r = _mm256_srli_epi32(r, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i to_f16(F32 x) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_16bit(void* p, __m128i x, int64_t count) {
  uint16_t lane[8];
  _mm_storeu_si128((__m128i*)lane, x);
  memcpy(p, lane, 2 * count);
}

inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
inline void store(float* p, F32 x, int64_t count) { _mm256_maskstore_ps(p, first(count), x.v); }
inline void store(bf16* p, F32 x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
inline void store(bf16* p, F32 x, int64_t count) { store_16bit(p, to_bf16(x), count); }
inline void store(f16* p, F32 x) { _mm_storeu_si128((__m128i*)p, to_f16(x)); }
inline void store(f16* p, F32 x, int64_t count) { store_16bit(p, to_f16(x), count); }

}  // namespace
}  // namespace llmrt
