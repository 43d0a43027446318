// Attention of many query rows: blocked flash attention (Dao et al. 2022) in register tiles. A block of keys and values
// is packed once, then all query rows of the task pass over it.
#pragma once
#include "attention_block_kernels.h"

namespace llmrt {
namespace {

constexpr int64_t kPrefillTokens = kBlockTokens;
constexpr int kTileUnit = F32::lanes / 4;  // tiles have 1, 2 or 3 times this many rows:
constexpr int kTileRows = 3 * kTileUnit;   // 12 x 2 of 32 registers (AVX-512), 6 x 2 of 16 (AVX2) accumulate
constexpr int64_t kTileWidth = 2 * F32::lanes;

// Products of one register tile: C[R, kTileWidth] += A[R, K] B[K, kTileWidth]. Operands are packed in groups of `pair`
// consecutive k: A row-major, B as [K / pair, kTileWidth, pair].
struct FloatDot {
  using Element = float;
  static constexpr int64_t pair = 1;
  static F32 dot(F32 c, F32 a, F32 b) { return fma(a, b, c); }
  static F32 operand(const float* b) { return load(b); }
  static F32 broadcast(const float* a) { return F32::set1(*a); }
};
#if defined(__AVX512BF16__)
struct Bf16Dot {
  using Element = bf16;
  static constexpr int64_t pair = 2;
  static F32 dot(F32 c, __m512i a, __m512i b) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
  static __m512i operand(const bf16* b) { return _mm512_loadu_si512(b); }
  static __m512i broadcast(const bf16* a) {
    int32_t both;
    memcpy(&both, a, 4);
    return _mm512_set1_epi32(both);
  }
};
#endif

// c = factor * c + A B with `steps` = K / pair; without factor c = A B.
template <class Dot, int R>
inline void multiply_tile(const typename Dot::Element* a, int64_t lda, const typename Dot::Element* b, int64_t steps,
                          const float* factor, float* c, int64_t ldc) {
  F32 c0[R], c1[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    c0[r] = factor ? load(c + r * ldc) * F32::set1(factor[r]) : F32::zero();
    c1[r] = factor ? load(c + r * ldc + F32::lanes) * F32::set1(factor[r]) : F32::zero();
  }
  for (int64_t k = 0; k < steps; k++) {
    const auto b0 = Dot::operand(b + k * kTileWidth * Dot::pair);
    const auto b1 = Dot::operand(b + (k * kTileWidth + F32::lanes) * Dot::pair);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const auto x = Dot::broadcast(a + r * lda + k * Dot::pair);
      c0[r] = Dot::dot(c0[r], x, b0);
      c1[r] = Dot::dot(c1[r], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) store(c + r * ldc, c0[r]), store(c + r * ldc + F32::lanes, c1[r]);
}

// Transposes lanes x lanes 32-bit elements.
#if defined(__AVX512F__)
inline void transpose(F32 (&v)[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2)
    t[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v), t[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {  // u[4 * r + i] holds the columns i, i + 4, i + 8, i + 12 of the rows 4 r .. 4 r + 3
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88),
                 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    v[i].v = _mm512_shuffle_f32x4(a, c, 0x88), v[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88), v[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#else
inline void transpose(F32 (&v)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2)
    t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v), t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    v[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

#if defined(__AVX512BF16__)
// At most 32 elements as bf16, zeros behind them. The codes of int8 rows are exact.
inline __m512i bf16_lanes(const bf16* p, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
}
inline __m512i bf16_lanes(const i8* p, int64_t count) {
  const __m256i codes = _mm256_maskz_loadu_epi8(count >= 32 ? ~0u : (1u << count) - 1, p);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
#endif

// `count` elements of a key row as 32-bit lanes: floats, or pairs of bf16.
template <class Dot, class Element>
inline F32 key_lanes(const Element* p, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (Dot::pair == 2) return {_mm512_castsi512_ps(bf16_lanes(p, count))};
#endif
  return count >= F32::lanes ? load(p) : load(p, count);
}

// Packs `padded` keys (a multiple of kTileWidth) as [padded / kTileWidth, ceil(D / pair), kTileWidth, pair].
template <class Dot, class Element>
inline void pack_keys(const AttentionArgs& a, const BlockTokens& at, int64_t padded, typename Dot::Element* packed) {
  const int64_t steps = (a.D + Dot::pair - 1) / Dot::pair;
  for (int64_t j = 0; j < padded; j += F32::lanes) {
    float* to = (float*)packed + (j / kTileWidth * steps) * kTileWidth + j % kTileWidth;
    for (int64_t k = 0; k < steps; k += F32::lanes) {
      F32 v[F32::lanes];
      for (int i = 0; i < F32::lanes; i++)
        v[i] = key_lanes<Dot>((const Element*)at.key[j + i] + k * Dot::pair, a.D - k * Dot::pair);
      transpose(v);
      for (int64_t i = 0; i < smaller(F32::lanes, steps - k); i++) store(to + (k + i) * kTileWidth, v[i]);
    }
  }
}

// Packs `padded` values as [ceil(Dv / kTileWidth), padded / pair, kTileWidth, pair].
template <class Dot, class Element>
inline void pack_values(const AttentionArgs& a, const BlockTokens& at, int64_t padded, typename Dot::Element* packed) {
  for (int64_t d = 0; d < a.Dv; d += kTileWidth) {
    const int64_t width = smaller(kTileWidth, a.Dv - d);
    auto* to = packed + d / kTileWidth * padded * kTileWidth;
#if defined(__AVX512BF16__)
    if constexpr (Dot::pair == 2) {
      const __m512i half =
          _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      const __m512i low = _mm512_or_si512(half, _mm512_slli_epi32(_mm512_add_epi32(half, _mm512_set1_epi32(32)), 16));
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (int64_t j = 0; j < padded; j += 2, to += 2 * kTileWidth) {
        const __m512i x = bf16_lanes((const Element*)at.value[j] + d, width);
        const __m512i y = bf16_lanes((const Element*)at.value[j + 1] + d, width);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
        _mm512_storeu_si512(to + kTileWidth, _mm512_permutex2var_epi16(x, high, y));
      }
      continue;
    }
#endif
    if constexpr (Dot::pair == 1) {
      for (int64_t j = 0; j < padded; j++, to += kTileWidth) {
        const Element* from = (const Element*)at.value[j] + d;
        store(to, width >= F32::lanes ? load(from) : load(from, width));
        const int64_t rest = width - F32::lanes;
        store(to + F32::lanes, rest >= F32::lanes ? load(from + F32::lanes)
                               : rest > 0         ? load(from + F32::lanes, rest)
                                                  : F32::zero());
      }
    }
  }
}

template <class Dot>
struct PrefillScratch {
  using Element = typename Dot::Element;
  Element* query;  // [n, query_ld] rows padded with zeros to whole tiles
  int64_t query_ld;
  QueryRow* rows;   // [n]
  RowStates state;  // [n]
  Element *keys, *values;
  float* scores;     // [kTileRows, kPrefillTokens]
  Element* weights;  // likewise
  uint8_t* seen;
  char* zeros;
  int64_t bytes;
  PrefillScratch(const AttentionArgs& a, int64_t rows_of_task, char* base) {
    Pieces pieces{base};
    const int64_t n = round_up(rows_of_task, kTileUnit);
    query_ld = round_up(a.D, Dot::pair);
    query = pieces.take<Element>(n * query_ld);
    rows = pieces.take<QueryRow>(n);
    state = row_states(pieces, n, state_ld(a));
    keys = pieces.take<Element>(kPrefillTokens * query_ld);
    values = pieces.take<Element>(kPrefillTokens * state_ld(a));
    scores = pieces.take<float>(kTileRows * kPrefillTokens);
    weights = pieces.take<Element>(kTileRows * kPrefillTokens);
    seen = pieces.take<uint8_t>(kPrefillTokens);
    zeros = pieces.take<char>(larger(a.D, a.Dv) * 4 + kScaleBytes);
    bytes = pieces.used;
  }
};

// R rows from row `i` of the task on, `real` of them not padding, over one packed block.
template <class Dot, int R>
inline void prefill_tile(const AttentionArgs& a, const PrefillScratch<Dot>& s, const BlockTokens& at, int64_t i,
                         int64_t real, int64_t t0, int64_t count, int64_t padded) {
  const QueryRow* row = s.rows + i;
  const int64_t steps = s.query_ld / Dot::pair;
  int64_t first = a.length, last = 0;
  for (int64_t r = 0; r < real; r++) first = smaller(first, row[r].first), last = larger(last, row[r].end);
  const int64_t begin = larger(0, first - t0) / kTileWidth * kTileWidth;
  const int64_t end = smaller(count, last - t0), padded_end = round_up(end, kTileWidth);
  if (begin >= end) return;
  for (int64_t j = begin; j < padded_end; j += kTileWidth)
    multiply_tile<Dot, R>(s.query + i * s.query_ld, s.query_ld, s.keys + j * s.query_ld, steps, nullptr, s.scores + j,
                          kPrefillTokens);
  const QueryRow* rows[R];
  float *highest[R], *total[R], factor[F32::lanes] = {};
  for (int r = 0; r < R; r++) rows[r] = row + r, highest[r] = s.state.highest + i + r, total[r] = s.state.total + i + r;
  softmax_step(a, rows, real, t0 + begin, end - begin, scales_from(a, at, begin), s.scores + begin, kPrefillTokens,
               highest, total, factor, s.weights + begin);
  for (int64_t r = 0; r < real; r++)
    for (int64_t j = round_up(end - begin, F32::lanes) + begin; j < padded_end; j += F32::lanes)
      store(s.weights + r * kPrefillTokens + j, F32::zero());
  for (int64_t d = 0; d < a.Dv; d += kTileWidth)
    multiply_tile<Dot, R>(s.weights + begin, kPrefillTokens, s.values + d * padded + begin * kTileWidth,
                          (padded_end - begin) / Dot::pair, factor, s.state.out + i * s.state.ld + d, s.state.ld);
}

template <class Dot, class Element>
inline void prefill_block(const AttentionArgs& a, const AttentionTask& t, const PrefillScratch<Dot>& s, int64_t t0,
                          int64_t count, const uint8_t* seen) {
  const int64_t n = t.row1 - t.row0, padded = round_up(count, kTileWidth);
  BlockTokens at;
  find_tokens(a, t.sample, t.kv_head, t0, count, padded, seen, s.zeros, at);
  pack_keys<Dot, Element>(a, at, padded, s.keys);
  pack_values<Dot, Element>(a, at, padded, s.values);
  for (int64_t i = 0; i < n;) {
    const int64_t left = n - i;
    if (left > 2 * kTileUnit)
      prefill_tile<Dot, 3 * kTileUnit>(a, s, at, i, smaller(left, 3 * kTileUnit), t0, count, padded),
          i += 3 * kTileUnit;
    else if (left > kTileUnit)
      prefill_tile<Dot, 2 * kTileUnit>(a, s, at, i, left, t0, count, padded), i += 2 * kTileUnit;
    else
      prefill_tile<Dot, kTileUnit>(a, s, at, i, left, t0, count, padded), i += kTileUnit;
  }
}

template <class Dot, class Element>
inline void prefill_typed(const AttentionArgs& a, const AttentionTask& t, char* base) {
  const int64_t n = t.row1 - t.row0, padded_rows = round_up(n, kTileUnit);
  PrefillScratch<Dot> s(a, n, base);
  s.state.clear(padded_rows);
  memset(s.query, 0, padded_rows * s.query_ld * sizeof(*s.query));
  memset(s.weights, 0, kTileRows * kPrefillTokens * sizeof(*s.weights));
  memset(s.zeros, 0, larger(a.D, a.Dv) * sizeof(Element) + kScaleBytes);
  for (int64_t i = 0; i < n; i++) {
    s.rows[i] = query_row(a, t, t.row0 + i);
    const char* from = query_of(a, s.rows[i]);
    for (int64_t d = 0; d < a.D; d += F32::lanes) {
      const int64_t count = smaller(F32::lanes, a.D - d);
      store(s.query + i * s.query_ld + d, load(from, a.dtype, d, count), count);
    }
  }
  const AttentionArgs a_without_mask = without_mask(a);
  int64_t first, end;
  const AttentionArgs& as_far_as_needed = narrow_rows(a, t, s.rows, first, end) ? a_without_mask : a;
  for (int64_t t0 = first; t0 < end; t0 += kPrefillTokens) {
    const int64_t count = smaller(kPrefillTokens, end - t0);
    if (unmasked(as_far_as_needed, t.sample, t0, count)) {
      prefill_block<Dot, Element>(a_without_mask, t, s, t0, count, nullptr);
      continue;
    }
    memset(s.seen, 0, kPrefillTokens);
    mark_seen(a, t.sample, s.rows[0].token, s.rows[n - 1].token + 1, t.kv_head, t0, count, s.seen);
    if (any_seen(s.seen, count)) prefill_block<Dot, Element>(a, t, s, t0, count, s.seen);
  }
  if (t.state) {
    Pieces pieces{(char*)t.state};
    const RowStates to = row_states(pieces, n, state_ld(a));
    memcpy(to.highest, s.state.highest, n * sizeof(float));
    memcpy(to.total, s.state.total, n * sizeof(float));
    memcpy(to.out, s.state.out, n * to.ld * sizeof(float));
  } else {
    for (int64_t i = 0; i < n; i++) write_row(a, s.rows[i], s.state, i);
  }
}

#if defined(__AVX512BF16__)
using PrefillBf16 = Bf16Dot;
#else
using PrefillBf16 = FloatDot;
#endif

inline bool prefill_in_bf16(const AttentionArgs& a) {
  return a.cache_dtype == DType::bf16 || (a.cache_dtype == DType::i8 && a.dtype == DType::bf16);
}
inline int64_t prefill_scratch(const AttentionArgs& a, int64_t rows) {
  return prefill_in_bf16(a) ? PrefillScratch<PrefillBf16>(a, rows, nullptr).bytes
                            : PrefillScratch<FloatDot>(a, rows, nullptr).bytes;
}

inline void prefill(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
  if (a.cache_dtype == DType::f32) return prefill_typed<FloatDot, float>(a, t, scratch);
  if (a.cache_dtype == DType::bf16) return prefill_typed<PrefillBf16, bf16>(a, t, scratch);
  if (a.cache_dtype == DType::i8 && prefill_in_bf16(a)) return prefill_typed<PrefillBf16, i8>(a, t, scratch);
  if (a.cache_dtype == DType::i8) return prefill_typed<FloatDot, i8>(a, t, scratch);
  prefill_typed<FloatDot, f16>(a, t, scratch);
}

}  // namespace
}  // namespace llmrt
