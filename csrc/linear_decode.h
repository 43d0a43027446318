// Packed tiles into panels: what the register tiles multiply. One decode per weight format.
#pragma once
#include "linear.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

inline const uint8_t* scales_of(const PackedWeight& w, const uint8_t* tile) { return tile + w.code_bytes; }
inline const uint8_t* zeros_of(const PackedWeight& w, const uint8_t* tile) {
  return tile + w.code_bytes + w.scale_bytes;
}

// The codes of a tile as unsigned bytes [32 k4][32 n][4 k]: 8-bit tiles are stored so.
inline const uint8_t* byte_panel(const PackedWeight& w, const uint8_t* tile, uint8_t* panel) {
  if (w.bits == 8) return tile;
  for (int64_t k8 = 0; k8 < 16; k8++)
    for (int64_t j = 0; j < 128; j += kVectorBytes) {
      const I32 x = load_words(tile + k8 * 128 + j);
      store_words(panel + 2 * k8 * 128 + j, low_nibbles(x));
      store_words(panel + (2 * k8 + 1) * 128 + j, high_nibbles(x));
    }
  return panel;
}

template <int i>
inline F32 code_value(I32 bytes, I32 zero) {
  return to_float((shift_right<8 * i>(bytes) & I32::set1(255)) - zero);
}

// code - zero, exact in bf16 and float: bf16 pairs [64 k2][32 n][2 k], or floats [128 k][32 n].
inline void float_panel(const PackedWeight& w, const uint8_t* tile, Compute compute, uint8_t* scratch, uint8_t* panel) {
  const uint8_t *bytes = byte_panel(w, tile, scratch), *zeros = zeros_of(w, tile);
  const int64_t steps = w.segment / 4;
  for (int64_t k4 = 0; k4 < kTileK / 4; k4++)
    for (int64_t n = 0; n < kTileN; n += F32::lanes) {
      const I32 zero = w.asymmetric ? load_bytes(zeros + k4 / steps * kTileN + n) : I32::set1(w.zero);
      const I32 x = load_words(bytes + k4 * 128 + 4 * n);
      const F32 v[4] = {code_value<0>(x, zero), code_value<1>(x, zero), code_value<2>(x, zero), code_value<3>(x, zero)};
      if (compute == Compute::bf16) {
        const I32 high = I32::set1((int32_t)0xffff0000);
        store_words(panel + (2 * k4) * 128 + 4 * n, shift_right<16>(bits_of(v[0])) | (bits_of(v[1]) & high));
        store_words(panel + (2 * k4 + 1) * 128 + 4 * n, shift_right<16>(bits_of(v[2])) | (bits_of(v[3]) & high));
      } else {
        for (int i = 0; i < 4; i++) store((float*)(panel + (4 * k4 + i) * 128) + n, v[i]);
      }
    }
}

}  // namespace
}  // namespace llmrt
