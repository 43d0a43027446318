// The text form of a weight's layout and the geometry of its packed tiles: the C++ half of ops/formats.py.
#pragma once
#include <string>

#include "tensor.h"

namespace llmrt {

// A row of the table of formats: see ops/formats.py.
struct Format {
  const char* name;
  Coding coding;
  int bits, zero;  // zero: of symmetric integers
  float absmax;    // what the largest magnitude of a group becomes
  float book[16];  // of Coding::book: the values of the codes, and
  int digits;      // round(digits * value) is what int8 products take
};
constexpr Format kFormats[] = {
    {"int4", Coding::nibbles, 4, 8, 7.f, {}, 0},
    {"int8", Coding::bytes, 8, 128, 127.f, {}, 0},
    {"nf4",
     Coding::book,
     4,
     0,
     1.f,
     {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f},
     127},
    {"fp4_e2m1",
     Coding::book,
     4,
     0,
     6.f,
     {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f},
     2},
    {"fp8_e4m3", Coding::e4m3, 8, 0, 448.f, {}, 0},
    {"fp8_e5m2", Coding::e5m2, 8, 0, 57344.f, {}, 0},
};

struct Layout {
  const Format* format = nullptr;
  int bits = 0, zero = 0;
  bool asymmetric = false;
  int64_t group_size = 0;  // -1: the whole row
  DType scale = DType::f32;
};

inline Layout parse_layout(const std::string& text) {
  Layout l;
  std::string part[4], rest = text;  // names of formats may have a '_' too
  for (int i = 3; i > 0; i--) {
    const size_t at = rest.rfind('_');
    if (at == std::string::npos) break;
    part[i] = rest.substr(at + 1), rest.resize(at);
  }
  part[0] = rest;
  for (const Format& row : kFormats)
    if (part[0] == row.name) l.format = &row, l.bits = row.bits, l.zero = row.zero;
  bool good = l.bits && (part[1] == "sym" || part[1] == "asym");
  l.asymmetric = part[1] == "asym";
  if (part[2] == "channel") {
    l.group_size = -1;
  } else {
    good = good && part[2].size() > 1 && part[2].size() <= 8 && part[2][0] == 'g';
    for (size_t i = 1; good && i < part[2].size(); i++) {
      good = part[2][i] >= '0' && part[2][i] <= '9';
      l.group_size = l.group_size * 10 + (part[2][i] - '0');
    }
    good = good && l.group_size >= 8 && l.group_size <= 1 << 20;
  }
  good = good && (part[3] == "f32" || part[3] == "bf16" || part[3] == "f16" || part[3] == "e8m0");
  l.scale = part[3] == "f32"    ? DType::f32
            : part[3] == "bf16" ? DType::bf16
            : part[3] == "f16"  ? DType::f16
                                : DType::e8m0;
  STD_TORCH_CHECK(good, "layout is '", text, "'; expected the form int4_sym_g128_bf16 or int8_asym_channel_f32");
  STD_TORCH_CHECK(!l.asymmetric || is_integer(l.format->coding), "layout is '", text,
                  "': asymmetric is valid for int4 and int8");
  STD_TORCH_CHECK(l.scale != DType::e8m0 || is_float8(l.format->coding), "layout is '", text,
                  "': scales of e8m0 are valid for fp8_e4m3 and fp8_e5m2");
  return l;
}

// Sizes in bytes stay far from the end of 64 bits.
constexpr int64_t kMostFeatures = (int64_t{1} << 31) - 1;

struct Geometry {
  int64_t group, groups, padded_group, segment, tiles, code_bytes, scale_bytes, tile_bytes;
  int64_t segments() const { return kTileK / segment; }
};

inline Geometry geometry(const Layout& l, int64_t K) {
  STD_TORCH_CHECK(K >= 1 && K <= kMostFeatures, "in_features is ", K, "; valid: 1 to ", kMostFeatures);
  Geometry g;
  g.group = l.group_size == -1 || l.group_size > K ? K : l.group_size;
  g.groups = (K + g.group - 1) / g.group;
  const int64_t unit = g.groups == 1 ? kTileK : 32;
  g.padded_group = (g.group + unit - 1) / unit * unit;
  g.segment = g.padded_group % 128 == 0 ? 128 : g.padded_group % 64 == 0 ? 64 : 32;
  g.tiles = (g.groups * g.padded_group + kTileK - 1) / kTileK;
  g.code_bytes = kTileN * kTileK * l.bits / 8;
  g.scale_bytes = g.segments() * kTileN * size_of(l.scale);
  g.tile_bytes = (g.code_bytes + g.scale_bytes + (l.asymmetric ? g.segments() * kTileN : 0) + 63) / 64 * 64;
  return g;
}

inline ScalarType scalar_type(DType t) {
  return t == DType::f32    ? ScalarType::Float
         : t == DType::bf16 ? ScalarType::BFloat16
         : t == DType::f16  ? ScalarType::Half
                            : ScalarType::Float8_e8m0fnu;
}

}  // namespace llmrt
