// Entry points of pack_weight and unpack_weight: see ops/linear.py for the packed tile.
#include <string.h>
#include <sys/mman.h>

#include <vector>

#include "layout.h"

namespace llmrt {
namespace {

// Padded input position -> input feature, or -1 where there is none.
std::vector<int64_t> features_of_positions(const Geometry& g, int64_t K) {
  std::vector<int64_t> map(g.tiles * kTileK, -1);
  for (int64_t k = 0; k < K; k++) map[k / g.group * g.padded_group + k % g.group] = k;
  return map;
}

// Byte of a tile that holds output n (0..31), position k (0..127); 4-bit codes also need the nibble.
inline int64_t byte_of(int bits, int64_t n, int64_t k) {
  const int64_t row = bits == 8 ? k / 4 : k / 8;
  return row * 128 + n / 16 * 64 + n % 16 * 4 + k % 4;
}

struct PackJob {
  Layout layout;
  Geometry g;
  int64_t N, K, row_bytes;  // row_bytes: of one output's canonical codes
  std::vector<int64_t> feature;
};

PackJob job_of(const std::string& layout, int64_t N, int64_t K) {
  PackJob j;
  j.layout = parse_layout(layout), j.g = geometry(j.layout, K), j.N = N, j.K = K;
  j.row_bytes = (K * j.layout.bits + 7) / 8;
  j.feature = features_of_positions(j.g, K);
  return j;
}

// One output's codes, one to a byte in padded positions.
void spread(const PackJob& j, const uint8_t* row, uint8_t* out) {
  for (size_t p = 0; p < j.feature.size(); p++) {
    const int64_t k = j.feature[p];
    out[p] = k < 0 ? 0 : j.layout.bits == 8 ? row[k] : (row[k / 2] >> (k % 2 * 4)) & 15;
  }
}

void pack_block(const PackJob& j, const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros, int64_t block,
                uint8_t* out) {
  const Geometry& g = j.g;
  const int64_t size = size_of(j.layout.scale), per_group = g.padded_group / g.segment;
  std::vector<uint8_t> positions(g.tiles * kTileK);
  memset(out, 0, g.tiles * g.tile_bytes);
  for (int64_t i = 0; i < kTileN && block * kTileN + i < j.N; i++) {
    const int64_t n = block * kTileN + i;
    spread(j, codes + n * j.row_bytes, positions.data());
    for (int64_t t = 0; t < g.tiles; t++) {
      uint8_t* tile = out + t * g.tile_bytes;
      const uint8_t* p = positions.data() + t * kTileK;
      if (j.layout.bits == 8) {
        for (int64_t k = 0; k < kTileK; k += 4) memcpy(tile + byte_of(8, i, k), p + k, 4);
      } else {
        for (int64_t k = 0; k < kTileK; k += 8)
          for (int64_t q = 0; q < 4; q++) tile[byte_of(4, i, k) + q] = p[k + q] | p[k + 4 + q] << 4;
      }
      for (int64_t s = 0; s < g.segments(); s++) {
        const int64_t group = (t * g.segments() + s) / per_group;
        if (group >= g.groups) continue;
        memcpy(tile + g.code_bytes + (s * kTileN + i) * size, scales + (n * g.groups + group) * size, size);
        if (zeros) tile[g.code_bytes + g.scale_bytes + s * kTileN + i] = zeros[n * g.groups + group];
      }
    }
  }
}

bool finite_scales(const void* scales, DType t, int64_t count) {
  bool good = true;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = 0;
    if (t == DType::f32) {
      memcpy(&bits, (const char*)scales + 4 * i, 4);
      good &= (bits & 0x7f800000) != 0x7f800000;
    } else {
      const uint32_t exponent = t == DType::bf16 ? 0x7f80 : 0x7c00;
      memcpy(&bits, (const char*)scales + 2 * i, 2);
      good &= (bits & exponent) != exponent;
    }
  }
  return good;
}

// Weights are read from end to end for every token: 2 MB pages raise the read bandwidth by a tenth and more. Memory of
// the C library's heap may have been touched in small pages before, so large weights get fresh pages of their own.
Tensor empty_weight(const Tensor& like, int64_t blocks, int64_t tiles, int64_t tile_bytes) {
  constexpr int64_t kHuge = 2 << 20, kPage = 4096;
  const int64_t bytes = blocks * tiles * tile_bytes, length = (bytes + kPage - 1) / kPage * kPage;
  if (bytes < kHuge / 2) return empty(like, {blocks, tiles, tile_bytes});
  char* base = (char*)mmap(nullptr, length + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  STD_TORCH_CHECK(base != MAP_FAILED, "out of memory: a packed weight of ", bytes, " bytes");
  char* start = (char*)(((uintptr_t)base + kHuge - 1) / kHuge * kHuge);
  if (start > base) munmap(base, start - base);
  if (start < base + kHuge) munmap(start + length, base + kHuge - start);
  madvise(start, length, MADV_HUGEPAGE);
  return torch::stable::from_blob(start, {blocks, tiles, tile_bytes}, {tiles * tile_bytes, tile_bytes, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                  [length](void* data) { munmap(data, length); });
}

Tensor pack_weight(const Tensor& codes, const Tensor& scales, const OptionalTensor& zeros, const std::string& layout,
                   int64_t in_features) {
  check_dtype(codes, ScalarType::Byte, "codes");
  const PackJob j = job_of(layout, codes.dim() ? codes.size(0) : 0, in_features);
  check_shape(codes, {-1, j.row_bytes}, "codes");
  check_shape(scales, {j.N, j.g.groups}, "scales");
  check_dtype(scales, scalar_type(j.layout.scale), "scales");
  STD_TORCH_CHECK(zeros.has_value() == j.layout.asymmetric, "zeros ", zeros ? "given" : "missing", " for layout ",
                  layout);
  if (zeros) check_dtype(*zeros, ScalarType::Byte, "zeros"), check_shape(*zeros, {j.N, j.g.groups}, "zeros");
  const Tensor c = dense(codes), s = dense(scales);
  const OptionalTensor z = zeros ? OptionalTensor(dense(*zeros)) : OptionalTensor();
  STD_TORCH_CHECK(finite_scales(s.const_data_ptr(), j.layout.scale, s.numel()), "scales has NaN or infinite values");
  const int64_t blocks = (j.N + kTileN - 1) / kTileN, bytes = j.g.tiles * j.g.tile_bytes;
  Tensor out = empty_weight(codes, blocks, j.g.tiles, j.g.tile_bytes);
  uint8_t* o = (uint8_t*)out.mutable_data_ptr();
  const uint8_t *cp = (const uint8_t*)c.const_data_ptr(), *sp = (const uint8_t*)s.const_data_ptr();
  const uint8_t* zp = z ? (const uint8_t*)z->const_data_ptr() : nullptr;
  parallel_ranges(blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; b++) pack_block(j, cp, sp, zp, b, o + b * bytes);
  });
  return out;
}

void unpack_row(const PackJob& j, const uint8_t* packed, int64_t n, uint8_t* codes, uint8_t* scales, uint8_t* zeros) {
  const Geometry& g = j.g;
  const int64_t size = size_of(j.layout.scale), per_group = g.padded_group / g.segment, i = n % kTileN;
  const uint8_t* block = packed + n / kTileN * g.tiles * g.tile_bytes;
  memset(codes, 0, j.row_bytes);
  for (size_t p = 0; p < j.feature.size(); p++) {
    const int64_t k = j.feature[p];
    if (k < 0) continue;
    const uint8_t byte = block[p / kTileK * g.tile_bytes + byte_of(j.layout.bits, i, p % kTileK)];
    if (j.layout.bits == 8)
      codes[k] = byte;
    else
      codes[k / 2] |= (p & 4 ? byte >> 4 : byte & 15) << (k % 2 * 4);
  }
  for (int64_t group = 0; group < g.groups; group++) {
    const int64_t s = group * per_group, at = s % g.segments() * kTileN + i;
    const uint8_t* tail = block + s / g.segments() * g.tile_bytes + g.code_bytes;
    memcpy(scales + group * size, tail + at * size, size);
    if (j.layout.asymmetric) zeros[group] = tail[g.scale_bytes + at];
  }
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight(const Tensor& packed, const std::string& layout, int64_t out_features,
                                                 int64_t in_features) {
  const PackJob j = job_of(layout, out_features, in_features);
  check_dtype(packed, ScalarType::Byte, "packed");
  check_shape(packed, {(out_features + kTileN - 1) / kTileN, j.g.tiles, j.g.tile_bytes}, "packed");
  const Tensor p = dense(packed);
  const int64_t zero_columns = j.layout.asymmetric ? j.g.groups : 0, size = size_of(j.layout.scale);
  Tensor codes = empty(p, {out_features, j.row_bytes});
  Tensor scales = torch::stable::new_empty(p, {out_features, j.g.groups}, scalar_type(j.layout.scale));
  Tensor zeros = empty(p, {out_features, zero_columns});
  uint8_t *c = (uint8_t*)codes.mutable_data_ptr(), *s = (uint8_t*)scales.mutable_data_ptr(),
          *z = (uint8_t*)zeros.mutable_data_ptr();
  parallel_ranges(out_features, 8, [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++)
      unpack_row(j, (const uint8_t*)p.const_data_ptr(), n, c + n * j.row_bytes, s + n * j.g.groups * size,
                 z + n * zero_columns);
  });
  return {codes, scales, zeros};
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(linear_pack) {
  library.impl("pack_weight", TORCH_BOX(&llmrt::pack_weight));
  library.impl("unpack_weight", TORCH_BOX(&llmrt::unpack_weight));
}
