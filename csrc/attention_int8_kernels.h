// Decode over int8 keys and values in integer arithmetic: queries and weights as two digits of about eight bits each,
// finer than bfloat16, so that a product takes two dot instructions of 64 elements.
#pragma once
#include "attention_block_kernels.h"

namespace llmrt {
namespace {

#if defined(__AVX512VNNI__)
constexpr int64_t kChunk = 64;  // codes in a register

inline __m512i load_codes(const char* p, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= kChunk ? ~0ull : (1ull << count) - 1, p);
}

// A query row: high digits [D], low digits [D], both padded with zeros to whole chunks; per lane of a register what the
// offset of the keys adds to the products; the scale.
struct DigitRow {
  int8_t *high, *low;
  int32_t* offset;
  float* scale;
  DigitRow(char* p, int64_t D)
      : high((int8_t*)p),
        low(high + round_up(D, kChunk)),
        offset((int32_t*)(low + round_up(D, kChunk))),
        scale((float*)(offset + 16)) {}
};

// Elements as 128 high + low in units of the largest magnitude / 16256.
inline void split_query(const void* from, DType type, int64_t D, const DigitRow& to) {
  F32 most = F32::zero();
  for (int64_t d = 0; d < D; d += 16) most = max(most, abs(load(from, type, d, smaller(16, D - d))));
  const float largest = max_of(most), unit = largest > kSmallestRow ? largest / 16256.f : 0.f;
  const F32 inverse = F32::set1(unit > 0.f ? 1.f / unit : 0.f);
  memset(to.high, 0, to.low - to.high), memset(to.low, 0, to.low - to.high), memset(to.offset, 0, 64);
  for (int64_t d = 0; d < D; d += 16) {
    const int64_t count = smaller(16, D - d);
    const __m512i x = _mm512_cvtps_epi32((load(from, type, d, count) * inverse).v);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 7));
    _mm_mask_storeu_epi8(to.high + d, first(count), _mm512_cvtepi32_epi8(high));
    _mm_mask_storeu_epi8(to.low + d, first(count), _mm512_cvtepi32_epi8(low));
  }
  for (int64_t d = 0; d < D; d++) to.offset[d % kChunk / 4] -= 128 * (128 * to.high[d] + to.low[d]);
  *to.scale = unit;
}

// Dot products of R split query rows and `count` keys in codes, to x[r * ldx + j].
template <int R>
inline void int8_products(const AttentionArgs& a, const char* const* query, const BlockTokens& at, int64_t count,
                          float* x, int64_t ldx) {
  constexpr int keys = 16 / R;
  const __m512i flip = _mm512_set1_epi8((char)0x80);  // codes + 128: the dot instruction takes one side unsigned
  const int64_t chunks = round_up(a.D, kChunk);
  for (int64_t j = 0; j < count; j += keys) {
    const char* const* key = at.key + j;
    for (int i = 0; i < keys; i++) prefetch_row(at.value[j + i], a.Dv);
    __m512i sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_si512();
    for (int digit = 0; digit < 2; digit++) {
      for (int64_t d = 0; d < chunks; d += kChunk) {
#pragma GCC unroll 16
        for (int i = 0; i < keys; i++) {
          const __m512i k = _mm512_xor_si512(load_codes(key[i] + d, a.D - d), flip);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++)
            sums[r * keys + i] =
                _mm512_dpbusd_epi32(sums[r * keys + i], k, _mm512_loadu_si512(query[r] + digit * chunks + d));
        }
      }
      if (digit == 0)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) sums[i] = _mm512_slli_epi32(sums[i], 7);
    }
    F32 totals[16];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512i offset = _mm512_loadu_si512(query[r] + 2 * chunks);
#pragma GCC unroll 16
      for (int i = 0; i < keys; i++)
        totals[r * keys + i] = {_mm512_cvtepi32_ps(_mm512_add_epi32(sums[r * keys + i], offset))};
    }
    float lane[16];
    store(lane, lane_sums(totals));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) memcpy(x + r * ldx + j, lane + r * keys, keys * sizeof(float));
  }
  for (int r = 0; r < R; r++) {
    const F32 unit = F32::set1(*(const float*)(query[r] + 2 * chunks + kChunk));
    for (int64_t j = 0; j < count; j += 16) store(x + r * ldx + j, load(x + r * ldx + j) * unit);
  }
}

// Weights of R rows as 256 high + low in units of the largest / 65535: digits[digit][r][j]; the units.
template <int R>
inline void split_weights(const float* weights, int64_t ld, int64_t padded, uint8_t (*digits)[R][kBlockTokens],
                          float* unit) {
  for (int r = 0; r < R; r++) {
    const float* w = weights + r * ld;
    F32 most = F32::zero();
    for (int64_t j = 0; j < padded; j += 16) most = max(most, load(w + j));
    const float largest = max_of(most);
    const F32 inverse = F32::set1(largest > kSmallestRow ? 65535.f / largest : 0.f);
    unit[r] = largest > kSmallestRow ? largest / 65535.f : 0.f;
    for (int64_t j = 0; j < padded; j += 16) {
      const __m512i p = _mm512_cvtps_epi32((load(w + j) * inverse).v);
      _mm_storeu_si128((__m128i*)(digits[0][r] + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(p, 8)));
      _mm_storeu_si128((__m128i*)(digits[1][r] + j), _mm512_cvtepi32_epi8(p));
    }
  }
}

// out[r] = out[r] * factor[r] + weights[r] * values, for at most four rows and a chunk of elements from d on.
template <int R>
inline void int8_values(const AttentionArgs& a, const uint8_t (*digits)[R][kBlockTokens], const float* unit,
                        const BlockTokens& at, int64_t padded, int64_t d, int64_t ahead, const float* factor,
                        float* const* out) {
  const int64_t width = smaller(kChunk, a.Dv - d);
  __m512i sums[R][4];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) sums[r][u] = _mm512_setzero_si512();
  for (int digit = 0; digit < 2; digit++) {
    for (int64_t j = 0; j < padded; j += 4) {
      if (d == 0 && digit == 0)
        for (int i = 0; i < 4; i++) prefetch_row(at.key[j + i] + ahead, a.D);
      const __m512i v0 = load_codes(at.value[j] + d, width), v1 = load_codes(at.value[j + 1] + d, width);
      const __m512i v2 = load_codes(at.value[j + 2] + d, width), v3 = load_codes(at.value[j + 3] + d, width);
      const __m512i low01 = _mm512_unpacklo_epi8(v0, v1), high01 = _mm512_unpackhi_epi8(v0, v1);
      const __m512i low23 = _mm512_unpacklo_epi8(v2, v3), high23 = _mm512_unpackhi_epi8(v2, v3);
      const __m512i v[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                            _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, digits[digit][r] + j, 4);
        const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) sums[r][u] = _mm512_dpbusd_epi32(sums[r][u], w, v[u]);
      }
    }
    if (digit == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) sums[r][u] = _mm512_slli_epi32(sums[r][u], 8);
  }
  // 128-bit lane l of sums[r][u] holds the elements 16 l + 4 u .. + 3
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const __m512i* s = sums[r];
    const __m512i a01 = _mm512_shuffle_i32x4(s[0], s[1], 0x44), b01 = _mm512_shuffle_i32x4(s[0], s[1], 0xee);
    const __m512i a23 = _mm512_shuffle_i32x4(s[2], s[3], 0x44), b23 = _mm512_shuffle_i32x4(s[2], s[3], 0xee);
    const __m512i natural[4] = {_mm512_shuffle_i32x4(a01, a23, 0x88), _mm512_shuffle_i32x4(a01, a23, 0xdd),
                                _mm512_shuffle_i32x4(b01, b23, 0x88), _mm512_shuffle_i32x4(b01, b23, 0xdd)};
    for (int64_t i = 0; 16 * i < width; i++) {
      float* to = out[r] + d + 16 * i;
      store(to, fma({_mm512_cvtepi32_ps(natural[i])}, F32::set1(unit[r]), load(to) * F32::set1(factor[r])));
    }
  }
}

template <int R>
inline void int8_weighted_sum(const AttentionArgs& a, const float* weights, int64_t ld, const BlockTokens& at,
                              int64_t count, int64_t ahead, const float* factor, float* const* out) {
  constexpr int rows = R < 4 ? R : 4;
  const int64_t padded = round_up(count, 16);
  for (int r = 0; r < R; r += rows) {
    alignas(64) uint8_t digits[2][rows][kBlockTokens];
    float unit[rows];
    split_weights<rows>(weights + r * ld, ld, padded, digits, unit);
    for (int64_t d = 0; d < a.Dv; d += kChunk)
      int8_values<rows>(a, digits, unit, at, padded, d, r ? 0 : ahead, factor + r, out + r);
  }
}
#endif

}  // namespace
}  // namespace llmrt
