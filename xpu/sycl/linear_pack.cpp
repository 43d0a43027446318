// Packing a canonical weight (ops/linear.py, pack_weight); one work-group per tile of 32 outputs x 128 inputs. Bytes
// that stand for outputs and inputs that do not exist are zeros already. The layout's numbers are arguments, as this
// runs once per weight.
#include "element.hpp"

namespace linear_pack {

struct Shape {
  int64_t outputs, inputs, row_bytes, groups, group, padded_group, segment, bits, scale_bytes;
};

// The code of an output at a position of the padded row, 0 where there is none.
inline uint32_t code_at(const uint8_t* codes, int64_t n, int64_t position, const Shape& s) {
  const int64_t g = position / s.padded_group, within = position % s.padded_group, k = g * s.group + within;
  if (n >= s.outputs || within >= s.group || k >= s.inputs) return 0;
  const uint32_t byte = codes[n * s.row_bytes + k * s.bits / 8];
  return s.bits == 8 ? byte : byte >> k % 2 * 4 & 15;
}

}  // namespace linear_pack

KERNEL(16)
void pack_weight(const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, uint8_t* packed, int64_t outputs,
                 int64_t inputs, int64_t row_bytes, int64_t groups, int64_t group, int64_t padded_group,
                 int64_t segment, int64_t bits, int64_t scale_bytes, int64_t tiles, int64_t tile_bytes) {
  const linear_pack::Shape s{outputs, inputs, row_bytes, groups, group, padded_group, segment, bits, scale_bytes};
  const auto it = item();
  const int64_t tile = it.get_group(2), block = it.get_group(1);
  uint8_t* out = packed + (block * tiles + tile) * tile_bytes;
  const int64_t per_row = 32 / bits;  // inputs in a dword
  for (int64_t i = it.get_local_id(2); i < 128 * bits; i += it.get_local_range(2)) {
    const int64_t row = i / 16, n = block * 32 + row % 2 * 16 + i % 16, first = tile * 128 + row / 2 * per_row;
    uint32_t word = 0;
    for (int b = 0; b < 4; b++) {
      word |= linear_pack::code_at(codes, n, first + b, s) << (8 * b);
      if (bits == 4) word |= linear_pack::code_at(codes, n, first + 4 + b, s) << (8 * b + 4);
    }
    reinterpret_cast<uint32_t*>(out)[i] = word;
  }
  out += 32 * 128 * bits / 8;
  const int64_t values = 128 / segment * 32;
  for (int64_t i = it.get_local_id(2); i < values; i += it.get_local_range(2)) {
    const int64_t n = block * 32 + i % 32, g = (tile * 128 + i / 32 * segment) / padded_group;
    if (n >= outputs || g >= groups) continue;
    for (int64_t b = 0; b < scale_bytes; b++) out[i * scale_bytes + b] = scales[(n * groups + g) * scale_bytes + b];
    if (zeros) out[values * scale_bytes + i] = zeros[n * groups + g];
  }
}
