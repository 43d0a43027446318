// Attention of a few query rows: dot products straight over the rows of the cache, each key and value read once from
// memory for all query heads, query tokens and beams that use it.
#pragma once
#include "attention_int8_kernels.h"

namespace llmrt {
namespace {

constexpr int64_t kDecodeTokens = 64;  // one maximum per block; its scores and weights stay in the first cache level
constexpr int kDecodeRows = 8;         // most query rows that share one pass over a key
constexpr int kDecodeAccumulators = F32::lanes == 16 ? 16 : 8;  // half of the vector registers

// How keys of one type are multiplied with queries: a vector of each, and the products added to float32 sums.
template <class Key>
struct WideningDot {
  using Query = float;
  static constexpr int64_t width = F32::lanes;
  static F32 key(const Key* p) { return load(p); }
  static F32 key(const Key* p, int64_t count) { return load(p, count); }
  static F32 add(F32 sums, F32 k, const float* query) { return fma(k, load(query), sums); }
};
template <class Key>
struct DecodeDot : WideningDot<Key> {};
#if defined(__AVX512VNNI__)
template <class Key>
constexpr bool kIntegers = false;
template <>
constexpr bool kIntegers<i8> = true;
inline bool in_integers(const AttentionArgs& a) { return a.dtype != DType::f32; }  // as fine as the other dtypes
#endif
#if defined(__AVX512BF16__)
template <>
struct DecodeDot<bf16> {
  using Query = bf16;
  static constexpr int64_t width = 32;
  static __m512i key(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512i key(const bf16* p, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
  static F32 add(F32 sums, __m512i k, const bf16* query) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)k, (__m512bh)_mm512_loadu_si512(query))};
  }
};
#endif

// Dot products of R query rows (zero-padded to Dot::width) and `count` keys, to x[r * kDecodeTokens + j]. The keys are
// taken lanes / R at a time, so that one register of sums comes out. Prefetches the values.
template <int R, class Key>
inline void dot_products(const AttentionArgs& a, const typename DecodeDot<Key>::Query* const* query,
                         const BlockTokens& at, int64_t count, float* x) {
  using Dot = DecodeDot<Key>;
  constexpr int keys = F32::lanes / R;
  const int64_t whole = a.D / Dot::width * Dot::width, rest = a.D - whole;
  for (int64_t j = 0; j < count; j += keys) {
    const Key* const* key = (const Key* const*)at.key + j;
    for (int i = 0; i < keys; i++) prefetch_row(at.value[j + i], a.Dv * (int64_t)sizeof(Key));
    F32 sums[F32::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < F32::lanes; i++) sums[i] = F32::zero();
    for (int64_t d = 0; d < whole; d += Dot::width) {
#pragma GCC unroll 16
      for (int i = 0; i < keys; i++) {
        const auto k = Dot::key(key[i] + d);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sums[r * keys + i] = Dot::add(sums[r * keys + i], k, query[r] + d);
      }
    }
    if (rest) {
#pragma GCC unroll 16
      for (int i = 0; i < keys; i++) {
        const auto k = Dot::key(key[i] + whole, rest);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sums[r * keys + i] = Dot::add(sums[r * keys + i], k, query[r] + whole);
      }
    }
    float lane[F32::lanes];
    store(lane, lane_sums(sums));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) memcpy(x + r * kDecodeTokens + j, lane + r * keys, keys * sizeof(float));
  }
}

// How values of one type are weighted and summed: `tokens` at a time, `vectors` registers of sums for `width` elements.
template <class Key>
struct WideningSum {
  using Weight = float;
  using Values = F32;
  static constexpr int tokens = 1, vectors = 1;
  static constexpr int64_t width = F32::lanes;
  static Values values(const char* const* p, int64_t d) { return load((const Key*)p[0] + d); }
  static Values values(const char* const* p, int64_t d, int64_t count) { return load((const Key*)p[0] + d, count); }
  static F32 weight(const float* w) { return F32::set1(*w); }
  static void add(F32* sums, F32 weight, Values v) { sums[0] = fma(weight, v, sums[0]); }
  static void begin(F32* sums, const float* out, F32 factor) { sums[0] = load(out) * factor; }
  static void end(const F32* sums, float* out) { store(out, sums[0]); }
};
template <class Key>
struct DecodeSum : WideningSum<Key> {};
#if defined(__AVX512BF16__)
// Two tokens at a time: their elements are interleaved in 128-bit lanes, so sums[0] holds the elements 0..3, 8..11, ..
// and sums[1] the elements 4..7, 12..15, .. of 32.
template <>
struct DecodeSum<bf16> {
  using Weight = bf16;
  struct Values {
    __m512i low, high;
  };
  static constexpr int tokens = 2, vectors = 2;
  static constexpr int64_t width = 32;
  static Values interleave(__m512i x, __m512i y) { return {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y)}; }
  static Values values(const char* const* p, int64_t d) {
    return interleave(_mm512_loadu_si512((const bf16*)p[0] + d), _mm512_loadu_si512((const bf16*)p[1] + d));
  }
  static Values values(const char* const* p, int64_t d, int64_t count) {
    const __mmask32 lanes = (1u << count) - 1;
    return interleave(_mm512_maskz_loadu_epi16(lanes, (const bf16*)p[0] + d),
                      _mm512_maskz_loadu_epi16(lanes, (const bf16*)p[1] + d));
  }
  static __m512i weight(const bf16* w) {
    int32_t pair;
    memcpy(&pair, w, 4);
    return _mm512_set1_epi32(pair);
  }
  static void add(F32* sums, __m512i weight, Values v) {
    sums[0].v = _mm512_dpbf16_ps(sums[0].v, (__m512bh)weight, (__m512bh)v.low);
    sums[1].v = _mm512_dpbf16_ps(sums[1].v, (__m512bh)weight, (__m512bh)v.high);
  }
  static void begin(F32* sums, const float* out, F32 factor) {
    const F32 x = load(out) * factor, y = load(out + 16) * factor;
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    sums[0].v = _mm512_permutex2var_ps(x.v, low, y.v);
    sums[1].v = _mm512_permutex2var_ps(x.v, _mm512_add_epi32(low, _mm512_set1_epi32(4)), y.v);
  }
  static void end(const F32* sums, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    store(out, F32{_mm512_permutex2var_ps(sums[0].v, first, sums[1].v)});
    store(out + 16, F32{_mm512_permutex2var_ps(sums[0].v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), sums[1].v)});
  }
};
#endif

// out[r] = out[r] * factor[r] + weights[r] * values, for U units of Sum::width elements from d on, or (Tail) for the
// last `rest` elements. Prefetches the keys that lie `ahead` bytes on: those of the next block, where rows are
// contiguous.
template <int R, int U, bool Tail, class Key>
inline void add_values(const AttentionArgs& a, const typename DecodeSum<Key>::Weight* weights, const BlockTokens& at,
                       int64_t count, int64_t d, int64_t rest, int64_t ahead, const float* factor, float* const* out) {
  using Sum = DecodeSum<Key>;
  F32 sums[R][U][Sum::vectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) Sum::begin(sums[r][u], out[r] + d + u * Sum::width, F32::set1(factor[r]));
  for (int64_t j = 0; j < count; j += Sum::tokens) {
    if (d == 0)
      for (int i = 0; i < Sum::tokens; i++) prefetch_row(at.key[j + i] + ahead, a.D * (int64_t)sizeof(Key));
    typename Sum::Values v[U];
#pragma GCC unroll 16
    for (int u = 0; u < U; u++)
      v[u] = Tail ? Sum::values(at.value + j, d, rest) : Sum::values(at.value + j, d + u * Sum::width);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const auto w = Sum::weight(weights + r * kDecodeTokens + j);
#pragma GCC unroll 16
      for (int u = 0; u < U; u++) Sum::add(sums[r][u], w, v[u]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int u = 0; u < U; u++) Sum::end(sums[r][u], out[r] + d + u * Sum::width);
}

struct DecodeScratch {
  char* query;  // [n + 1, query_ld] float or bf16, zero-padded, or DigitRow; row n is zero
  int64_t query_ld;
  QueryRow* rows;    // [n]
  RowStates state;   // [n], unless the task brings its own
  float* spare;      // takes the output of rows that pad a register tile
  int32_t* group;    // [n + kDecodeRows] rows that see the same tokens of a block
  uint8_t* grouped;  // [beams]
  uint8_t* seen;     // [kDecodeTokens]
  char* zeros;       // a key or value
  int64_t bytes;
  DecodeScratch(const AttentionArgs& a, int64_t n, char* base) {
    Pieces pieces{base};
    query_ld = round_up(a.D, 64);
    query = pieces.take<char>((n + 1) * query_ld * 4);
    rows = pieces.take<QueryRow>(n);
    state = row_states(pieces, n, state_ld(a));
    spare = pieces.take<float>(state_ld(a));
    group = pieces.take<int32_t>(n + kDecodeRows);
    grouped = pieces.take<uint8_t>(a.beams);
    seen = pieces.take<uint8_t>(kDecodeTokens);
    zeros = pieces.take<char>(larger(a.D, a.Dv) * 4 + kScaleBytes);
    bytes = pieces.used;
  }
};

// One block of tokens for up to R query rows, `group` padded to R with entries of n.
template <int R, class Key>
inline void decode_rows(const AttentionArgs& a, const DecodeScratch& scratch, int64_t n, const int32_t* group,
                        int64_t real, const BlockTokens& at, int64_t t0, int64_t count) {
  using Query = typename DecodeDot<Key>::Query;
  using Sum = DecodeSum<Key>;
  const RowStates& state = scratch.state;
  const Query* query[R];
  const QueryRow* rows[R];
  float *highest[R], *total[R], *out[R], factor[F32::lanes] = {};
  for (int r = 0; r < R; r++) {
    const int64_t row = group[r];
    query[r] = (const Query*)scratch.query + row * scratch.query_ld;
    rows[r] = scratch.rows + row, highest[r] = state.highest + row, total[r] = state.total + row;
    out[r] = row < n ? state.out + row * state.ld : scratch.spare;
  }
  alignas(64) float x[R * kDecodeTokens];
  alignas(64) typename Sum::Weight weights[R * kDecodeTokens];
  memset(weights + real * kDecodeTokens, 0, (R - real) * kDecodeTokens * sizeof(weights[0]));
#if defined(__AVX512VNNI__)
  if constexpr (kIntegers<Key>) {
    if (in_integers(a)) {
      int8_products<R>(a, (const char* const*)query, at, count, x, kDecodeTokens);
      softmax_step(a, rows, real, t0, count, scales_from(a, at, 0), x, kDecodeTokens, highest, total, factor, weights);
      return int8_weighted_sum<R>(a, weights, kDecodeTokens, at, count, kDecodeTokens * a.key_t, factor, out);
    }
  }
#endif
  dot_products<R, Key>(a, query, at, count, x);
  softmax_step(a, rows, real, t0, count, scales_from(a, at, 0), x, kDecodeTokens, highest, total, factor, weights);
  constexpr int most = kDecodeAccumulators / R / Sum::vectors, U = most < 8 / Sum::vectors ? most : 8 / Sum::vectors;
  const int64_t ahead = kDecodeTokens * a.key_t * (int64_t)sizeof(Key);
  int64_t d = 0;
  for (; d + U * Sum::width <= a.Dv; d += U * Sum::width)
    add_values<R, U, false, Key>(a, weights, at, count, d, 0, ahead, factor, out);
  for (; d + Sum::width <= a.Dv; d += Sum::width)
    add_values<R, 1, false, Key>(a, weights, at, count, d, 0, ahead, factor, out);
  if (d < a.Dv) add_values<R, 1, true, Key>(a, weights, at, count, d, a.Dv - d, ahead, factor, out);
}

template <class Key>
inline void decode_group(const AttentionArgs& a, const DecodeScratch& scratch, int64_t n, int64_t size,
                         const BlockTokens& at, int64_t t0, int64_t count) {
  int32_t* group = scratch.group;
  for (int64_t r = size; r < size + kDecodeRows; r++) group[r] = (int32_t)n;
  for (int64_t i = 0, left; (left = size - i) > 0; i += kDecodeRows) {
    if (left > 4)
      decode_rows<8, Key>(a, scratch, n, group + i, smaller(left, 8), at, t0, count);
    else if (left > 2)
      decode_rows<4, Key>(a, scratch, n, group + i, left, at, t0, count);
    else if (left == 2)
      decode_rows<2, Key>(a, scratch, n, group + i, left, at, t0, count);
    else
      decode_rows<1, Key>(a, scratch, n, group + i, left, at, t0, count);
  }
}

inline bool same_tokens(const AttentionArgs& a, int64_t b, int64_t other, int64_t t0, int64_t count) {
  return a.rows && !memcmp(a.rows + b * a.rows_b + t0, a.rows + other * a.rows_b + t0, count * sizeof(int32_t));
}

// One block of tokens for all rows of a unit. Beams whose tokens lie in the same rows of the cache go together: the
// prompt, and what they have in common after it, is read once.
template <class Key>
inline void decode_block(const AttentionArgs& a, const AttentionArgs& a_without_mask, const AttentionTask& t,
                         const DecodeScratch& scratch, int64_t t0, int64_t count) {
  const int64_t n = t.row1 - t.row0, per_beam = a.S * a.G, b0 = t.sample * a.beams;
  BlockTokens at;
  memset(scratch.grouped, 0, a.beams);
  for (int64_t beam = 0; beam < a.beams; beam++) {
    if (scratch.grouped[beam]) continue;
    int64_t size = 0;
    bool masked = false;
    memset(scratch.seen, 0, kDecodeTokens);
    for (int64_t other = beam; other < a.beams; other++) {
      if (other > beam && (scratch.grouped[other] || !same_tokens(a, b0 + beam, b0 + other, t0, count))) continue;
      scratch.grouped[other] = 1;
      for (int64_t i = 0; i < per_beam; i++) scratch.group[size++] = (int32_t)(other * per_beam + i);
      masked |= !unmasked(a, b0 + other, t0, count);
      if (a.mask_kind != MaskKind::none) mark_seen(a, b0 + other, 0, a.S, t.kv_head, t0, count, scratch.seen);
    }
    if (masked && !any_seen(scratch.seen, count)) continue;
    find_tokens(a, b0 + beam, t.kv_head, t0, count, round_up(count, F32::lanes), masked ? scratch.seen : nullptr,
                scratch.zeros, at);
    decode_group<Key>(masked ? a : a_without_mask, scratch, n, size, at, t0, count);
  }
}

template <class Key>
inline void decode_typed(const AttentionArgs& a, const AttentionTask& t, char* base) {
  using Query = typename DecodeDot<Key>::Query;
  const int64_t n = t.row1 - t.row0;
  DecodeScratch scratch(a, n, base);
  if (t.state) {
    Pieces pieces{(char*)t.state};
    scratch.state = row_states(pieces, n, state_ld(a));
  }
  scratch.state.clear(n);
  memset(scratch.zeros, 0, larger(a.D, a.Dv) * sizeof(Key) + kScaleBytes);
  memset(scratch.spare, 0, state_ld(a) * sizeof(float));
  Query* query = (Query*)scratch.query;
  memset(query, 0, (n + 1) * scratch.query_ld * sizeof(Query));
  for (int64_t i = 0; i < n; i++) {
    scratch.rows[i] = query_row(a, t, t.row0 + i);
    const char* from = query_of(a, scratch.rows[i]);
#if defined(__AVX512VNNI__)
    if constexpr (kIntegers<Key>) {
      if (in_integers(a)) {
        split_query(from, a.dtype, a.D, DigitRow((char*)(query + i * scratch.query_ld), a.D));
        continue;
      }
    }
#endif
    for (int64_t d = 0; d < a.D; d += F32::lanes) {
      const int64_t count = smaller(F32::lanes, a.D - d);
      store(query + i * scratch.query_ld + d, load(from, a.dtype, d, count), count);
    }
  }
  const AttentionArgs a_without_mask = without_mask(a);
  int64_t first, end;
  const AttentionArgs& as_far_as_needed = narrow_rows(a, t, scratch.rows, first, end) ? a_without_mask : a;
  for (int64_t t0 = first; t0 < end; t0 += kDecodeTokens)
    decode_block<Key>(as_far_as_needed, a_without_mask, t, scratch, t0, smaller(kDecodeTokens, end - t0));
  if (!t.state)
    for (int64_t i = 0; i < n; i++) write_row(a, scratch.rows[i], scratch.state, i);
}

// Measured on Zen 4: with two products per lane the packed tiles win from about 24 rows on, with one from about 32.
inline int64_t most_decode_rows(const AttentionArgs& a) {
  const bool pairs = a.cache_dtype == DType::bf16 && DecodeDot<bf16>::width > F32::lanes;
  return pairs ? 24 : 32;
}
inline int64_t decode_scratch(const AttentionArgs& a, int64_t rows) { return DecodeScratch(a, rows, nullptr).bytes; }

inline void decode(const AttentionArgs& a, const AttentionTask& t, char* scratch) {
  if (a.cache_dtype == DType::f32) return decode_typed<float>(a, t, scratch);
  if (a.cache_dtype == DType::bf16) return decode_typed<bf16>(a, t, scratch);
  if (a.cache_dtype == DType::i8) return decode_typed<i8>(a, t, scratch);
  decode_typed<f16>(a, t, scratch);
}

}  // namespace
}  // namespace llmrt
