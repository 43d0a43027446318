// The statically quantized linear: rounding the activations, and register tiles that keep their sums over all inputs.
#pragma once
#include "linear_kernels.h"
#include "static_linear.h"

namespace llmrt {
namespace {

// Rounds the inputs of one row, tile after tile: calls to(tile, codes) with kTileK codes each. Returns their sum;
// `largest` gets the largest magnitude as bits, so that NaN wins.
template <class T, class Function>
inline int32_t round_row(const StaticPrepareArgs& a, const T* x, I32& largest, const Function& to) {
  constexpr int64_t L = F32::lanes;
  const F32 inverse = F32::set1(1.f / a.scale);
  const I32 offset = I32::set1(a.zero - 128);
  I32 total = I32::zero();
  int32_t beyond = 0;  // the sum of codes of inputs that do not exist
  for (int64_t tile = 0; tile < a.tiles; tile++) {
    alignas(64) int8_t codes[kTileK];
    for (int64_t i = 0; i < kTileK; i += L) {
      const int64_t k = tile * kTileK + i, left = a.K - k;
      if (left <= 0) {
        memset(codes + i, 0, kTileK - i);
        break;
      }
      F32 v = left >= L ? load(x + k) : load(x + k, left);
      if (a.factors) v = v * (left >= L ? load(a.factors + k) : load(a.factors + k, left));
      v = v * inverse;
      largest = max(largest, bits_of(v) & I32::set1(0x7fffffff));
      const I32 q = round_to_int(clamp(v, (float)-a.zero, (float)(255 - a.zero))) + offset;
      store_saturated(codes + i, q);
      total = total + q;
      if (left < L) {
        memset(codes + i + left, 0, L - left);
        beyond = (int32_t)(L - left) * (a.zero - 128);
      }
    }
    to(tile, codes);
  }
  return sum(total) - beyond;
}

// What holds for a whole row: see StaticPrepareArgs.
inline void finish_row(const StaticPrepareArgs& a, int64_t m, int32_t total, I32 largest) {
  a.out.sums[m] = -128 * total;
  a.out.scales[m] = max_of(largest) > 0x7f800000 ? __builtin_nanf("") : a.scale;
}

template <class T>
void prepare_static_block(const StaticPrepareArgs& a, int64_t m0, int64_t R) {
  uint8_t* codes = a.out.codes + m0 * a.tiles * kTileK;
  for (int64_t r = 0; r < R; r++) {
    I32 largest = I32::zero();
    const int32_t total = round_row(
        a, (const T*)a.x + (m0 + r) * a.stride, largest,
        [&](int64_t tile, const int8_t* from) { scatter(from, kTileK / 4, codes + tile * kTileK * R + 4 * r, R); });
    finish_row(a, m0 + r, total, largest);
  }
}

using PrepareStatic = void (*)(const StaticPrepareArgs&, int64_t m0, int64_t R);
inline void prepare_static_blocks(const StaticPrepareArgs& a, const PrepareStatic (&by_dtype)[3], int64_t block0,
                                  int64_t block1) {
  for (int64_t b = block0; b < block1; b++) {
    const int64_t m0 = b * a.out.block, R = a.out.M - m0 < a.out.block ? a.out.M - m0 : a.out.block;
    by_dtype[(int)a.dtype](a, m0, R);
  }
}

void prepare_static(const StaticPrepareArgs& a, int64_t block0, int64_t block1) {
  constexpr PrepareStatic kBlocks[] = {prepare_static_block<float>, prepare_static_block<bf16>,
                                       prepare_static_block<f16>};
  prepare_static_blocks(a, kBlocks, block0, block1);
}

struct StaticTileArgs {
  const uint8_t* w;  // [tiles][tile_bytes]
  int64_t tiles, tile_bytes;
  const uint8_t* a;  // dwords [step][R]
  const int32_t* a_sums;
  int32_t* dots;  // [R][32]
};

// dots = a_sum + the sum of code * activation over all inputs.
template <int R>
__attribute__((noinline)) void static_tile(const StaticTileArgs& arguments) {
  const StaticTileArgs t = arguments;  // local: what the kernel stores cannot change it
  for (int64_t h = 0; h < kHalves; h++) {
    I32 c0[R], c1[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) c0[r] = c1[r] = broadcast(t.a_sums + r);
    const uint8_t* a = t.a;
    for (int64_t tile = 0; tile < t.tiles; tile++) {
      const uint8_t* w = t.w + tile * t.tile_bytes + h * 64;
      for (int64_t k = 0; k < kTileK / 4; k++, w += 128, a += 4 * R) {
        const I32 w0 = load_words(w), w1 = load_words(w + kVectorBytes);
        if (ahead_of(R)) prefetch(w + ahead_of(R)), prefetch(w + ahead_of(R) + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const I32 b = broadcast(a + 4 * r);
          dot<true>(c0[r], w0, b), dot<true>(c1[r], w1, b);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      int32_t* to = t.dots + r * kTileN + h * kHalfN;
      store_words(to, c0[r]), store_words(to + F32::lanes, c1[r]);
    }
  }
}

using StaticTile = void (*)(const StaticTileArgs&);
constexpr StaticTile kStaticTiles[13] = {nullptr,
                                         static_tile<1>,
                                         static_tile<at_most_block(2)>,
                                         static_tile<at_most_block(3)>,
                                         static_tile<at_most_block(4)>,
                                         static_tile<at_most_block(5)>,
                                         static_tile<at_most_block(6)>,
                                         static_tile<at_most_block(7)>,
                                         static_tile<at_most_block(8)>,
                                         static_tile<at_most_block(9)>,
                                         static_tile<at_most_block(10)>,
                                         static_tile<at_most_block(11)>,
                                         static_tile<at_most_block(12)>};

// What the sums of a block of 32 outputs are multiplied by, and what is added to them first: (128 - zero) times the
// sums of the weight.
struct StaticColumns {
  alignas(64) int32_t sums[kTileN];
  const uint8_t* scales;

  StaticColumns(const StaticMultiplyArgs& a, int64_t block) {
    const PackedWeight& w = a.linear.weight;
    for (int64_t j = 0; j < kTileN; j++) {
      const int64_t n = block * kTileN + j;
      sums[j] = n < a.linear.N ? (128 - a.zero) * a.sums[n] : 0;
    }
    scales = w.data + block * w.tiles * w.tile_bytes + w.code_bytes;
  }
};

// The sums become floats, and the output's columns.
inline void finish_static(const StaticMultiplyArgs& a, const StaticColumns& columns, int64_t m, int64_t R,
                          int64_t block, const int32_t* dots) {
  alignas(64) float C[32 * kTileN];
  for (int64_t n = 0; n < kTileN; n += F32::lanes) {
    const F32 scale = load(columns.scales, a.linear.weight.scale, n);
    const I32 own = load_words(columns.sums + n);
    for (int64_t r = 0; r < R; r++) {
      const F32 both = scale * F32::set1(a.linear.activations.scales[m + r]);
      store(C + r * kTileN + n, to_float(load_words(dots + r * kTileN + n) + own) * both);
    }
  }
  kFinish[(int)a.linear.dtype](a.linear, m, R, block, C);
}

// `tile` for every row block of rows row0 .. row1 - 1 and every block of outputs.
template <class TileFunction>
inline void sweep_static(const StaticMultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                         const TileFunction& tile) {
  const PackedWeight& w = a.linear.weight;
  const Activations& rows = a.linear.activations;
  alignas(64) int32_t dots[32 * kTileN];
  for (int64_t n = block0; n < block1; n++) {
    const StaticColumns columns(a, n);
    for (int64_t m = row0; m < row1; m += rows.block) {
      const int64_t R = row1 - m < rows.block ? row1 - m : rows.block;
      prefetch_output(a.linear, m, R, n);
      tile(R, StaticTileArgs{w.data + n * w.tiles * w.tile_bytes, w.tiles, w.tile_bytes,
                             rows.codes + m * w.tiles * kTileK, rows.sums + m, dots});
      finish_static(a, columns, m, R, n, dots);
    }
  }
}

void multiply_static(const StaticMultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  sweep_static(a, row0, row1, block0, block1, [](int64_t R, const StaticTileArgs& t) { kStaticTiles[R](t); });
}

int64_t static_block_rows(int64_t) { return kBlockRows; }

constexpr StaticLinearKernels static_linear_kernels = {static_block_rows, prepare_static, multiply_static};

}  // namespace
}  // namespace llmrt
