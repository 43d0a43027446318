#pragma once
#include "linear_vec.h"
#include "quantize_weight.h"

namespace llmrt {
namespace {

inline float first_lane(F32 v) {
  float lane[F32::lanes];
  store(lane, v);
  return lane[0];
}

// Smallest and largest value of a group, 0 among them, and the largest bits of a magnitude: those of infinity and NaN
// are larger than those of any finite value.
struct GroupRange {
  float low, high;
  int32_t magnitude;
};

template <class T>
GroupRange range_of(const T* w, int64_t count) {
  constexpr int64_t L = F32::lanes;
  const I32 mask = I32::set1(0x7fffffff);
  F32 low[2] = {F32::zero(), F32::zero()}, high[2] = {F32::zero(), F32::zero()};
  I32 bits[2] = {I32::zero(), I32::zero()};
  int64_t i = 0;
  const auto add = [&](F32 v, int chain) {
    low[chain] = min(low[chain], v), high[chain] = max(high[chain], v);
    bits[chain] = max(bits[chain], bits_of(v) & mask);
  };
  for (; i + 2 * L <= count; i += 2 * L) add(load(w + i), 0), add(load(w + i + L), 1);
  for (; i + L <= count; i += L) add(load(w + i), 0);
  if (i < count) add(load(w + i, count - i), 1);
  return {-max_of(F32::zero() - min(low[0], low[1])), max_of(max(high[0], high[1])), max_of(max(bits[0], bits[1]))};
}

// The first value of largest magnitude.
template <class T>
float extreme_of(const T* w, int64_t count, const GroupRange& r) {
  if (r.high > -r.low) return r.high;
  if (r.high < -r.low) return r.low;
  for (int64_t i = 0; i < count; i++) {
    const float v = first_lane(load(w + i, (int64_t)1));
    if (v == r.high || v == r.low) return v;
  }
  return 0.f;
}

// Stores a scale rounded to nearest even and returns what it then is. bf16 by hand: the instruction of AVX512-BF16
// flushes subnormal values.
inline float round_scale(float x, void* scales, DType t, int64_t i) {
  if (t != DType::bf16) {
    store(scales, t, i, F32::set1(x), 1);
    return first_lane(load(scales, t, i, 1));
  }
  uint32_t u;
  memcpy(&u, &x, 4);
  u += 0x7fff + (u >> 16 & 1);
  ((bf16*)scales)[i].bits = (uint16_t)(u >> 16);
  u &= 0xffff0000;
  memcpy(&x, &u, 4);
  return x;
}

// Codes minus 128 of a group, one to a byte; a last vector writes past the group's end.
template <class T>
void codes_of(const T* w, int64_t count, float inverse, float zero, float levels, uint8_t* out) {
  constexpr int64_t L = F32::lanes;
  const F32 factor = F32::set1(inverse), shift = F32::set1(zero), bias = F32::set1(128.f);
  const auto code = [&](F32 v) { return round_to_int(clamp(round(v * factor) + shift, 0.f, levels) - bias); };
  int64_t i = 0;
  for (; i + L <= count; i += L) store_saturated((int8_t*)out + i, code(load(w + i)));
  if (i < count) store_saturated((int8_t*)out + i, code(load(w + i, count - i)));
}

// One code to a byte, minus 128, to the canonical form.
inline void join_codes(const uint8_t* in, int64_t K, int bits, uint8_t* out) {
  if (bits == 8) {
    for (int64_t k = 0; k < K; k++) out[k] = in[k] ^ 0x80;
    return;
  }
  const int64_t pairs = K / 2;
  for (int64_t i = 0; i < pairs; i++) {
    uint16_t pair;
    memcpy(&pair, in + 2 * i, 2);
    pair ^= 0x8080;
    out[i] = (uint8_t)(pair | pair >> 4);
  }
  if (K % 2) out[pairs] = in[K - 1] ^ 0x80;
}

template <class T>
bool quantize_row(const QuantizeArgs& a, int64_t n, uint8_t* buffer) {
  const T* row = (const T*)a.weight + n * a.ldw;
  const float levels = (float)((1 << a.bits) - 1), sym_max = (float)(a.zero - 1);
  bool finite = true;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t k = g * a.group, count = a.K - k < a.group ? a.K - k : a.group;
    const GroupRange r = range_of(row + k, count);
    finite &= r.magnitude < 0x7f800000;
    const float largest = r.high > -r.low ? r.high : -r.low;
    const float ideal = a.asymmetric  ? (r.high - r.low) / levels
                        : a.fullrange ? extreme_of(row + k, count, r) / (float)-a.zero
                                      : largest / sym_max;
    const float scale = round_scale(ideal, a.scales, a.scale_dtype, n * a.groups + g);
    float zero = (float)a.zero;
    if (a.asymmetric) {
      zero = first_lane(round(F32::set1(-r.low / scale)));
      zero = zero > 0.f ? (zero < levels ? zero : levels) : 0.f;  // NaN, of a scale of 0, becomes 0
      a.zeros[n * a.groups + g] = (uint8_t)zero;
    }
    const float reciprocal = 1.f / scale, magnitude = reciprocal < 0.f ? -reciprocal : reciprocal;
    codes_of(row + k, count, magnitude < __builtin_inff() ? reciprocal : 0.f, zero, levels, buffer + k);
  }
  join_codes(buffer, a.K, a.bits, a.codes + n * a.row_bytes);
  return finite;
}

bool quantize_rows(const QuantizeArgs& a, int64_t row0, int64_t row1, uint8_t* buffer) {
  bool finite = true;
  for (int64_t n = row0; n < row1; n++)
    finite &= a.dtype == DType::f32    ? quantize_row<float>(a, n, buffer)
              : a.dtype == DType::bf16 ? quantize_row<bf16>(a, n, buffer)
                                       : quantize_row<f16>(a, n, buffer);
  return finite;
}

constexpr QuantizeKernels quantize_kernels = {quantize_rows};

}  // namespace
}  // namespace llmrt
