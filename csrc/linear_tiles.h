// Register tiles of the quantized linear: R rows x 32 outputs x one packed tile of 128 inputs.
#pragma once
#include "linear.h"
#include "linear_decode.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

struct Stretches;

struct TileArgs {
  const uint8_t* codes;  // a panel, or for the packed tiles the weight itself
  const uint8_t* a;      // dwords [step][R]
  const float* a_scales;
  const int32_t* a_sums;
  const uint8_t *scales, *zeros;
  DType scale_dtype;
  bool asymmetric;
  int zero;
  const float* book;
  const uint8_t* digits;
  float unit;
  int64_t segments, steps;  // of this tile; steps (rows of dwords) per segment
  int64_t R;
  float* C;                    // [R][32], added to
  const Stretches* stretches;  // panels of floats: what scales them
};

// Bytes of the weight that a single row block prefetches ahead. Few rows leave the core waiting for the memory only,
// and the hardware's prefetcher then does better alone.
constexpr int64_t ahead_of(int R) { return R >= kBlockRows / 2 ? 2048 : 0; }

// Without it the compiler keeps C in registers across the segments, and has none left for the sums.
inline __attribute__((always_inline)) void keep_in_memory() { __asm__ volatile("" : : : "memory"); }

// Adds the sums of one segment to C: C += scale * (a_scale * dots). Each row is added as soon as its last products are
// issued: the tail of all rows at once would fill the core's scheduler with waiting instructions.
struct SegmentSums {
  F32 s0, s1;
  const float* a_scales;
  float* C;

  SegmentSums(const TileArgs& t, int64_t s, int64_t h, int64_t R) {
    const int64_t n = s * kTileN + h * kHalfN;
    s0 = load(t.scales, t.scale_dtype, n), s1 = load(t.scales, t.scale_dtype, n + F32::lanes);
    a_scales = t.a_scales + s * R, C = t.C + h * kHalfN;
    keep_in_memory();
  }
  void add(int r, I32 c0, I32 c1) const {
    const F32 scale = F32::set1(a_scales[r]);
    float* y = C + r * kTileN;
    store(y, fma(to_float(c0), s0 * scale, load(y)));
    store(y + F32::lanes, fma(to_float(c1), s1 * scale, load(y + F32::lanes)));
  }
};

// The sums start from -zero * (sum of the activations): for symmetric weights one number, prepared.
template <int R, bool asymmetric>
inline __attribute__((always_inline)) void start_segment(const TileArgs& t, int64_t s, int64_t h, I32 (&c0)[R],
                                                         I32 (&c1)[R]) {
  const uint8_t* z = t.zeros + s * kTileN + h * kHalfN;
  const int32_t* sums = t.a_sums + s * R;
  I32 z0, z1;
  if (asymmetric) z0 = load_bytes(z), z1 = load_bytes(z + F32::lanes);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const I32 sum = broadcast(sums + r);
    c0[r] = asymmetric ? dot16(z0, sum) : sum, c1[r] = asymmetric ? dot16(z1, sum) : sum;
  }
}

// Codes as bytes, [k4][32 n][4 k].
template <int R, bool wide, bool asymmetric, bool stream>
__attribute__((noinline)) void tile_bytes(const TileArgs& arguments) {
  const TileArgs t = arguments;  // local: what the kernel stores cannot change it
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      I32 c0[R], c1[R];
      start_segment<R, asymmetric>(t, s, h, c0, c1);
      const uint8_t *w = t.codes + s * t.steps * 128 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 2; k < t.steps; k++, w += 128, a += 4 * R) {
        const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
        if (stream && ahead_of(R)) prefetch(w + ahead_of(R)), prefetch(w + ahead_of(R) + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          dot<wide>(c0[r], w0, b), dot<wide>(c1[r], w1, b);
        }
      }
      const SegmentSums sums(t, s, h, R);
      const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
      const I32 w2 = load_words(w + 128), w3 = load_words(w + 128 + kVectorBytes);
      if (stream && ahead_of(R))
        for (int i = 0; i < 256; i += 64) prefetch(w + ahead_of(R) + i);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        I32 b = broadcast(a + 4 * r);
        dot<wide>(c0[r], w0, b), dot<wide>(c1[r], w1, b);
        b = broadcast(a + 4 * (R + r));
        dot<wide>(c0[r], w2, b), dot<wide>(c1[r], w3, b);
        sums.add(r, c0[r], c1[r]);
      }
    }
}

// Codes as packed nibbles, split in registers: for one row block there is no panel to share.
template <int R, bool asymmetric, bool book>
__attribute__((noinline)) void tile_nibbles(const TileArgs& arguments) {
  const TileArgs t = arguments;  // local: what the kernel stores cannot change it
  const Digits digits(t.digits);
  const auto low = [&](I32 x) { return factors_of<book>(low_nibbles(x), digits); };
  const auto high = [&](I32 x) { return factors_of<book>(high_nibbles(x), digits); };
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      I32 c0[R], c1[R];
      start_segment<R, asymmetric>(t, s, h, c0, c1);
      const uint8_t *w = t.codes + s * t.steps * 64 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 2; k < t.steps; k += 2, w += 128, a += 8 * R) {
        const I32 x0 = load_words(w), x1 = load_words(w + kVectorBytes);
        if (ahead_of(R)) prefetch(w + ahead_of(R)), prefetch(w + ahead_of(R) + 64);
        const I32 low0 = low(x0), low1 = low(x1), high0 = high(x0), high1 = high(x1);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          dot<book>(c0[r], low0, b), dot<book>(c1[r], low1, b);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * (R + r));
          dot<book>(c0[r], high0, b), dot<book>(c1[r], high1, b);
        }
      }
      const SegmentSums sums(t, s, h, R);
      const I32 x0 = load_words(w), x1 = load_words(w + kVectorBytes);
      if (ahead_of(R)) prefetch(w + ahead_of(R)), prefetch(w + ahead_of(R) + 64);
      const I32 low0 = low(x0), low1 = low(x1), high0 = high(x0), high1 = high(x1);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        I32 b = broadcast(a + 4 * r);
        dot<book>(c0[r], low0, b), dot<book>(c1[r], low1, b);
        b = broadcast(a + 4 * (R + r));
        dot<book>(c0[r], high0, b), dot<book>(c1[r], high1, b);
        sums.add(r, c0[r], c1[r]);
      }
    }
}

// Sums of float products start from zero point * -(sum of the activations), which a_scales holds.
template <int R>
inline __attribute__((always_inline)) void start_floats(const TileArgs& t, int64_t s, int64_t h, F32* c0, F32* c1,
                                                        int stride) {
  if (t.asymmetric) {
    const uint8_t* z = t.zeros + s * kTileN + h * kHalfN;
    const F32 z0 = to_float(load_bytes(z)), z1 = to_float(load_bytes(z + F32::lanes));
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const F32 sum = F32::set1(t.a_scales[s * R + r]);
      c0[r * stride] = z0 * sum, c1[r * stride] = z1 * sum;
    }
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) c0[r * stride] = c1[r * stride] = F32::zero();
  }
}

// Adds the sums of one segment of float products to C, as `SegmentSums` does: C += scale * sums.
struct FloatSums {
  F32 s0, s1;
  float* C;

  FloatSums(F32 scale0, F32 scale1, float* sums) : s0(scale0), s1(scale1), C(sums) { keep_in_memory(); }
  void add(int r, F32 c0, F32 c1) const {
    float* y = C + r * kTileN;
    store(y, fma(c0, s0, load(y)));
    store(y + F32::lanes, fma(c1, s1, load(y + F32::lanes)));
  }
};

// c += w * b, of pairs of bf16 or of floats.
template <bool pairs>
inline void multiply_floats(F32& c, I32 w, I32 b) {
  if constexpr (pairs)
    dot_bf16(c, w, b);
  else
    c = fma(as_float(w), as_float(b), c);
}

// The packed codes themselves, decoded in registers: for one row block there is no panel to share. An 8-bit code is two
// 4-bit ones for bf16 products, 16 * high - zero and low, both exact.
template <int R, bool pairs, Coding coding>
__attribute__((noinline)) void tile_codes(const TileArgs& arguments) {
  const TileArgs t = arguments;  // local: what the kernel stores cannot change it
  constexpr int bits = bits_of(coding);
  constexpr bool nibbles = coding != Coding::bytes && bits == 4;
  constexpr int kSteps = (pairs ? 16 : 32) / bits;                    // of activations per dword of codes
  constexpr int kDecoded = pairs && !is_float8(coding) ? 4 : kSteps;  // vectors that a dword of codes gives
  constexpr int kChains = R == 1 ? 4 : R <= kBlockRows / 4 ? 2 : 1;  // fewer would wait for the latency of the products
  const PairTable low = nibbles ? PairTable(t.book) : PairTable(0, 1);
  const PairTable high = nibbles ? low : PairTable(t.zero / 16, 16);
  const Float8Pairs<coding> float8;
  const CodeTable table(t.book, t.zero);
  const I32 zero = I32::set1(t.zero);
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      F32 c0[R * kChains], c1[R * kChains];
      start_floats<R>(t, s, h, c0, c1, kChains);
#pragma GCC unroll 4
      for (int i = 1; i < kChains; i++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) c0[r * kChains + i] = c1[r * kChains + i] = F32::zero();
      const int64_t rows = t.steps / kSteps;
      const uint8_t *w = t.codes + s * rows * 128 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 0; k < rows; k++, w += 128, a += kSteps * 4 * R) {
        const I32 x0 = load_words(w), x1 = load_words(w + kVectorBytes);
        for_each_index<kDecoded>([&](auto i) __attribute__((always_inline)) {
          constexpr int step = pairs ? i.value * kSteps / kDecoded : input_at<bits>(i.value);
          constexpr int chain = i.value % kChains;
          if constexpr (pairs) {
            I32 v0, v1;
            if constexpr (is_float8(coding)) {
              v0 = pair_of<i.value>(x0, float8), v1 = pair_of<i.value>(x1, float8);
            } else {
              const PairTable& values = i.value % 2 ? high : low;
              v0 = value_of(shift_right<4 * i.value>(x0), values), v1 = value_of(shift_right<4 * i.value>(x1), values);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
              const I32 b = broadcast(a + 4 * (step * R + r));
              dot_bf16(c0[r * kChains + chain], v0, b), dot_bf16(c1[r * kChains + chain], v1, b);
            }
          } else {
            const F32 v0 = value_at<coding, i.value>(x0, table, zero), v1 = value_at<coding, i.value>(x1, table, zero);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
              const F32 b = as_float(broadcast(a + 4 * (step * R + r)));
              c0[r * kChains + chain] = fma(v0, b, c0[r * kChains + chain]);
              c1[r * kChains + chain] = fma(v1, b, c1[r * kChains + chain]);
            }
          }
        });
      }
#pragma GCC unroll 4
      for (int i = 1; i < kChains; i++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          c0[r * kChains] = c0[r * kChains] + c0[r * kChains + i];
          c1[r * kChains] = c1[r * kChains] + c1[r * kChains + i];
        }
      const F32 unit = F32::set1(t.unit);
      const int64_t n = s * kTileN + h * kHalfN;
      const FloatSums sums(load_scale(t.scales, t.scale_dtype, n) * unit,
                           load_scale(t.scales, t.scale_dtype, n + F32::lanes) * unit, t.C + h * kHalfN);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sums.add(r, c0[r * kChains], c1[r * kChains]);
    }
}

}  // namespace
}  // namespace llmrt
