// Register tiles of the quantized linear: R rows x 32 outputs x one packed tile of 128 inputs, and the loops around
// them.
#pragma once
#include "epilogue_kernels.h"
#include "linear.h"
#include "linear_decode.h"
#include "linear_prepare.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

struct TileArgs {
  const uint8_t* codes;  // a panel, or for the packed tiles the weight itself
  const uint8_t* a;      // dwords [step][R]
  const float* a_scales;
  const int32_t* a_sums;
  const uint8_t *scales, *zeros;
  DType scale_dtype;
  int64_t segments, steps;  // of this tile; steps (rows of dwords) per segment
  float* C;                 // [R][32], += unless first
  bool first;
};

// C += scale * (a_scale * dots); asymmetric weights still owe the zero point times the sum of the activations.
template <int R, bool asymmetric>
inline __attribute__((always_inline)) void add_segment(const TileArgs& t, int64_t s, int64_t h, I32 (&c0)[R],
                                                       I32 (&c1)[R]) {
  constexpr int64_t L = F32::lanes;
  const int64_t n = s * kTileN + h * kHalfN;
  const F32 s0 = load(t.scales, t.scale_dtype, n), s1 = load(t.scales, t.scale_dtype, n + L);
  F32 z0, z1;
  if (asymmetric) z0 = to_float(load_bytes(t.zeros + n)) * s0, z1 = to_float(load_bytes(t.zeros + n + L)) * s1;
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const float scale = t.a_scales[s * R + r];
    const F32 A = F32::set1(scale);
    float* C = t.C + r * kTileN + h * kHalfN;
    const bool start = t.first && s == 0;
    F32 y0 = start ? F32::zero() : load(C), y1 = start ? F32::zero() : load(C + L);
    y0 = fma(to_float(c0[r]), s0 * A, y0), y1 = fma(to_float(c1[r]), s1 * A, y1);
    if (asymmetric) {
      const F32 B = F32::set1(-scale * (float)t.a_sums[s * R + r]);
      y0 = fma(z0, B, y0), y1 = fma(z1, B, y1);
    }
    store(C, y0), store(C + L, y1);
  }
}

template <int R, bool asymmetric>
inline __attribute__((always_inline)) void start_segment(const TileArgs& t, int64_t s, I32 (&c0)[R], I32 (&c1)[R]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) c0[r] = c1[r] = asymmetric ? I32::zero() : I32::set1(t.a_sums[s * R + r]);
}

// Codes as bytes, [k4][32 n][4 k].
template <int R, bool wide, bool asymmetric>
__attribute__((noinline)) void tile_bytes(const TileArgs& t) {
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      I32 c0[R], c1[R];
      start_segment<R, asymmetric>(t, s, c0, c1);
      const uint8_t *w = t.codes + s * t.steps * 128 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 0; k < t.steps; k++, w += 128, a += 4 * R) {
        const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          dot<wide>(c0[r], w0, b), dot<wide>(c1[r], w1, b);
        }
      }
      add_segment<R, asymmetric>(t, s, h, c0, c1);
    }
}

// Codes as packed nibbles, split in registers: for one row block there is no panel to share.
template <int R, bool wide, bool asymmetric>
__attribute__((noinline)) void tile_nibbles(const TileArgs& t) {
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      I32 c0[R], c1[R], d0[R], d1[R];  // d: a second chain, only where R = 1 leaves too few
      start_segment<R, asymmetric>(t, s, c0, c1);
      if (R == 1) d0[0] = d1[0] = I32::zero();
      const uint8_t *w = t.codes + s * t.steps * 64 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 0; k < t.steps; k += 2, w += 128, a += 8 * R) {
        const I32 x0 = load_words(w), x1 = load_words(w + kVectorBytes);
        const I32 low0 = low_nibbles(x0), low1 = low_nibbles(x1), high0 = high_nibbles(x0), high1 = high_nibbles(x1);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          dot<false>(c0[r], low0, b), dot<false>(c1[r], low1, b);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * (R + r));
          dot<false>(R == 1 ? d0[r] : c0[r], high0, b), dot<false>(R == 1 ? d1[r] : c1[r], high1, b);
        }
      }
      if (R == 1) c0[0] = c0[0] + d0[0], c1[0] = c1[0] + d1[0];
      add_segment<R, asymmetric>(t, s, h, c0, c1);
    }
}

// Codes as bf16 pairs or floats.
template <int R, bool pairs, bool>
__attribute__((noinline)) void tile_floats(const TileArgs& t) {
  constexpr int64_t L = F32::lanes;
  for (int64_t h = 0; h < kHalves; h++)
    for (int64_t s = 0; s < t.segments; s++) {
      F32 c0[R], c1[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) c0[r] = c1[r] = F32::zero();
      const uint8_t *w = t.codes + s * t.steps * 128 + h * 64, *a = t.a + s * t.steps * 4 * R;
      for (int64_t k = 0; k < t.steps; k++, w += 128, a += 4 * R) {
        const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          if (pairs) {
            dot_bf16(c0[r], w0, b), dot_bf16(c1[r], w1, b);
          } else {
            c0[r] = fma(as_float(w0), as_float(b), c0[r]), c1[r] = fma(as_float(w1), as_float(b), c1[r]);
          }
        }
      }
      const int64_t n = s * kTileN + h * kHalfN;
      const F32 s0 = load(t.scales, t.scale_dtype, n), s1 = load(t.scales, t.scale_dtype, n + L);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        float* C = t.C + r * kTileN + h * kHalfN;
        const bool start = t.first && s == 0;
        store(C, fma(c0[r], s0, start ? F32::zero() : load(C)));
        store(C + L, fma(c1[r], s1, start ? F32::zero() : load(C + L)));
      }
    }
}

using Tile = void (*)(const TileArgs&);
struct TileTable {
  Tile of[13];  // by R; those above kBlockRows are not called
};
constexpr int at_most_block(int R) { return R < kBlockRows ? R : kBlockRows; }
#define LLMRT_TILE(f, R, x, y) f<at_most_block(R), x, y>
#define LLMRT_TILES(f, x, y)                                                                                   \
  {                                                                                                            \
    {                                                                                                          \
      nullptr, LLMRT_TILE(f, 1, x, y), LLMRT_TILE(f, 2, x, y), LLMRT_TILE(f, 3, x, y), LLMRT_TILE(f, 4, x, y), \
          LLMRT_TILE(f, 5, x, y), LLMRT_TILE(f, 6, x, y), LLMRT_TILE(f, 7, x, y), LLMRT_TILE(f, 8, x, y),      \
          LLMRT_TILE(f, 9, x, y), LLMRT_TILE(f, 10, x, y), LLMRT_TILE(f, 11, x, y), LLMRT_TILE(f, 12, x, y)    \
    }                                                                                                          \
  }
constexpr TileTable kBytes[2][2] = {{LLMRT_TILES(tile_bytes, false, false), LLMRT_TILES(tile_bytes, false, true)},
                                    {LLMRT_TILES(tile_bytes, true, false), LLMRT_TILES(tile_bytes, true, true)}};
constexpr TileTable kNibbles[2] = {LLMRT_TILES(tile_nibbles, false, false), LLMRT_TILES(tile_nibbles, false, true)};
constexpr TileTable kFloats = LLMRT_TILES(tile_floats, false, false);
#if defined(__AVX512BF16__)
constexpr TileTable kPairs = LLMRT_TILES(tile_floats, true, false);
#else
constexpr TileTable kPairs = kFloats;  // never called: see kBf16Products
#endif
#undef LLMRT_TILES
#undef LLMRT_TILE

// Bias, activation and residual on C [rows][32], then the output's columns of this block of 32 outputs.
void finish(const MultiplyArgs& a, int64_t row0, int64_t rows, int64_t block, const float* C) {
  constexpr int64_t L = F32::lanes;
  const bool gated = a.epilogue >= Epilogue::silu_mul;
  const int64_t columns = gated ? 16 : 32, n0 = block * columns;
  for (int64_t j = 0; j < columns && n0 + j < a.width; j += L) {
    const int64_t n = n0 + j, count = a.width - n < L ? a.width - n : L, wide = block * kTileN + j;
    F32 b0 = F32::zero(), b1 = F32::zero();
    if (a.bias) b0 = load(a.bias, a.bias_dtype, wide, a.N - wide < L ? a.N - wide : L);
    if (a.bias && gated) b1 = load(a.bias, a.bias_dtype, wide + 16, L);
    for (int64_t r = 0; r < rows; r++) {
      F32 y = activate(load(C + r * kTileN + j) + b0, a.epilogue);
      const int64_t i = (row0 + r) * a.width + n;
      if (gated) y = y * (load(C + r * kTileN + 16 + j) + b1);
      if (a.epilogue == Epilogue::add) y = y + load(a.other, a.dtype, i, count);
      if (a.epilogue == Epilogue::mul) y = y * load(a.other, a.dtype, i, count);
      if (count == L)
        store(a.out, a.dtype, i, y);
      else
        store(a.out, a.dtype, i, y, count);
    }
  }
}

constexpr int64_t kPanelBytes = kTileK * kTileN * 4 + kTileK * kTileN;  // floats, and the bytes they are made of

void multiply(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1, void* scratch) {
  const PackedWeight& w = a.weight;
  const bool int8 = a.compute == Compute::int8, one_block = row1 - row0 <= kBlockRows;
  const int64_t per_dword = int8 ? 4 : a.compute == Compute::bf16 ? 2 : 1;
  const int64_t row_bytes = w.tiles * kTileK * 4 / per_dword, segments = kTileK / w.segment;
  const bool nibbles = int8 && w.bits == 4 && one_block;
  const TileTable& table = !int8     ? (a.compute == Compute::bf16 ? kPairs : kFloats)
                           : nibbles ? kNibbles[w.asymmetric]
                                     : kBytes[w.bits == 8][w.asymmetric];
  uint8_t *panel = (uint8_t*)scratch, *bytes = panel + kTileK * kTileN * 4;
  float* C = (float*)(panel + kPanelBytes);
  TileArgs t;
  t.scale_dtype = w.scale, t.segments = segments, t.steps = w.segment / per_dword;
  for (int64_t block = block0; block < block1; block++) {
    for (int64_t k = 0; k < w.tiles; k++) {
      const uint8_t* tile = w.data + (block * w.tiles + k) * w.tile_bytes;
      t.scales = scales_of(w, tile), t.zeros = zeros_of(w, tile), t.first = k == 0;
      if (!int8) float_panel(w, tile, a.compute, bytes, panel);
      t.codes = !int8 ? panel : nibbles ? tile : byte_panel(w, tile, bytes);
      for (int64_t m = row0; m < row1; m += kBlockRows) {
        const int64_t R = row1 - m < kBlockRows ? row1 - m : kBlockRows;
        t.a = a.activations.codes + m * row_bytes + k * kTileK * 4 / per_dword * R;
        const int64_t at = m * w.tiles * segments + k * segments * R;
        t.a_scales = a.activations.scales + at, t.a_sums = a.activations.sums + at;
        t.C = C + (m - row0) * kTileN;
        table.of[R](t);
      }
    }
    finish(a, row0, row1 - row0, block, C);
  }
}

int64_t block_rows(Compute, int64_t) { return kBlockRows; }

constexpr LinearKernels linear_kernels = {block_rows, kBf16Products, kPanelBytes, prepare_activations, multiply};

}  // namespace
}  // namespace llmrt
