// Register tiles over a panel of floats: several packed tiles of 32 outputs, decoded once for all rows of a chunk. Sums
// stay in registers through the panel, whatever groups its inputs are in: where scales change they are multiplied by
// the quotient of the old ones and the new, 1.5 % of the work of 128 inputs, where through memory they would be 5 %.
#pragma once
#include "linear_decode.h"
#include "linear_tiles.h"

namespace llmrt {
namespace {

constexpr int64_t kDepth = 4;       // most tiles of a panel
constexpr int64_t kDeepBlocks = 6;  // row blocks from which on a panel has so many

// Steps of a panel between which scales do not change.
struct Stretches {
  static constexpr int64_t kMost = kDepth * kTileK / 32;
  int64_t count = 0, steps[kMost];
  bool goes_on[kMost];  // the sums go on in the next one, times `factors`; otherwise they are added, times `factors`
  alignas(64) float factors[kMost][kTileN];

  // Tiles from `tile` on; `steps_per_segment` is in dwords of activations.
  Stretches(const PackedWeight& w, const uint8_t* tile, int64_t tiles, int64_t steps_per_segment, float unit) {
    for (int64_t i = 0; i < tiles; i++, tile += w.tile_bytes)
      for (int64_t s = 0; s < kTileK / w.segment; s++) {
        float scales[kTileN];
        for (int64_t n = 0; n < kTileN; n += F32::lanes)
          store(scales + n, load_scale(scales_of(w, tile), w.scale, s * kTileN + n) * F32::set1(unit));
        append(scales, steps_per_segment);
      }
  }

 private:
  // Quotients are taken of scales that are usual numbers, so that no sum is lost or overflows.
  void append(const float* scales, int64_t more) {
    if (count) {
      float* last = factors[count - 1];
      float quotients[kTileN];
      bool same = true, usual = true;
      for (int64_t n = 0; n < kTileN; n++) {
        const float q = last[n] / scales[n], size = q < 0 ? -q : q;
        quotients[n] = q, same &= last[n] == scales[n];
        usual &= (size < 0x1p16f && size > 0x1p-16f) || (last[n] == 0 && size == 0);
      }
      if (same) {
        steps[count - 1] += more;
        return;
      }
      goes_on[count - 1] = usual;
      if (usual) memcpy(last, quotients, sizeof(quotients));
    }
    steps[count] = more, goes_on[count] = false;
    memcpy(factors[count++], scales, kTileN * sizeof(float));
  }
};

// The last two steps of a stretch; done(r) as soon as the sums of row r are complete.
template <int R, bool pairs, class Function>
inline __attribute__((always_inline)) void end_stretch(const uint8_t* w, const uint8_t* a, F32 (&c0)[R], F32 (&c1)[R],
                                                       const Function& done) {
  const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
  const I32 w2 = load_words(w + 128), w3 = load_words(w + 128 + kVectorBytes);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    I32 b = broadcast(a + 4 * r);
    multiply_floats<pairs>(c0[r], w0, b), multiply_floats<pairs>(c1[r], w1, b);
    b = broadcast(a + 4 * (R + r));
    multiply_floats<pairs>(c0[r], w2, b), multiply_floats<pairs>(c1[r], w3, b);
    done(r);
  }
}

// A panel of bf16 pairs or floats.
template <int R, bool pairs>
__attribute__((noinline)) void tile_panel(const TileArgs& t) {
  const Stretches& all = *t.stretches;
  const int64_t count = all.count;
  for (int64_t h = 0; h < kHalves; h++) {
    const uint8_t *w = t.codes + h * 64, *a = t.a;
    float* C = t.C + h * kHalfN;
    for (int64_t i = 0; i < count; i++) {
      F32 c0[R], c1[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) c0[r] = c1[r] = F32::zero();
      while (true) {
        for (int64_t k = all.steps[i]; k > 2; k--, w += 128, a += 4 * R) {
          const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
#pragma GCC unroll 12
          for (int r = 0; r < R; r++) {
            const I32 b = broadcast(a + 4 * r);
            multiply_floats<pairs>(c0[r], w0, b), multiply_floats<pairs>(c1[r], w1, b);
          }
        }
        if (!all.goes_on[i]) break;
        const float* f = all.factors[i] + h * kHalfN;
        const F32 f0 = load(f), f1 = load(f + F32::lanes);
        end_stretch<R, pairs>(w, a, c0, c1,
                              [&](int r) __attribute__((always_inline)) { c0[r] = c0[r] * f0, c1[r] = c1[r] * f1; });
        i++, w += 2 * 128, a += 2 * 4 * R;
      }
      const float* f = all.factors[i] + h * kHalfN;
      const FloatSums sums(load(f), load(f + F32::lanes), C);
      end_stretch<R, pairs>(w, a, c0, c1, [&](int r) __attribute__((always_inline)) { sums.add(r, c0[r], c1[r]); });
      w += 2 * 128, a += 2 * 4 * R;
    }
  }
}

using Tile = void (*)(const TileArgs&);
struct TileTable {
  Tile of[13];  // by R; those above kBlockRows are not called
};
constexpr int at_most_block(int R) { return R < kBlockRows ? R : kBlockRows; }
#define LLMRT_TILE(f, R, ...) f<at_most_block(R), __VA_ARGS__>
#define LLMRT_TILES(f, ...)                                                                                 \
  {                                                                                                         \
    {                                                                                                       \
      nullptr, LLMRT_TILE(f, 1, __VA_ARGS__), LLMRT_TILE(f, 2, __VA_ARGS__), LLMRT_TILE(f, 3, __VA_ARGS__), \
          LLMRT_TILE(f, 4, __VA_ARGS__), LLMRT_TILE(f, 5, __VA_ARGS__), LLMRT_TILE(f, 6, __VA_ARGS__),      \
          LLMRT_TILE(f, 7, __VA_ARGS__), LLMRT_TILE(f, 8, __VA_ARGS__), LLMRT_TILE(f, 9, __VA_ARGS__),      \
          LLMRT_TILE(f, 10, __VA_ARGS__), LLMRT_TILE(f, 11, __VA_ARGS__), LLMRT_TILE(f, 12, __VA_ARGS__)    \
    }                                                                                                       \
  }
// By asymmetry.
constexpr TileTable kNibbles[2] = {LLMRT_TILES(tile_nibbles, false, false), LLMRT_TILES(tile_nibbles, true, false)};
constexpr TileTable kDigits = LLMRT_TILES(tile_nibbles, false, true);
constexpr TileTable kBytes[2] = {LLMRT_TILES(tile_bytes, true, false, true), LLMRT_TILES(tile_bytes, true, true, true)};
// Panels; for int8 by 8-bit codes and asymmetry.
constexpr TileTable kBytePanels[2][2] = {
    {LLMRT_TILES(tile_bytes, false, false, false), LLMRT_TILES(tile_bytes, false, true, false)},
    {LLMRT_TILES(tile_bytes, true, false, false), LLMRT_TILES(tile_bytes, true, true, false)}};
constexpr TileTable kFloatPanels = LLMRT_TILES(tile_panel, false);
// By coding.
constexpr TileTable kFloats[5] = {LLMRT_TILES(tile_codes, false, Coding::nibbles),
                                  LLMRT_TILES(tile_codes, false, Coding::bytes), LLMRT_TILES(tile_codes, false, kBook),
                                  LLMRT_TILES(tile_codes, false, Coding::e4m3),
                                  LLMRT_TILES(tile_codes, false, Coding::e5m2)};
#if defined(__AVX512BF16__)
constexpr TileTable kPairPanels = LLMRT_TILES(tile_panel, true);
constexpr TileTable kPairs[5] = {LLMRT_TILES(tile_codes, true, Coding::nibbles),
                                 LLMRT_TILES(tile_codes, true, Coding::bytes), LLMRT_TILES(tile_codes, true, kBook),
                                 LLMRT_TILES(tile_codes, true, Coding::e4m3),
                                 LLMRT_TILES(tile_codes, true, Coding::e5m2)};
constexpr Expand kExpandPairs[5] = {expand_pairs<Coding::nibbles>, expand_pairs<Coding::bytes>, expand_pairs<kBook>,
                                    expand_pairs<Coding::e4m3>, expand_pairs<Coding::e5m2>};
#else  // never called: see kBf16Products
constexpr TileTable kPairPanels = kFloatPanels;
constexpr TileTable kPairs[5] = {};
constexpr Expand kExpandPairs[5] = {};
#endif
constexpr Expand kExpandFloats[5] = {expand_floats<Coding::nibbles>, expand_floats<Coding::bytes>, expand_floats<kBook>,
                                     expand_floats<Coding::e4m3>, expand_floats<Coding::e5m2>};
constexpr Expand kExpandBytes[2] = {expand_bytes<false>, expand_bytes<true>};  // by whether there is a book
#undef LLMRT_TILES
#undef LLMRT_TILE

}  // namespace
}  // namespace llmrt
