// The quantized linear by AMX tile registers, for more rows than memory alone limits; fewer rows and float32 take
// linear_kernels.h. The packed bytes and the panels are the same. (torch's cpublas::brgemm has no signed left factor
// with an unsigned right one, as activations and codes are, and is not in torch's stable ABI.)
#pragma once
#include "amx.h"
#include "linear_kernels.h"

namespace llmrt {
namespace {

constexpr int64_t kMatrixRows = 2 * kRegisterRows;  // 2 x 2 accumulators of 16 rows x 16 outputs
constexpr int64_t kVectorRows = 4;  // up to so many, vectors read the nibbles of a weight without a panel

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

// Activations::codes are [segments][lines][R][line bytes] here, and Activations::sums plain sums.
void prepare_by_matrix(const PrepareArgs& a, const PackedWeight& w, int64_t block0, int64_t block1) {
  if (!by_matrix(a.compute, a.out.M)) return prepare_activations(a, w, block0, block1);
  const int64_t segments = w.tiles * kTileK / w.segment, bytes = segment_bytes(w, a.compute), line = line_bytes(bytes);
  alignas(64) uint8_t buffer[2 * kTileK];
  for (int64_t b = block0; b < block1; b++) {
    const int64_t m0 = b * kMatrixRows, R = a.out.M - m0 < kMatrixRows ? a.out.M - m0 : kMatrixRows;
    float* scales = a.out.scales + m0 * segments;
    int32_t* sums = a.out.sums + m0 * segments;
    for (int64_t r = 0; r < R; r++) {
      const void* x = (const char*)a.x + (m0 + r) * a.stride * size_of(a.dtype);
      for (int64_t s = 0; s < segments; s++) {
        const Source source = source_of(a, s * w.segment, w.segment);
        if (a.compute == Compute::int8) {
          scales[s * R + r] = quantize_segment(x, a.dtype, source, w.segment, (int8_t*)buffer, sums[s * R + r]);
        } else {
          for (int64_t i = 0; i < w.segment; i += F32::lanes)
            store((bf16*)buffer + i, load_inputs(x, a.dtype, source, i));
        }
        uint8_t* codes = a.out.codes + (m0 * segments + s * R) * bytes + r * line;
        for (int64_t i = 0; i < bytes; i += line, codes += R * line) memcpy(codes, buffer + i, line);
      }
    }
  }
}

// The dots of a segment, [R][32] dwords; `two`: R > 16. See TileRegisters for the numbers.
template <bool pairs, bool two>
inline void segment_dots(const uint8_t* w, const uint8_t* a, int64_t R, int64_t bytes, int32_t* dots) {
  const int64_t line = line_bytes(bytes);
  _tile_zero(0), _tile_zero(1);
  if (two) _tile_zero(2), _tile_zero(3);
  __asm__ volatile("" : : : "memory");  // gcc 12 does not know that tileloadd reads memory
  for (int64_t i = 0; i < bytes; i += line, w += line / 4 * 128, a += R * line) {
    _tile_loadd(4, a, line), _tile_loadd(6, w, 128), _tile_loadd(7, w + 64, 128);
    if (two) _tile_loadd(5, a + kRegisterRows * line, line);
    if (pairs) {
      _tile_dpbf16ps(0, 4, 6), _tile_dpbf16ps(1, 4, 7);
      if (two) _tile_dpbf16ps(2, 5, 6), _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbsud(0, 4, 6), _tile_dpbsud(1, 4, 7);
      if (two) _tile_dpbsud(2, 5, 6), _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, dots, 128), _tile_stored(1, dots + 16, 128);
  if (two)
    _tile_stored(2, dots + kRegisterRows * kTileN, 128), _tile_stored(3, dots + kRegisterRows * kTileN + 16, 128);
}

// One packed tile of 128 inputs: `zero` of a symmetric weight.
template <bool pairs>
__attribute__((noinline)) void matrix_tile(const TileArgs& t, int64_t R, int zero) {
  alignas(64) int32_t dots[kMatrixRows * kTileN];
  const int64_t bytes = 4 * t.steps;
  for (int64_t s = 0; s < t.segments; s++) {
    const uint8_t *w = t.codes + s * t.steps * 128, *a = t.a + s * bytes * R;
    if (R > kRegisterRows)
      segment_dots<pairs, true>(w, a, R, bytes, dots);
    else
      segment_dots<pairs, false>(w, a, R, bytes, dots);
    for (int64_t n = 0; n < kTileN; n += F32::lanes) {
      const F32 scale = load(t.scales, t.scale_dtype, s * kTileN + n);
      const F32 Z = t.zeros ? to_float(load_bytes(t.zeros + s * kTileN + n)) : F32::set1((float)zero);
      for (int64_t r = 0; r < R; r++) {
        float* C = t.C + r * kTileN + n;
        const F32 before = t.first && s == 0 ? F32::zero() : load(C);
        const I32 d = load_words(dots + r * kTileN + n);
        if (pairs) {
          store(C, fma(as_float(d), scale, before));
        } else {  // dot - zero * sum is exact: all three are below 2^24
          const F32 exact = fma(Z, F32::set1(-(float)t.a_sums[s * R + r]), to_float(d));
          store(C, fma(exact, scale * F32::set1(t.a_scales[s * R + r]), before));
        }
      }
    }
  }
}

// Row blocks of R rows each.
void sweep(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t R, int64_t block0, int64_t block1,
           void* scratch) {
  const PackedWeight& w = a.weight;
  const bool int8 = a.compute == Compute::int8;
  const int64_t bytes = segment_bytes(w, a.compute), segments = kTileK / w.segment, tile_bytes = segments * bytes;
  const TileRegisters registers(R, line_bytes(bytes));
  uint8_t *panel = (uint8_t*)scratch, *unpacked = panel + kTileK * kTileN * 4;
  float* C = (float*)(panel + kPanelBytes);
  TileArgs t;
  t.scale_dtype = w.scale, t.segments = segments, t.steps = bytes / 4;
  for (int64_t block = block0; block < block1; block++) {
    for (int64_t k = 0; k < w.tiles; k++) {
      const uint8_t* tile = w.data + (block * w.tiles + k) * w.tile_bytes;
      t.scales = scales_of(w, tile), t.zeros = w.asymmetric ? zeros_of(w, tile) : nullptr, t.first = k == 0;
      if (!int8) float_panel(w, tile, a.compute, unpacked, panel);
      t.codes = int8 ? byte_panel(w, tile, unpacked) : panel;
      for (int64_t m = row0; m < row1; m += R) {
        const int64_t at = m * w.tiles + k * R;  // tiles of one row of activations
        t.a = a.activations.codes + at * tile_bytes;
        t.a_scales = a.activations.scales + at * segments, t.a_sums = a.activations.sums + at * segments;
        t.C = C + (m - row0) * kTileN;
        if (int8)
          matrix_tile<false>(t, R, w.zero);
        else
          matrix_tile<true>(t, R, w.zero);
      }
    }
    finish(a, row0, row1 - row0, block, C);
  }
}

void multiply_by_matrix(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1,
                        void* scratch) {
  if (!by_matrix(a.compute, a.activations.M)) return multiply(a, row0, row1, block0, block1, scratch);
  const int64_t whole = row0 + (row1 - row0) / kMatrixRows * kMatrixRows;
  if (row0 < whole) sweep(a, row0, whole, kMatrixRows, block0, block1, scratch);
  if (whole < row1) sweep(a, whole, row1, row1 - whole, block0, block1, scratch);
}

constexpr LinearKernels matrix_linear_kernels = {matrix_block_rows, kBf16Products, kPanelBytes, prepare_by_matrix,
                                                 multiply_by_matrix};

}  // namespace
}  // namespace llmrt
