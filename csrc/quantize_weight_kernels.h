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
// e8m0: the next power of two that is not smaller, 2^-127 for 0.
inline float round_scale(float x, void* scales, DType t, int64_t i) {
  if (t == DType::e8m0) {
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u >> 23) + ((u & 0x7fffff) != 0);
    u = u < 254 ? u : 254;
    ((uint8_t*)scales)[i] = (uint8_t)u;
    u = u ? u << 23 : 0x00400000;
    memcpy(&x, &u, 4);
    return x;
  }
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

// Nearest code of a book, minus 128.
inline I32 book_code(F32 v, const QuantizeArgs& a) {
  I32 code = I32::set1(a.first_code - 128);
  for (int i = 0; i < a.midpoints; i++)
    code = add_where_greater(code, v, F32::set1(a.midpoint[i]), I32::set1(a.step[i]));
  return code;
}

// Nearest float of 8 bits, ties to even, minus 128. Numbers that are subnormal there are multiples of the smallest one,
// and their codes are the factors; larger ones round off bits of the mantissa. Each formula gives too little, or its
// bound, where the other one holds.
template <int mantissa, int bias>
inline I32 float8_code(F32 v, float largest) {
  constexpr int cut = 23 - mantissa;
  const F32 x = clamp(v, -largest, largest);
  const F32 magnitude = abs(x);
  const I32 bits = bits_of(magnitude), odd = shift_right<cut>(bits) & I32::set1(1);
  const I32 normal =
      shift_right<cut>(bits + odd + I32::set1((1 << (cut - 1)) - 1)) - I32::set1((127 - bias) << mantissa);
  const F32 per_step = F32::set1((float)(1 << (bias - 1 + mantissa)));
  const I32 subnormal = round_to_int(min(magnitude * per_step, F32::set1((float)(1 << mantissa))));
  const I32 sign = shift_right<24>(bits_of(x)) & I32::set1(128);
  return (max(normal, subnormal) | sign) - I32::set1(128);
}

// Codes minus 128 of a group, one to a byte; a last vector writes past the group's end.
template <class T, class Code>
void store_codes(const T* w, int64_t count, float inverse, uint8_t* out, const Code& code_of) {
  constexpr int64_t L = F32::lanes;
  const F32 factor = F32::set1(inverse);
  const auto code = [&](F32 v) { return code_of(v * factor); };
  int64_t i = 0;
  for (; i + L <= count; i += L) store_saturated((int8_t*)out + i, code(load(w + i)));
  if (i < count) store_saturated((int8_t*)out + i, code(load(w + i, count - i)));
}

template <class T>
void codes_of(const QuantizeArgs& a, const T* w, int64_t count, float inverse, float zero, float levels, uint8_t* out) {
  const F32 shift = F32::set1(zero), bias = F32::set1(128.f);
  if (a.coding == Coding::book)
    store_codes(w, count, inverse, out, [&](F32 v) { return book_code(v, a); });
  else if (a.coding == Coding::e4m3)
    store_codes(w, count, inverse, out, [&](F32 v) { return float8_code<3, 7>(v, a.absmax); });
  else if (a.coding == Coding::e5m2)
    store_codes(w, count, inverse, out, [&](F32 v) { return float8_code<2, 15>(v, a.absmax); });
  else
    store_codes(w, count, inverse, out,
                [&](F32 v) { return round_to_int(clamp(round(v) + shift, 0.f, levels) - bias); });
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
  const float levels = (float)((1 << a.bits) - 1);
  bool finite = true;
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t k = g * a.group, count = a.K - k < a.group ? a.K - k : a.group;
    const GroupRange r = range_of(row + k, count);
    finite &= r.magnitude < 0x7f800000;
    const float largest = r.high > -r.low ? r.high : -r.low;
    const float ideal = a.asymmetric  ? (r.high - r.low) / levels
                        : a.fullrange ? extreme_of(row + k, count, r) / (float)-a.zero
                                      : largest / a.absmax;
    const float scale = round_scale(ideal, a.scales, a.scale_dtype, n * a.groups + g);
    float zero = (float)a.zero;
    if (a.asymmetric) {
      zero = first_lane(round(F32::set1(-r.low / scale)));
      zero = zero > 0.f ? (zero < levels ? zero : levels) : 0.f;  // NaN, of a scale of 0, becomes 0
      a.zeros[n * a.groups + g] = (uint8_t)zero;
    }
    const float reciprocal = 1.f / scale, magnitude = reciprocal < 0.f ? -reciprocal : reciprocal;
    codes_of(a, row + k, count, magnitude < __builtin_inff() ? reciprocal : 0.f, zero, levels, buffer + k);
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
