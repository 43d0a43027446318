// The quantized linear by AMX tile registers, for more rows than memory alone limits; fewer rows and float32 take the
// register tiles of linear_tiles.h. Packed bytes, panels and the loops around them are the same. (torch's
// cpublas::brgemm has no signed left factor with an unsigned right one, as activations and codes are, and is not in
// torch's stable ABI.)
#pragma once
#include "amx.h"
#include "linear_kernels.h"

namespace llmrt {
namespace {

constexpr int64_t kMatrixRows = 2 * kRegisterRows;  // 2 x 2 accumulators of 16 rows x 16 outputs
constexpr int64_t kVectorRows = 4;                  // up to so many, vectors read a weight without a panel

inline bool by_matrix(Compute compute, int64_t M) {
  return M > kVectorRows && (compute == Compute::int8 || (compute == Compute::bf16 && kBf16Products));
}
int64_t matrix_block_rows(Compute compute, int64_t M) { return by_matrix(compute, M) ? kMatrixRows : kBlockRows; }

// Bytes of a segment's activations, and of them those that a row of a tile register takes.
inline int64_t segment_bytes(const PackedWeight& w, Compute compute) {
  return compute == Compute::int8 ? w.segment : 2 * w.segment;
}
inline int64_t line_bytes(int64_t segment_bytes) {
  return segment_bytes < kRegisterRowBytes ? segment_bytes : kRegisterRowBytes;
}

// As prepare_block, but codes are [segments][lines][R][line bytes].
template <class T>
void prepare_lines(const PrepareArgs& a, const PackedWeight& w, int64_t m0, int64_t R) {
  const int64_t segments = w.tiles * kTileK / w.segment, bytes = segment_bytes(w, a.compute), line = line_bytes(bytes);
  for (int64_t r = 0; r < R; r++) {
    const T* x = (const T*)a.x + (m0 + r) * a.stride;
    for (int64_t s = 0; s < segments; s++) {
      alignas(64) uint8_t codes[2 * kTileK];
      const int64_t at = m0 * segments + s * R;
      const SegmentRows<T> row{a, w, s, codes, a.out.scales + at + r, a.out.sums + at + r};
      if (a.compute == Compute::int8)
        row.int8_row(x, 0);
      else
        row.float_row(x, 0);
      uint8_t* to = a.out.codes + at * bytes + r * line;
      for (int64_t i = 0; i < bytes; i += line, to += R * line) memcpy(to, codes + i, line);
    }
  }
}

void prepare_by_matrix(const PrepareArgs& a, const PackedWeight& w, int64_t block0, int64_t block1) {
  if (!by_matrix(a.compute, a.out.M)) return prepare_activations(a, w, block0, block1);
  for (int64_t b = block0; b < block1; b++) {
    const int64_t m0 = b * a.out.block, R = a.out.M - m0 < a.out.block ? a.out.M - m0 : a.out.block;
    if (a.dtype == DType::f32) prepare_lines<float>(a, w, m0, R);
    if (a.dtype == DType::bf16) prepare_lines<bf16>(a, w, m0, R);
    if (a.dtype == DType::f16) prepare_lines<f16>(a, w, m0, R);
  }
}

// The dots of a segment, [R][32] dwords; `two`: R > 16. See TileRegisters for the numbers. (gcc's tile intrinsics are
// statements, no expressions.)
template <bool pairs, bool two>
inline void segment_dots(const uint8_t* w, const uint8_t* a, int64_t R, int64_t bytes, int32_t* dots) {
  const int64_t line = line_bytes(bytes);
  __asm__ volatile("" : : : "memory");  // gcc 12 does not know that tileloadd reads memory
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < bytes; i += line, w += line / 4 * 128, a += R * line) {
    _tile_loadd(4, a, line);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    if constexpr (two) _tile_loadd(5, a + kRegisterRows * line, line);
    if constexpr (pairs) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (two && pairs) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else if constexpr (two) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, dots, 128);
  _tile_stored(1, dots + 16, 128);
  if constexpr (two) {
    _tile_stored(2, dots + kRegisterRows * kTileN, 128);
    _tile_stored(3, dots + kRegisterRows * kTileN + 16, 128);
  }
}

// C += scale * (a_scale * (dots - zero * sum)), as start_segment and SegmentSums have it, with the same bits; for
// pairs, whose zero points the panel has taken off, C += scale * dots.
template <bool pairs>
inline void add_dots(const TileArgs& t, int64_t s, const int32_t* dots) {
  for (int64_t n = 0; n < kTileN; n += F32::lanes) {
    const F32 scale = load_scale(t.scales, t.scale_dtype, s * kTileN + n) * F32::set1(t.unit);
    const I32 zero = t.asymmetric ? load_bytes(t.zeros + s * kTileN + n) : I32::zero();
    for (int64_t r = 0; r < t.R; r++) {
      float* C = t.C + r * kTileN + n;
      const I32 d = load_words(dots + r * kTileN + n), sum = I32::set1(t.a_sums[s * t.R + r]);
      const F32 a_scale = F32::set1(t.a_scales[s * t.R + r]);
      if (pairs)
        store(C, fma(as_float(d), scale, load(C)));
      else
        store(C, fma(to_float(d + (t.asymmetric ? dot16(zero, sum) : sum)), scale * a_scale, load(C)));
    }
  }
}

template <bool pairs>
__attribute__((noinline)) void tile_matrix(const TileArgs& t) {
  alignas(64) int32_t dots[kMatrixRows * kTileN];
  const int64_t bytes = 4 * t.steps;
  for (int64_t s = 0; s < t.segments; s++) {
    const uint8_t *w = t.codes + s * t.steps * 128, *a = t.a + s * bytes * t.R;
    if (t.R > kRegisterRows)
      segment_dots<pairs, true>(w, a, t.R, bytes, dots);
    else
      segment_dots<pairs, false>(w, a, t.R, bytes, dots);
    add_dots<pairs>(t, s, dots);
  }
}

struct MatrixTiles {
  Tile of[kMatrixRows + 1];
};
constexpr MatrixTiles same_for_all(Tile tile) {
  MatrixTiles tiles{};
  for (Tile& t : tiles.of) t = tile;
  return tiles;
}
constexpr MatrixTiles kMatrixBytes = same_for_all(tile_matrix<false>), kMatrixPairs = same_for_all(tile_matrix<true>);

inline Method matrix_method_of(const MultiplyArgs& a) {
  const bool wide = a.weight.bits == 8, book = a.weight.coding == Coding::book;
  if (a.compute == Compute::int8) return {kMatrixBytes.of, wide ? nullptr : kExpandBytes[book], !wide, 4, wide ? 1 : 2};
  return {kMatrixPairs.of, kExpandPairs[(int)a.weight.coding], true, 2, 2};
}

// The tile registers have the shape of one number of rows: those of a smaller last block come apart.
void multiply_by_matrix(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                        void* scratch) {
  if (!by_matrix(a.compute, a.activations.M)) return multiply(a, row0, row1, block0, block1, scratch);
  const int64_t R = a.activations.block, whole = row0 + (row1 - row0) / R * R;
  const int64_t line = line_bytes(segment_bytes(a.weight, a.compute));
  const Method method = matrix_method_of(a);
  if (row0 < whole) {
    const TileRegisters registers(R, line);
    multiply_by(method, a, row0, whole, block0, block1, scratch);
  }
  if (whole < row1) {
    const TileRegisters registers(row1 - whole, line);
    multiply_by(method, a, whole, row1, block0, block1, scratch);
  }
}

constexpr LinearKernels matrix_linear_kernels = {matrix_block_rows, kBf16Products, kPanelBytes, prepare_by_matrix,
                                                 multiply_by_matrix};

}  // namespace
}  // namespace llmrt
