// The text form of a weight's layout and the geometry of its packed tiles: the C++ half of ops/formats.py.
#pragma once
#include <string>

#include "tensor.h"

namespace llmrt {

struct Layout {
  int bits = 0, zero = 0;
  bool asymmetric = false;
  int64_t group_size = 0;  // -1: the whole row
  DType scale = DType::f32;
};

inline Layout parse_layout(const std::string& text) {
  struct Row {
    const char* name;
    int bits, zero;
  };
  static constexpr Row kFormats[] = {{"int4", 4, 8}, {"int8", 8, 128}};
  Layout l;
  std::string part[4];
  int parts = 0;
  for (char c : text) {
    if (c == '_' && parts < 3)
      parts++;
    else
      part[parts] += c;
  }
  for (const Row& row : kFormats)
    if (part[0] == row.name) l.bits = row.bits, l.zero = row.zero;
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
  good = good && (part[3] == "f32" || part[3] == "bf16" || part[3] == "f16");
  l.scale = part[3] == "f32" ? DType::f32 : part[3] == "bf16" ? DType::bf16 : DType::f16;
  STD_TORCH_CHECK(good, "layout is '", text, "'; expected the form int4_sym_g128_bf16 or int8_asym_channel_f32");
  return l;
}

struct Geometry {
  int64_t group, groups, padded_group, segment, tiles, code_bytes, scale_bytes, tile_bytes;
  int64_t segments() const { return kTileK / segment; }
};

inline Geometry geometry(const Layout& l, int64_t K) {
  STD_TORCH_CHECK(K >= 1, "in_features is ", K, "; valid: at least 1");
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
  return t == DType::f32 ? ScalarType::Float : t == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
}

}  // namespace llmrt
