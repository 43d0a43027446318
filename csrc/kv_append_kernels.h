// Converting a row of elements to what a key/value cache stores: another floating type, or int8 codes and a scale.
#pragma once
#include "vec.h"

namespace llmrt {
namespace {

// `count` codes: x must lie within [-127, 127] after rounding.
#if defined(__AVX512F__)
inline void store_codes(int8_t* p, F32 x, int64_t count) {
  _mm_mask_storeu_epi8(p, first(count), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline F32 load(const i8* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
inline F32 load(const i8* p, int64_t count) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), p)))};
}
#else
inline void store_codes(int8_t* p, F32 x, int64_t count) {
  int32_t lane[8];
  _mm256_storeu_si256((__m256i*)lane, _mm256_cvtps_epi32(x.v));
  for (int64_t i = 0; i < count; i++) p[i] = (int8_t)lane[i];
}
inline F32 load(const i8* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))}; }
inline F32 load(const i8* p, int64_t count) {
  int8_t lane[8] = {};
  memcpy(lane, p, count);
  return load((const i8*)lane);
}
#endif

constexpr float kSmallestRow = 1e-30f;

inline void store_row(const void* from, DType type, int64_t n, void* to, DType stored) {
  if (stored != DType::i8) {
    for (int64_t i = 0; i < n; i += F32::lanes) {
      const int64_t count = n - i < F32::lanes ? n - i : F32::lanes;
      store(to, stored, i, load(from, type, i, count), count);
    }
    return;
  }
  F32 most = F32::zero();
  for (int64_t i = 0; i < n; i += F32::lanes)
    most = max(most, abs(load(from, type, i, n - i < F32::lanes ? n - i : F32::lanes)));
  const float largest = max_of(most);
  const bool some = largest > kSmallestRow;
  const float scale = some ? largest / 127.f : 0.f, inverse = some ? 127.f / largest : 0.f;
  for (int64_t i = 0; i < n; i += F32::lanes) {
    const int64_t count = n - i < F32::lanes ? n - i : F32::lanes;
    store_codes((int8_t*)to + i, clamp(load(from, type, i, count) * F32::set1(inverse), -127.f, 127.f), count);
  }
  memcpy((char*)to + n, &scale, kScaleBytes);
}

}  // namespace
}  // namespace llmrt
