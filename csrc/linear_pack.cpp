// Entry points of pack_weight and unpack_weight: see ops/linear.py for the packed tile.
#include <emmintrin.h>
#include <string.h>
#include <sys/mman.h>

#include <type_traits>
#include <vector>

#include "layout.h"

namespace llmrt {
namespace {

struct PackJob {
  Layout layout;
  Geometry g;
  int64_t N, K;
  int64_t row_bytes;     // of one output's canonical codes
  int64_t padded_bytes;  // of one output's codes in padded positions
  bool padded;           // positions are not the features themselves
};

PackJob job_of(const std::string& layout, int64_t N, int64_t K) {
  PackJob j;
  j.layout = parse_layout(layout), j.g = geometry(j.layout, K), j.N = N, j.K = K;
  j.row_bytes = (K * j.layout.bits + 7) / 8, j.padded_bytes = j.g.tiles * kTileK * j.layout.bits / 8;
  j.padded = j.g.group * j.g.groups != K || j.g.padded_group != j.g.group || j.g.tiles * kTileK != K;
  return j;
}

// `count` codes from position `from` of one row of codes to position `to` of another, whose codes there are 0.
void copy_codes(int bits, const uint8_t* source, int64_t from, uint8_t* target, int64_t to, int64_t count) {
  if (bits == 8) {
    memcpy(target + to, source + from, count);
  } else if (from % 2 == 0 && to % 2 == 0) {
    memcpy(target + to / 2, source + from / 2, count / 2);
    if (count % 2) target[(to + count) / 2] |= source[(from + count) / 2] & 15;
  } else {
    for (int64_t i = 0; i < count; i++) {
      const int code = source[(from + i) / 2] >> ((from + i) % 2 * 4) & 15;
      target[(to + i) / 2] |= code << ((to + i) % 2 * 4);
    }
  }
}

// Calls f(feature, position, count) for every group of a row.
template <class Function>
void for_each_group(const PackJob& j, const Function& f) {
  for (int64_t i = 0; i < j.g.groups; i++) {
    const int64_t k = i * j.g.group;
    f(k, i * j.g.padded_group, j.K - k < j.g.group ? j.K - k : j.g.group);
  }
}

// Canonical order of eight 4-bit codes in a dword, 01234567 from the lowest, to that of the tile, 04152637: its bytes
// have one of the first four in the low nibble and one of the last four in the high one. SSE2 belongs to every x86-64.
inline __m128i swap_bits(__m128i x, int distance, int mask) {
  const __m128i t = _mm_and_si128(_mm_xor_si128(x, _mm_srli_epi32(x, distance)), _mm_set1_epi32(mask));
  return _mm_xor_si128(x, _mm_xor_si128(t, _mm_slli_epi32(t, distance)));
}
inline __m128i zip_nibbles(__m128i x) { return swap_bits(swap_bits(x, 8, 0x0000ff00), 4, 0x00f000f0); }
inline __m128i unzip_nibbles(__m128i x) { return swap_bits(swap_bits(x, 4, 0x00f000f0), 8, 0x0000ff00); }

inline void transpose(__m128i (&x)[4]) {
  const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpackhi_epi32(x[0], x[1]);
  const __m128i c = _mm_unpacklo_epi32(x[2], x[3]), d = _mm_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm_unpacklo_epi64(a, c), x[1] = _mm_unpackhi_epi64(a, c);
  x[2] = _mm_unpacklo_epi64(b, d), x[3] = _mm_unpackhi_epi64(b, d);
}

// The codes of a tile are rows of 32 dwords, one of each output, along the inputs. These move 4 outputs, whose rows of
// codes (in padded positions) are `stride` bytes apart.
template <int bits>
inline void write_columns(const uint8_t* rows, int64_t stride, uint8_t* tile) {
  for (int64_t i = 0; i < kTileK * bits / 32; i += 4) {
    __m128i x[4];
    for (int q = 0; q < 4; q++) {
      x[q] = _mm_loadu_si128((const __m128i*)(rows + q * stride + 4 * i));
      if (bits == 4) x[q] = zip_nibbles(x[q]);
    }
    transpose(x);
    for (int q = 0; q < 4; q++) _mm_storeu_si128((__m128i*)(tile + (i + q) * 4 * kTileN), x[q]);
  }
}
template <int bits>
inline void read_columns(const uint8_t* tile, uint8_t* rows, int64_t stride) {
  for (int64_t i = 0; i < kTileK * bits / 32; i += 4) {
    __m128i x[4];
    for (int q = 0; q < 4; q++) x[q] = _mm_loadu_si128((const __m128i*)(tile + (i + q) * 4 * kTileN));
    transpose(x);
    for (int q = 0; q < 4; q++) {
      if (bits == 4) x[q] = unzip_nibbles(x[q]);
      _mm_storeu_si128((__m128i*)(rows + q * stride + 4 * i), x[q]);
    }
  }
}

// Places of the scales (and zeros) of one block: f(index in [rows][groups], index in a tile's [segments][32], tile).
template <class Function>
void for_each_scale(const PackJob& j, int64_t rows, const Function& f) {
  const int64_t per_group = j.g.padded_group / j.g.segment, segments = j.g.segments();
  for (int64_t s = 0; s < j.g.groups * per_group; s++)
    for (int64_t i = 0; i < rows; i++) f(i * j.g.groups + s / per_group, s % segments * kTileN + i, s / segments);
}

// Scales that are not finite have all bits of the exponent set.
bool finite_scales(const uint8_t* scales, DType t, int64_t count) {
  const uint32_t mask = t == DType::f32 ? 0x7f800000 : t == DType::bf16 ? 0x7f80 : 0x7c00;
  bool good = true;
  if (t == DType::e8m0) {
    for (int64_t i = 0; i < count; i++) good &= scales[i] != 0xff;
  } else if (t == DType::f32) {
    for (int64_t i = 0; i < count; i++) good &= (((const uint32_t*)scales)[i] & mask) != mask;
  } else {
    for (int64_t i = 0; i < count; i++) good &= (((const uint16_t*)scales)[i] & mask) != mask;
  }
  return good;
}

// NaN and infinity of floats of 8 bits: e4m3 has 0x7f of either sign, e5m2 all that have every bit of the exponent set.
bool finite_codes(const uint8_t* codes, Coding c, int64_t count) {
  bool good = true;
  const int first = c == Coding::e4m3 ? 0x7f : 0x7c;
  for (int64_t i = 0; i < count; i++) good &= (codes[i] & 0x7f) < first;
  return good;
}

// Canonical tensors; for unpacking, to be written.
struct Parts {
  uint8_t *codes, *scales, *zeros;
};

// The parts of a block's outputs, and how many of those there are.
struct BlockParts {
  Parts at;
  int64_t rows;
};
BlockParts block_parts(const PackJob& j, const Parts& p, int64_t block) {
  const int64_t n = block * kTileN, group = n * j.g.groups;
  return {{p.codes + n * j.row_bytes, p.scales + group * size_of(j.layout.scale), p.zeros ? p.zeros + group : nullptr},
          j.N - n < kTileN ? j.N - n : kTileN};
}

template <int bits, class Scale>
void pack_block(const PackJob& j, const BlockParts& b, uint8_t* buffer, uint8_t* out) {
  const Geometry& g = j.g;
  const uint8_t* rows = buffer ? buffer : b.at.codes;
  if (buffer) {
    memset(buffer, 0, kTileN * j.padded_bytes);
    for (int64_t i = 0; i < b.rows; i++)
      for_each_group(j, [&](int64_t k, int64_t position, int64_t count) {
        copy_codes(bits, b.at.codes + i * j.row_bytes, k, buffer + i * j.padded_bytes, position, count);
      });
  }
  for (int64_t t = 0; t < g.tiles; t++) {
    uint8_t* tile = out + t * g.tile_bytes;
    for (int64_t i = 0; i < kTileN; i += 4)
      write_columns<bits>(rows + i * j.padded_bytes + t * kTileK * bits / 8, j.padded_bytes, tile + 4 * i);
    memset(tile + g.code_bytes, 0, g.tile_bytes - g.code_bytes);
  }
  const Scale* scales = (const Scale*)b.at.scales;
  for_each_scale(j, b.rows, [&](int64_t from, int64_t to, int64_t t) {
    uint8_t* tail = out + t * g.tile_bytes + g.code_bytes;
    ((Scale*)tail)[to] = scales[from];
    if (b.at.zeros) tail[g.scale_bytes + to] = b.at.zeros[from];
  });
}

template <int bits, class Scale>
void unpack_block(const PackJob& j, const BlockParts& b, uint8_t* buffer, const uint8_t* packed) {
  const Geometry& g = j.g;
  uint8_t* rows = buffer ? buffer : b.at.codes;
  for (int64_t t = 0; t < g.tiles; t++)
    for (int64_t i = 0; i < kTileN; i += 4)
      read_columns<bits>(packed + t * g.tile_bytes + 4 * i, rows + i * j.padded_bytes + t * kTileK * bits / 8,
                         j.padded_bytes);
  if (buffer) {
    memset(b.at.codes, 0, b.rows * j.row_bytes);
    for (int64_t i = 0; i < b.rows; i++)
      for_each_group(j, [&](int64_t k, int64_t position, int64_t count) {
        copy_codes(bits, buffer + i * j.padded_bytes, position, b.at.codes + i * j.row_bytes, k, count);
      });
  }
  Scale* scales = (Scale*)b.at.scales;
  for_each_scale(j, b.rows, [&](int64_t to, int64_t from, int64_t t) {
    const uint8_t* tail = packed + t * g.tile_bytes + g.code_bytes;
    scales[to] = ((const Scale*)tail)[from];
    if (b.at.zeros) b.at.zeros[to] = tail[g.scale_bytes + from];
  });
}

// Calls f(integral_constant of the bits, a scale of the width that the layout has).
template <class Function>
void with_widths(const Layout& l, const Function& f) {
  const bool wide = l.scale == DType::f32;
  if (l.bits == 4)
    wide ? f(std::integral_constant<int, 4>(), uint32_t()) : f(std::integral_constant<int, 4>(), uint16_t());
  else if (l.scale == DType::e8m0)
    f(std::integral_constant<int, 8>(), uint8_t());
  else
    wide ? f(std::integral_constant<int, 8>(), uint32_t()) : f(std::integral_constant<int, 8>(), uint16_t());
}

// Calls f(block, its parts, a buffer) for all blocks, each thread a contiguous range of them. The buffer holds 32 rows
// in padded positions; it is null where the canonical rows are that already.
template <class Function>
void for_each_block(const PackJob& j, const Parts& p, const Function& f) {
  parallel_ranges((j.N + kTileN - 1) / kTileN, 1, [&](int64_t b0, int64_t b1) {
    std::vector<uint8_t> buffer(j.padded || b1 * kTileN > j.N ? kTileN * j.padded_bytes : 0);
    for (int64_t b = b0; b < b1; b++) {
      const BlockParts parts = block_parts(j, p, b);
      f(b, parts, j.padded || parts.rows < kTileN ? buffer.data() : nullptr);
    }
  });
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
  const Parts parts{(uint8_t*)c.const_data_ptr(), (uint8_t*)s.const_data_ptr(),
                    z ? (uint8_t*)z->const_data_ptr() : nullptr};
  STD_TORCH_CHECK(finite_scales(parts.scales, j.layout.scale, s.numel()), "scales has NaN or infinite values");
  if (is_float8(j.layout.format->coding))
    STD_TORCH_CHECK(finite_codes(parts.codes, j.layout.format->coding, c.numel()),
                    "codes has NaN or infinite values of ", j.layout.format->name);
  Tensor out = empty_weight(codes, (j.N + kTileN - 1) / kTileN, j.g.tiles, j.g.tile_bytes);
  uint8_t* o = (uint8_t*)out.mutable_data_ptr();
  with_widths(j.layout, [&](auto bits, auto scale) {
    for_each_block(j, parts, [&](int64_t block, const BlockParts& b, uint8_t* buffer) {
      pack_block<bits, decltype(scale)>(j, b, buffer, o + block * j.g.tiles * j.g.tile_bytes);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> unpack_weight(const Tensor& packed, const std::string& layout, int64_t out_features,
                                                 int64_t in_features) {
  const PackJob j = job_of(layout, out_features, in_features);
  check_dtype(packed, ScalarType::Byte, "packed");
  check_shape(packed, {(out_features + kTileN - 1) / kTileN, j.g.tiles, j.g.tile_bytes}, "packed");
  const Tensor p = dense(packed);
  Tensor codes = empty(p, {out_features, j.row_bytes});
  Tensor scales = torch::stable::new_empty(p, {out_features, j.g.groups}, scalar_type(j.layout.scale));
  Tensor zeros = empty(p, {out_features, j.layout.asymmetric ? j.g.groups : 0});
  const Parts parts{(uint8_t*)codes.mutable_data_ptr(), (uint8_t*)scales.mutable_data_ptr(),
                    j.layout.asymmetric ? (uint8_t*)zeros.mutable_data_ptr() : nullptr};
  const uint8_t* from = (const uint8_t*)p.const_data_ptr();
  with_widths(j.layout, [&](auto bits, auto scale) {
    for_each_block(j, parts, [&](int64_t block, const BlockParts& b, uint8_t* buffer) {
      unpack_block<bits, decltype(scale)>(j, b, buffer, from + block * j.g.tiles * j.g.tile_bytes);
    });
  });
  return {codes, scales, zeros};
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(linear_pack) {
  library.impl("pack_weight", TORCH_BOX(&llmrt::pack_weight));
  library.impl("unpack_weight", TORCH_BOX(&llmrt::unpack_weight));
}
