// What the decode and the prefill kernels share: which tokens a block holds, the online softmax over a block of scores,
// and the result of a query row.
#pragma once
#include "attention_mask_kernels.h"
#include "kv_append_kernels.h"

namespace llmrt {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNothing = -__builtin_inff();

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Hands out 64-byte aligned pieces of a buffer; over a null base it only measures.
struct Pieces {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = (T*)(base + used);
    used += round_up(count * (int64_t)sizeof(T), 64);
    return piece;
  }
};

#if defined(__AVX512F__)
inline F32 where_true(const uint8_t* mask, int64_t count, F32 x, F32 otherwise) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first(count), mask);
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), otherwise.v, x.v)};
}
inline F32 iota() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline F32 exponent_bits(F32 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))}; }
#else
inline F32 where_true(const uint8_t* mask, int64_t count, F32 x, F32 otherwise) {
  uint64_t bytes = 0;
  memcpy(&bytes, mask, count);
  const __m256i hidden =
      _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)), _mm256_setzero_si256());
  return {_mm256_blendv_ps(x.v, otherwise.v, _mm256_castsi256_ps(hidden))};
}
inline F32 iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline F32 exponent_bits(F32 x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))}; }
#endif

// Lane i of the result is the sum of v[i].
#if defined(__AVX512F__)
inline F32 lane_sums(const F32 (&v)[16]) {
  __m512 w[4];
  for (int i = 0; i < 4; i++) {
    const __m512* p = &v[4 * i].v;
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3]));
    w[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  }
  const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
  const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(w[2], w[3], 0x88), _mm512_shuffle_f32x4(w[2], w[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd))};
}
#else
inline F32 lane_sums(const F32 (&v)[8]) {
  __m256 w[2];
  for (int i = 0; i < 2; i++) {
    const __m256* p = &v[4 * i].v;
    const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(p[0], p[1]), _mm256_unpackhi_ps(p[0], p[1]));
    const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(p[2], p[3]), _mm256_unpackhi_ps(p[2], p[3]));
    w[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(w[0], w[1], 0x20), _mm256_permute2f128_ps(w[0], w[1], 0x31))};
}
#endif

// Into the second cache level: a block of long rows would push itself out of the first (measured: 13 to 20 GB/s a
// core).
inline void prefetch_row(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

// 2^x for x <= 0, relative error 1e-7; exactly 0 below -126.5 (no subnormals) and for -inf; NaN stays NaN. The minimax
// polynomial is of 2^r on [-1/2, 1/2] with 2^0 = 1 exactly. Adding 1.5 * 2^23 rounds to an integer in the low bits.
inline F32 exp2_nonpositive(F32 x) {
  x = max(F32::set1(-127.f), x);
  const F32 magic = F32::set1(12582912.f + 127.f);
  const F32 biased = x + magic;
  const F32 r = x - (biased - magic);
  F32 p = F32::set1(0x1.5bba14p-10f);
  p = fma(p, r, F32::set1(0x1.3cea88p-7f));
  p = fma(p, r, F32::set1(0x1.c6b752p-5f));
  p = fma(p, r, F32::set1(0x1.ebf9bcp-3f));
  p = fma(p, r, F32::set1(0x1.62e42ap-1f));
  p = fma(p, r, F32::set1(1.f));
  return p * exponent_bits(biased);
}
inline float exp2_nonpositive(float x) {
  float lane[F32::lanes];
  store(lane, exp2_nonpositive(F32::set1(x)));
  return lane[0];
}

// Where the keys and values of a block lie. Tokens that nobody sees and those past the end point at zeros: what the
// cache holds there (NaN, perhaps) reaches nothing.
struct BlockTokens {
  const char *key[kBlockTokens], *value[kBlockTokens];
  float key_scale[kBlockTokens], value_scale[kBlockTokens];  // of int8 rows
};
// What the scores and weights of a block from token j on are multiplied with; null: nothing.
struct BlockScales {
  const float *key, *value;
};
inline BlockScales scales_from(const AttentionArgs& a, const BlockTokens& at, int64_t j) {
  if (a.cache_dtype != DType::i8) return {nullptr, nullptr};
  return {at.key_scale + j, at.value_scale + j};
}
inline void find_tokens(const AttentionArgs& a, int64_t b, int64_t kv_head, int64_t t0, int64_t count, int64_t padded,
                        const uint8_t* seen, const char* zeros, BlockTokens& at) {
  const int64_t element = size_of(a.cache_dtype);
  const char* key = (const char*)a.key + (kv_head * a.key_h + t0 * a.key_t) * element;
  const char* value = (const char*)a.value + (kv_head * a.value_h + t0 * a.value_t) * element;
  const int64_t key_t = a.key_t * element, value_t = a.value_t * element;
  const int64_t key_r = a.key_r * element, value_r = a.value_r * element;
  if (a.rows) {
    const int32_t* row = a.rows + b * a.rows_b + t0;
    for (int64_t j = 0; j < count; j++) {
      at.key[j] = key + row[j] * key_r + j * key_t;
      at.value[j] = value + row[j] * value_r + j * value_t;
    }
  } else {
    for (int64_t j = 0; j < count; j++) {
      at.key[j] = key + b * key_r + j * key_t;
      at.value[j] = value + b * value_r + j * value_t;
    }
  }
  if (seen)
    for (int64_t j = 0; j < count; j++)
      if (!seen[j]) at.key[j] = at.value[j] = zeros;
  for (int64_t j = count; j < padded; j++) at.key[j] = at.value[j] = zeros;
  if (a.cache_dtype == DType::i8)
    for (int64_t j = 0; j < padded; j++) {
      memcpy(at.key_scale + j, at.key[j] + a.D, kScaleBytes);
      memcpy(at.value_scale + j, at.value[j] + a.Dv, kScaleBytes);
    }
}

// Running softmax of rows: highest score so far (in units of log 2), sum of weights, unnormalized output.
struct RowStates {
  float *highest, *total, *out;  // [n], [n], [n, ld]
  int64_t ld;
  void clear(int64_t n) const {
    for (int64_t i = 0; i < n; i++) highest[i] = kNothing, total[i] = 0.f;
    memset(out, 0, n * ld * sizeof(float));
  }
};
inline RowStates row_states(Pieces& pieces, int64_t rows, int64_t ld) {
  return {pieces.take<float>(rows), pieces.take<float>(rows), pieces.take<float>(rows * ld), ld};
}
inline int64_t state_ld(const AttentionArgs& a) { return round_up(a.Dv, 2 * F32::lanes); }
inline int64_t state_floats(const AttentionArgs& a, int64_t rows) {
  Pieces pieces{nullptr};
  row_states(pieces, rows, state_ld(a));
  return pieces.used / 4;
}

// Raises finite mask values to -2^126, whose product with log2(e) is finite and exact: a row that the smallest float32
// or bfloat16 hides from every token weighs all of them alike. Others, -inf among them, stay as they are.
inline F32 bounded(F32 mask) { return fma(mask, F32::set1(0x1p-100f), max(mask, F32::set1(-0x1p126f))); }

// Turns the dot products x[0, count) of a row and the tokens from t0 on into scores; only where options ask for more
// than a scale, which the exponential applies.
inline void finish_scores(const AttentionArgs& a, const QueryRow& q, int64_t t0, int64_t count, float* x) {
  const F32 scale = F32::set1(a.scale), cap = F32::set1(a.softcap), slope = F32::set1(q.slope);
  for (int64_t j = 0; j < count; j += F32::lanes) {
    const int64_t n = smaller(F32::lanes, count - j);
    F32 v = load(x + j) * scale;
    if (a.softcap > 0.f) v = cap * tanh(v / cap);
    if (a.slopes) v = fma(slope, iota() + F32::set1((float)(t0 + j - q.position)), v);
    if (a.mask_kind == MaskKind::floating) v = v + bounded(load(q.mask, a.mask_dtype, t0 + j, n));
    if (a.mask_kind == MaskKind::boolean) v = where_true((const uint8_t*)q.mask + t0 + j, n, v, F32::set1(kNothing));
    store(x + j, v);
  }
}
inline bool plain_scores(const AttentionArgs& a) {
  return a.scale > 0.f && a.softcap <= 0.f && !a.slopes && a.mask_kind == MaskKind::none;
}

// One step of the online softmax (Milakov and Gimelshein 2018) for up to F32::lanes rows: scores of row i, its dot
// products at x + i * ldx for the tokens t0..t0+count-1 (padded to a multiple of F32::lanes), become weights at
// weights + i * ldx (which may be x), those of int8 rows times their scale; factor[i] is what the row's output so far
// must be multiplied by.
template <class Weight>
inline void softmax_step(const AttentionArgs& a, const QueryRow* const* q, int64_t n, int64_t t0, int64_t count,
                         const BlockScales& scales, float* x, int64_t ldx, float* const* highest, float* const* total,
                         float* factor, Weight* weights) {
  const bool plain = plain_scores(a);
  const float unit = plain ? a.scale * kLog2E : kLog2E;
  const int64_t padded = round_up(count, F32::lanes);
  float shift[F32::lanes] = {};
  for (int64_t i = 0; i < n; i++) {
    float* row = x + i * ldx;
    if (scales.key)
      for (int64_t j = 0; j < padded; j += F32::lanes) store(row + j, load(row + j) * load(scales.key + j));
    if (!plain) finish_scores(a, *q[i], t0, count, row);
    const int64_t begin = larger(0, q[i]->first - t0), end = larger(0, smaller(count, q[i]->end - t0));
    for (int64_t j = 0; j < smaller(begin, padded); j++) row[j] = kNothing;
    for (int64_t j = end; j < padded; j++) row[j] = kNothing;
    F32 most = load(row);
    for (int64_t j = F32::lanes; j < padded; j += F32::lanes) most = max(most, load(row + j));
    const float before = *highest[i], block = max_of(most) * unit, now = before > block ? before : block;
    *highest[i] = now;
    shift[i] = now == kNothing ? 0.f : now;
    factor[i] = now == kNothing ? 0.f : before - now;
  }
  store(factor, exp2_nonpositive(load(factor, n)), n);
  for (int64_t i = 0; i < n; i++) {
    const float* row = x + i * ldx;
    Weight* out = weights + i * ldx;
    F32 sum_of_weights = F32::zero();
    for (int64_t j = 0; j < padded; j += F32::lanes) {
      const F32 w = exp2_nonpositive(fma(load(row + j), F32::set1(unit), F32::set1(-shift[i])));
      sum_of_weights = sum_of_weights + w;
      store(out + j, scales.value ? w * load(scales.value + j) : w);
    }
    *total[i] = *total[i] * factor[i] + sum(sum_of_weights);
  }
}

// Divides a finished row by its sum of weights (the sink's included) and writes it out.
inline void write_row(const AttentionArgs& a, const QueryRow& q, const RowStates& state, int64_t i) {
  float highest = state.highest[i], total = state.total[i], factor = 1.f;
  if (a.sinks) {
    const float sink = sum(load(a.sinks, a.sinks_dtype, q.head, 1)) * kLog2E;
    const float now = highest > sink ? highest : sink;
    if (now != kNothing)
      factor = exp2_nonpositive(highest - now), total = total * factor + exp2_nonpositive(sink - now);
  }
  const F32 by = F32::set1(total == 0.f ? 0.f : factor / total);
  const float* from = state.out + i * state.ld;
  const int64_t element = size_of(a.dtype);
  char* to = (char*)a.out + ((q.batch * a.S + q.token) * a.H + q.head) * a.Dv * element;
  for (int64_t d = 0; d < a.Dv; d += F32::lanes)
    store(to, a.dtype, d, load(from + d) * by, smaller(F32::lanes, a.Dv - d));
}

inline void merge_states(const AttentionArgs& a, const AttentionTask& t, int64_t splits, int64_t stride) {
  const int64_t n = t.row1 - t.row0;
  for (int64_t i = 0; i < n; i++) {
    Pieces pieces{(char*)t.state};
    const RowStates into = row_states(pieces, n, state_ld(a));
    for (int64_t p = 1; p < splits; p++) {
      Pieces other{(char*)(t.state + p * stride)};
      const RowStates from = row_states(other, n, state_ld(a));
      const float x = into.highest[i], y = from.highest[i], now = x > y ? x : y;
      if (now == kNothing) continue;
      const float fx = exp2_nonpositive(x - now), fy = exp2_nonpositive(y - now);
      into.highest[i] = now, into.total[i] = into.total[i] * fx + from.total[i] * fy;
      float* sum_row = into.out + i * into.ld;
      const float* row = from.out + i * from.ld;
      for (int64_t d = 0; d < into.ld; d += F32::lanes)
        store(sum_row + d, fma(load(row + d), F32::set1(fy), load(sum_row + d) * F32::set1(fx)));
    }
    write_row(a, query_row(a, t, t.row0 + i), into, i);
  }
}

inline bool rows_in_range(const int32_t* rows, int64_t count, int64_t limit) {
  uint32_t most = 0;  // a negative entry is larger than any limit
  for (int64_t i = 0; i < count; i++) most = (uint32_t)rows[i] > most ? (uint32_t)rows[i] : most;
  return count == 0 || most < limit;
}

}  // namespace
}  // namespace llmrt
