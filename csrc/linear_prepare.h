// Activations into the form that the register tiles read (struct Activations).
#pragma once
#include <type_traits>

#include "linear.h"
#include "linear_decode.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

// Where the padded positions of one segment come from: `count` inputs from k0 on, then zeros.
struct Source {
  int64_t k0, count;
};
inline Source source_of(const PrepareArgs& a, int64_t position, int64_t length) {
  const int64_t g = position / a.padded_group, offset = position % a.padded_group;
  const int64_t k0 = g * a.group + offset;
  int64_t end = (g + 1) * a.group;
  if (end > a.K) end = a.K;
  int64_t count = end - k0;
  if (count < 0) count = 0;
  return {k0, count < length ? count : length};
}

// Of a segment's largest magnitude: what is smaller counts as 0, as 127 over it would be infinite.
constexpr float kLeast = 0x1p-118f;

// Symmetric int8 of one segment: scale absmax / 127. The largest magnitude is taken over the bits, so that NaN wins and
// reaches the result through the scale.
template <int vectors, class T>
inline float quantize(const T* x, int8_t* codes, int32_t& code_sum) {
  constexpr int64_t L = F32::lanes;
  F32 values[vectors];
  I32 largest[vectors], q[vectors];
#pragma GCC unroll 16
  for (int i = 0; i < vectors; i++) {
    values[i] = load(x + i * L);
    largest[i] = bits_of(values[i]) & I32::set1(0x7fffffff);
  }
#pragma GCC unroll 16
  for (int n = vectors / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) largest[i] = max(largest[i], largest[i + n]);
  const int32_t bits = max_of(largest[0]);
  float absmax;
  memcpy(&absmax, &bits, 4);
  const F32 inverse = F32::set1(absmax < kLeast ? 0.f : 127.f / absmax);
#pragma GCC unroll 16
  for (int i = 0; i < vectors; i++) {
    q[i] = round_to_int(values[i] * inverse);
    store_saturated(codes + i * L, q[i]);
  }
#pragma GCC unroll 16
  for (int n = vectors / 2; n > 0; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) q[i] = q[i] + q[i + n];
  code_sum = sum(q[0]);
  return absmax / 127.f;
}

template <class T>
inline float quantize_segment(const T* x, int64_t length, int8_t* codes, int32_t& code_sum) {
  if (length == 128) return quantize<128 / F32::lanes>(x, codes, code_sum);
  if (length == 64) return quantize<64 / F32::lanes>(x, codes, code_sum);
  return quantize<32 / F32::lanes>(x, codes, code_sum);
}

// The inputs of one segment, padded, as floats.
inline void load_padded(const void* x, DType dtype, Source source, int64_t length, float* out) {
  for (int64_t i = 0; i < length; i += F32::lanes) {
    const int64_t left = source.count - i;
    store(out + i, left >= F32::lanes ? load(x, dtype, source.k0 + i)
                   : left > 0         ? load(x, dtype, source.k0 + i, left)
                                      : F32::zero());
  }
}

// `dwords` consecutive dwords to every R-th dword of `to`.
inline void scatter(const void* from, int64_t dwords, void* to, int64_t R) {
  if (R == 1) {
    memcpy(to, from, dwords * 4);
  } else {
    const uint32_t* f = (const uint32_t*)from;
    uint32_t* t = (uint32_t*)to;
    for (int64_t i = 0; i < dwords; i++) t[i * R] = f[i];
  }
}

// Rows of `dwords` dwords, 8 or multiples of 16, into [dwords][R]. Up to 32 bytes behind the last row are read.
inline void interleave(const uint8_t* rows, int64_t dwords, int64_t R, uint8_t* to) {
  uint32_t* t = (uint32_t*)to;
  int64_t r = 0;
  for (; r + 4 <= R; r += 4)
    for (int64_t i = 0; i < dwords; i += F32::lanes) {
      const auto row = [&](int64_t n) { return load_words(rows + 4 * ((r + n) * dwords + i)); };
      store_columns(row(0), row(1), row(2), row(3), dwords, t + i * R + r, R);
    }
  for (; r < R; r++) scatter(rows + 4 * r * dwords, dwords, t + r, R);
}

// One segment of rows m0 .. m0 + R - 1, prepared one after another.
template <class T>
struct SegmentRows {
  const PrepareArgs& a;
  const PackedWeight& w;
  int64_t s;
  uint8_t* codes;  // [R][bytes of the segment]
  float* scales;   // [R]
  int32_t* sums;   // [R]

  bool positions_are_inputs() const { return a.group == a.padded_group && (s + 1) * w.segment <= a.K; }

  void int8_row(const T* x, int64_t r) const {
    alignas(64) float padded[kTileK];
    const int64_t p = s * w.segment;
    int8_t* to = (int8_t*)codes + r * w.segment;
    int32_t total;
    if (positions_are_inputs()) {
      scales[r] = quantize_segment(x + p, w.segment, to, total) * w.unit;
    } else {
      load_padded(x, a.dtype, source_of(a, p, w.segment), w.segment, padded);
      scales[r] = quantize_segment(padded, w.segment, to, total) * w.unit;
    }
    sums[r] = w.asymmetric ? (uint16_t)-total : -w.zero * total;
  }

  void pairs_row(const void* narrow, int64_t r) const {
    const uint8_t* from = (const uint8_t*)narrow;
    uint8_t* to = codes + r * w.segment * 2;
    for (int64_t i = 0; i < 2 * w.segment; i += 64)
      w.bits == 4 ? pair_up<4>(from + i, to + i) : pair_up<8>(from + i, to + i);
  }

  void float_row(const T* x, int64_t r) const {
    if constexpr (std::is_same_v<T, bf16>)
      if (a.compute == Compute::bf16 && !w.asymmetric && positions_are_inputs()) return pairs_row(x + s * w.segment, r);
    alignas(64) float buffer[kTileK];
    alignas(64) bf16 narrow[kTileK];
    load_padded(x, a.dtype, source_of(a, s * w.segment, w.segment), w.segment, buffer);
    F32 total = F32::zero();
    for (int64_t i = 0; i < w.segment; i += F32::lanes) {
      F32 v = load(buffer + i);
      if (a.compute == Compute::bf16 || a.round_to_bf16) {
        store(narrow + i, v);
        v = load(narrow + i);
        store(buffer + i, v);
      }
      total = total + v;
    }
    scales[r] = -sum(total);
    if (a.compute == Compute::bf16)
      pairs_row(narrow, r);
    else
      memcpy(codes + r * w.segment * 4, buffer, w.segment * 4);
  }
};

// The codes of the last call may lie in another core's cache: they are asked for one segment ahead.
template <class T>
void prepare_block(const PrepareArgs& a, const PackedWeight& w, int64_t m0, int64_t R) {
  const int64_t segments = w.tiles * kTileK / w.segment;
  const int64_t bytes = w.segment * (a.compute == Compute::int8 ? 1 : a.compute == Compute::bf16 ? 2 : 4);
  uint8_t* codes = a.out.codes + m0 * segments * bytes;
  for (int64_t s = 0; s < segments; s++, codes += R * bytes) {
    const int64_t at = m0 * segments + s * R;
    alignas(64) uint8_t buffer[kBlockRows * kTileK * 4];
    const SegmentRows<T> rows{a, w, s, R == 1 ? codes : buffer, a.out.scales + at, a.out.sums + at};
    for (int64_t i = 0; i < R * bytes; i += 64) prefetch_to_write(codes + R * bytes + i);
    for (int64_t r = 0; r < R; r++) {
      const T* x = (const T*)a.x + (m0 + r) * a.stride;
      for (int64_t i = 0; i < w.segment; i += 64 / (int64_t)sizeof(T)) prefetch(x + (s + 1) * w.segment + i);
      if (a.compute == Compute::int8)
        rows.int8_row(x, r);
      else
        rows.float_row(x, r);
    }
    if (R > 1) interleave(buffer, bytes / 4, R, codes);
  }
}

void prepare_activations(const PrepareArgs& a, const PackedWeight& w, int64_t block0, int64_t block1) {
  for (int64_t b = block0; b < block1; b++) {
    const int64_t m0 = b * a.out.block, R = a.out.M - m0 < a.out.block ? a.out.M - m0 : a.out.block;
    if (a.dtype == DType::f32) prepare_block<float>(a, w, m0, R);
    if (a.dtype == DType::bf16) prepare_block<bf16>(a, w, m0, R);
    if (a.dtype == DType::f16) prepare_block<f16>(a, w, m0, R);
  }
}

}  // namespace
}  // namespace llmrt
