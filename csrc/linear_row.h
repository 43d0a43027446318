// One row of int8 activations times a packed weight: the product that the memory's speed limits. A block of 32 outputs
// is one sequential stream, swept by one function with the sums in registers: what stands between two cache lines
// decides how many of them the core asks for at once.
#pragma once
#include "linear_decode.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

// The activations of one row: see Activations.
struct RowArgs {
  const uint8_t* codes;
  const float* scales;
  const int32_t* sums;
};

// Sums of one segment for two vectors of outputs. The products of neighbouring rows of codes go to different sums, as
// each waits several clocks for the one before it.
template <int bits>
struct RowSums {
  static constexpr int kChains = 4;
  I32 c0[kChains], c1[kChains];

  template <bool asymmetric>
  void start(const uint8_t* zeros, const int32_t* sum) {
    const I32 s = broadcast(sum);
    c0[0] = c1[0] = s;
    if (asymmetric) c0[0] = dot16(load_bytes(zeros), s), c1[0] = dot16(load_bytes(zeros + F32::lanes), s);
#pragma GCC unroll 4
    for (int i = 1; i < kChains; i++) c0[i] = c1[i] = I32::zero();
  }
  // Row i of codes: of nibbles the low ones meet the first dword, the high ones, still times 16, the second.
  void add(int i, const uint8_t* w, const uint8_t* a) {
    const I32 x0 = load_words(w), x1 = load_words(w + kVectorBytes);
    if (bits == 8) {
      const I32 b = broadcast(a + 4 * i);
      dot<true>(c0[i % kChains], x0, b), dot<true>(c1[i % kChains], x1, b);
    } else {
      const I32 b = broadcast(a + 8 * i), b4 = broadcast(a + 8 * i + 4);
      const int low = i % 2, high = 2 + i % 2;
      dot<false>(c0[low], low_nibbles(x0), b), dot<false>(c1[low], low_nibbles(x1), b);
      dot<false>(c0[high], high_in_place(x0), b4), dot<false>(c1[high], high_in_place(x1), b4);
    }
  }
  static F32 total(const I32 (&c)[kChains]) {
    if (bits == 8) return to_float((c[0] + c[1]) + (c[2] + c[3]));
    return to_float(c[0] + c[1] + shift_right_signed<kHighShift>(c[2] + c[3]));
  }
};

// C [32] = the row times the `tiles` tiles of one block.
template <int bits, bool asymmetric>
__attribute__((noinline)) void row_times_block(const PackedWeight& weight, const uint8_t* tile, const RowArgs& row,
                                               float* C) {
  const PackedWeight w = weight;  // local: what the kernel stores cannot change it
  constexpr int64_t L = F32::lanes;
  constexpr int kDwords = bits == 4 ? 2 : 1, kRows = 4;  // of activations per row of codes; rows of a step
  const int64_t segments = kTileK / w.segment, rows = w.segment / (4 * kDwords);
  const uint8_t* a = row.codes;
  const float* A = row.scales;
  const int32_t* sums = row.sums;
  F32 y[2 * kHalves];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 2 * kHalves; i++) y[i] = F32::zero();
  for (int64_t k = 0; k < w.tiles; k++, tile += w.tile_bytes, A += segments, sums += segments) {
    const uint8_t *scales = scales_of(w, tile), *zeros = zeros_of(w, tile), *codes = tile;
    for (int64_t s = 0; s < segments; s++, a += 4 * kDwords * rows, codes += 128 * rows) {
      const F32 scale = F32::set1(A[s]);
#pragma GCC unroll 2
      for (int64_t h = 0; h < kHalves; h++) {
        const int64_t n = s * kTileN + h * kHalfN;
        RowSums<bits> c;
        c.template start<asymmetric>(zeros + n, sums + s);
        for (int64_t r = 0; r < rows; r += kRows)
#pragma GCC unroll 4
          for (int i = 0; i < kRows; i++) c.add(i, codes + (r + i) * 128 + h * 64, a + 4 * kDwords * r);
        y[2 * h] = fma(c.total(c.c0), load(scales, w.scale, n) * scale, y[2 * h]);
        y[2 * h + 1] = fma(c.total(c.c1), load(scales, w.scale, n + L) * scale, y[2 * h + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 2 * kHalves; i++) store(C + i * L, y[i]);
}

using RowKernel = void (*)(const PackedWeight&, const uint8_t*, const RowArgs&, float*);
// By 8-bit codes and asymmetry.
constexpr RowKernel kRowKernels[2][2] = {{row_times_block<4, false>, row_times_block<4, true>},
                                         {row_times_block<8, false>, row_times_block<8, true>}};

}  // namespace
}  // namespace llmrt
