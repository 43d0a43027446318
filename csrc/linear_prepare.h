// Activations into the form that the register tiles read (struct Activations).
#pragma once
#include "linear.h"
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

// A vector of a segment's positions, from position i on.
inline F32 load_inputs(const void* x, DType dtype, Source source, int64_t i) {
  const int64_t left = source.count - i;
  if (left >= F32::lanes) return load(x, dtype, source.k0 + i);
  return left > 0 ? load(x, dtype, source.k0 + i, left) : F32::zero();
}

// Symmetric int8 of up to 128 values: scale absmax / 127. The largest magnitude is taken over the bits, so that NaN
// wins and reaches the result through the scale.
inline float quantize_segment(const void* x, DType dtype, Source source, int64_t length, int8_t* codes,
                              int32_t& code_sum) {
  constexpr int64_t L = F32::lanes;
  F32 values[kTileK / L];
  I32 largest = I32::zero();
  const int64_t vectors = length / L;
  for (int64_t i = 0; i < vectors; i++) {
    values[i] = load_inputs(x, dtype, source, i * L);
    largest = max(largest, bits_of(values[i]) & I32::set1(0x7fffffff));
  }
  const int32_t bits = max_of(largest);
  float absmax;
  memcpy(&absmax, &bits, 4);
  const F32 inverse = F32::set1(absmax == 0.f ? 0.f : 127.f / absmax);
  I32 total = I32::zero();
  for (int64_t i = 0; i < vectors; i++) {
    const I32 q = round_to_int(values[i] * inverse);
    total = total + q;
    store_saturated(codes + i * L, q);
  }
  code_sum = sum(total);
  return absmax / 127.f;
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

void prepare_int8_row(const PrepareArgs& a, const PackedWeight& w, const void* x, int64_t r, int64_t R, uint8_t* codes,
                      float* scales, int32_t* sums) {
  alignas(64) int8_t buffer[kTileK];
  const int64_t segments = w.tiles * kTileK / w.segment;
  for (int64_t s = 0; s < segments; s++) {
    int32_t total;
    const Source source = source_of(a, s * w.segment, w.segment);
    scales[s * R + r] = quantize_segment(x, a.dtype, source, w.segment, buffer, total);
    sums[s * R + r] = w.asymmetric ? total : -w.zero * total;
    scatter(buffer, w.segment / 4, codes + (s * w.segment * R + 4 * r), R);
  }
}

void prepare_float_row(const PrepareArgs& a, const PackedWeight& w, const void* x, int64_t r, int64_t R,
                       uint8_t* codes) {
  alignas(64) float buffer[kTileK];
  alignas(64) bf16 narrow[kTileK];
  for (int64_t p = 0; p < w.tiles * kTileK; p += w.segment) {
    const Source source = source_of(a, p, w.segment);
    for (int64_t i = 0; i < w.segment; i += F32::lanes) {
      const F32 v = load_inputs(x, a.dtype, source, i);
      store(buffer + i, v);
      store(narrow + i, v);
      if (a.round_to_bf16) store(buffer + i, load(narrow + i));
    }
    if (a.compute == Compute::bf16)
      scatter(narrow, w.segment / 2, codes + 2 * p * R + 4 * r, R);
    else
      scatter(buffer, w.segment, codes + 4 * p * R + 4 * r, R);
  }
}

void prepare_activations(const PrepareArgs& a, const PackedWeight& w, int64_t block0, int64_t block1) {
  const int64_t row_bytes = w.tiles * kTileK * (a.compute == Compute::int8 ? 1 : a.compute == Compute::bf16 ? 2 : 4);
  const int64_t segments = w.tiles * kTileK / w.segment;
  for (int64_t b = block0; b < block1; b++) {
    const int64_t m0 = b * kBlockRows, R = a.out.M - m0 < kBlockRows ? a.out.M - m0 : kBlockRows;
    for (int64_t r = 0; r < R; r++) {
      const void* x = (const char*)a.x + (m0 + r) * a.stride * size_of(a.dtype);
      uint8_t* codes = a.out.codes + m0 * row_bytes;
      if (a.compute == Compute::int8)
        prepare_int8_row(a, w, x, r, R, codes, a.out.scales + m0 * segments, a.out.sums + m0 * segments);
      else
        prepare_float_row(a, w, x, r, R, codes);
    }
  }
}

}  // namespace
}  // namespace llmrt
