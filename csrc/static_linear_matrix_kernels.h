// The statically quantized linear by AMX tile registers, for more rows than memory alone limits.
#pragma once
#include "linear_matrix_kernels.h"
#include "static_linear_kernels.h"

namespace llmrt {
namespace {

inline bool static_by_matrix(int64_t M) { return by_matrix(Compute::int8, M); }
int64_t static_matrix_block_rows(int64_t M) { return static_by_matrix(M) ? kMatrixRows : kBlockRows; }

// As prepare_static_block, but codes are [lines][R][64 inputs].
template <class T>
void prepare_static_lines(const StaticPrepareArgs& a, int64_t m0, int64_t R) {
  constexpr int64_t line = kRegisterRowBytes;
  uint8_t* codes = a.out.codes + m0 * a.tiles * kTileK;
  for (int64_t r = 0; r < R; r++) {
    I32 largest = I32::zero();
    const int32_t total =
        round_row(a, (const T*)a.x + (m0 + r) * a.stride, largest, [&](int64_t tile, const int8_t* from) {
          uint8_t* to = codes + tile * kTileK * R + r * line;
          for (int64_t i = 0; i < kTileK; i += line, to += R * line) memcpy(to, from + i, line);
        });
    finish_row(a, m0 + r, total, largest);
  }
}

void prepare_static_by_matrix(const StaticPrepareArgs& a, int64_t block0, int64_t block1) {
  constexpr PrepareStatic kBlocks[] = {prepare_static_lines<float>, prepare_static_lines<bf16>,
                                       prepare_static_lines<f16>};
  if (!static_by_matrix(a.out.M)) return prepare_static(a, block0, block1);
  prepare_static_blocks(a, kBlocks, block0, block1);
}

// As static_tile; `two`: R > 16. See TileRegisters for the numbers.
template <bool two>
inline void static_matrix_dots(const StaticTileArgs& t, int64_t R) {
  constexpr int64_t line = kRegisterRowBytes;
  __asm__ volatile("" : : : "memory");  // gcc 12 does not know that tileloadd reads memory
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint8_t* a = t.a;
  for (int64_t tile = 0; tile < t.tiles; tile++) {
    const uint8_t* w = t.w + tile * t.tile_bytes;
    for (int64_t i = 0; i < kTileK; i += line, w += line / 4 * 128, a += R * line) {
      _tile_loadd(4, a, line);
      _tile_loadd(6, w, 128);
      _tile_loadd(7, w + 64, 128);
      if constexpr (two) _tile_loadd(5, a + kRegisterRows * line, line);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if constexpr (two) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
  }
  _tile_stored(0, t.dots, 128);
  _tile_stored(1, t.dots + 16, 128);
  if constexpr (two) {
    _tile_stored(2, t.dots + kRegisterRows * kTileN, 128);
    _tile_stored(3, t.dots + kRegisterRows * kTileN + 16, 128);
  }
}

inline void static_matrix_tile(int64_t R, const StaticTileArgs& t) {
  if (R > kRegisterRows)
    static_matrix_dots<true>(t, R);
  else
    static_matrix_dots<false>(t, R);
  for (int64_t r = 0; r < R; r++)
    for (int64_t n = 0; n < kTileN; n += F32::lanes)
      store_words(t.dots + r * kTileN + n, load_words(t.dots + r * kTileN + n) + I32::set1(t.a_sums[r]));
}

// The tile registers have the shape of one number of rows: those of a smaller last block come apart.
void multiply_static_by_matrix(const StaticMultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0,
                               int64_t block1) {
  const Activations& rows = a.linear.activations;
  if (!static_by_matrix(rows.M)) return multiply_static(a, row0, row1, block0, block1);
  const int64_t whole = row0 + (row1 - row0) / rows.block * rows.block;
  if (row0 < whole) {
    const TileRegisters registers(rows.block, kRegisterRowBytes);
    sweep_static(a, row0, whole, block0, block1, static_matrix_tile);
  }
  if (whole < row1) {
    const TileRegisters registers(row1 - whole, kRegisterRowBytes);
    sweep_static(a, whole, row1, block0, block1, static_matrix_tile);
  }
}

constexpr StaticLinearKernels matrix_static_linear_kernels = {static_matrix_block_rows, prepare_static_by_matrix,
                                                              multiply_static_by_matrix};

}  // namespace
}  // namespace llmrt
