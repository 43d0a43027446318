// The loops around the register tiles of the quantized linear, and what happens to the sums.
#pragma once
#include "epilogue_kernels.h"
#include "linear.h"
#include "linear_decode.h"
#include "linear_prepare.h"
#include "linear_row.h"
#include "linear_tiles.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

// out[row0 + r][column of the block] = f(C[r] + bias, C[r] + bias of the gated half, row, column, count) for the
// columns of a block of 32 sums.
template <bool gated, class T, class Function>
inline void finish_columns(const MultiplyArgs& a, int64_t row0, int64_t rows, int64_t block, const float* C,
                           const Function& f) {
  constexpr int64_t L = F32::lanes, columns = gated ? 16 : 32;
  for (int64_t j = 0; j < columns && block * columns + j < a.width; j += L) {
    const int64_t n = block * columns + j, left = a.width - n, wide = block * kTileN + j;
    F32 b0 = F32::zero(), b1 = F32::zero();
    if (a.bias) b0 = load(a.bias, a.bias_dtype, wide, a.N - wide < L ? a.N - wide : L);
    if (a.bias && gated) b1 = load(a.bias, a.bias_dtype, wide + 16, L);
    for (int64_t r = 0; r < rows; r++, C += kTileN) {
      const int64_t i = (row0 + r) * a.width + n;
      const F32 y = load(C + j) + b0, up = gated ? load(C + 16 + j) + b1 : y;
      if (left >= L)
        store((T*)a.out + i, f(y, up, [&] { return load((const T*)a.other + i); }));
      else
        store((T*)a.out + i, f(y, up, [&] { return load((const T*)a.other + i, left); }), left);
    }
    C -= rows * kTileN;
  }
}

// Bias, activation and residual on C [rows][32], then the output's columns of this block of 32 sums.
template <class T>
void finish(const MultiplyArgs& a, int64_t row0, int64_t rows, int64_t block, const float* C) {
  const auto columns = [&](auto f) { finish_columns<false, T>(a, row0, rows, block, C, f); };
  const auto gated = [&](auto f) {
    finish_columns<true, T>(a, row0, rows, block, C, [f](F32 y, F32 up, auto) { return f(y) * up; });
  };
  switch (a.epilogue) {
    case Epilogue::none:
      return columns([](F32 y, F32, auto) { return y; });
    case Epilogue::relu:
      return columns([](F32 y, F32, auto) { return relu(y); });
    case Epilogue::silu:
      return columns([](F32 y, F32, auto) { return silu(y); });
    case Epilogue::gelu:
      return columns([](F32 y, F32, auto) { return gelu(y); });
    case Epilogue::gelu_tanh:
      return columns([](F32 y, F32, auto) { return gelu_tanh(y); });
    case Epilogue::add:
      return columns([](F32 y, F32, auto other) { return y + other(); });
    case Epilogue::mul:
      return columns([](F32 y, F32, auto other) { return y * other(); });
    case Epilogue::silu_mul:
      return gated([](F32 y) { return silu(y); });
    case Epilogue::gelu_mul:
      return gated([](F32 y) { return gelu(y); });
    case Epilogue::gelu_tanh_mul:
      return gated([](F32 y) { return gelu_tanh(y); });
  }
}
using Finish = void (*)(const MultiplyArgs&, int64_t, int64_t, int64_t, const float*);
constexpr Finish kFinish[] = {finish<float>, finish<bf16>, finish<f16>};  // by DType

// The lines of the output and of `other` that `finish` will touch.
inline void prefetch_output(const MultiplyArgs& a, int64_t row0, int64_t rows, int64_t block) {
  const int64_t size = size_of(a.dtype), columns = a.epilogue >= Epilogue::silu_mul ? 16 : 32;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t i = ((row0 + r) * a.width + block * columns) * size;
    for (int64_t j = 0; j < columns * size; j += 64) {
      prefetch_to_write((char*)a.out + i + j);
      if (a.other) prefetch((const char*)a.other + i + j);
    }
  }
}

// How one call decodes and multiplies.
struct Method {
  const Tile* tiles;   // by R
  Expand expand;       // null: the tiles read the weight itself
  bool ahead;          // the next panel is made while this one is used
  int64_t per_dword;   // inputs in a dword of activations
  int64_t prefetched;  // which of the next tiles is prefetched: the first that nothing has read yet
};

inline Method method_of(const MultiplyArgs& a, bool one_block) {
  const PackedWeight& w = a.weight;
  const bool wide = w.bits == 8;
  if (a.compute == Compute::int8) {
    if (one_block) return {(wide ? kBytes : kNibbles)[w.asymmetric].of, nullptr, false, 4, 0};
    return {kBytePanels[wide][w.asymmetric].of, wide ? nullptr : expand_bytes, !wide, 4, wide ? 1 : 2};
  }
  if (a.compute == Compute::bf16) {
    if (one_block) return {kPairs[wide].of, nullptr, false, 2, 0};
    return {kPairPanels.of, kExpandPairs[wide], true, 2, 2};
  }
  if (one_block) return {kFloats[wide].of, nullptr, false, 1, 0};
  return {kFloatPanels.of, kExpandFloats[wide], false, 1, 1};  // two panels of floats would not fit a 32 KB L1
}

constexpr int64_t kPanelBytes = kTileK * kTileN * 4;  // of floats, or two of bf16 pairs or bytes

// Rows row0 .. row1 - 1 times tiles: `multiply` for one panel of 32 outputs after the other.
struct Sweep {
  const MultiplyArgs& a;
  int64_t row0, row1, tile1;  // tile1: the end of the range
  Method method;
  uint8_t* panels;
  float* C;  // [row1 - row0][32]

  const uint8_t* tile_of(int64_t i) const { return a.weight.data + i * a.weight.tile_bytes; }
  uint8_t* panel_of(int64_t i) const { return panels + (method.ahead ? i & 1 : 0) * (kPanelBytes / 2); }

  // Makes a part of the tiles to come ready: `count` rows of codes from `row` on, and lines from `line` on.
  void look_ahead(int64_t i, int64_t row, int64_t count, int64_t line, int64_t lines) const {
    const PackedWeight& w = a.weight;
    const int64_t row1 = row + count < w.code_bytes / 64 ? row + count : w.code_bytes / 64;
    if (method.ahead && i + 1 < tile1 && row < row1) method.expand(w, tile_of(i + 1), row, row1, panel_of(i + 1));
    const uint8_t* next = tile_of(i + method.prefetched) + line * 64;
    if (i + method.prefetched < tile1)
      for (int64_t j = 0; j < lines; j++) __builtin_prefetch(next + j * 64, 0, 2);
  }

  void run(int64_t i, bool first, TileArgs t) const {
    const PackedWeight& w = a.weight;
    const int64_t block = a.activations.block, blocks = (row1 - row0 + block - 1) / block;
    const int64_t n = i / w.tiles, k = i % w.tiles;
    const int64_t row_bytes = w.tiles * kTileK * 4 / method.per_dword;
    const uint8_t* tile = tile_of(i);
    if (method.expand && (!method.ahead || first)) method.expand(w, tile, 0, w.code_bytes / 64, panel_of(i));
    t.codes = method.expand ? panel_of(i) : tile;
    t.scales = scales_of(w, tile), t.zeros = zeros_of(w, tile);
    const int64_t rows = (w.code_bytes / 64 + blocks - 1) / blocks, lines = (w.tile_bytes / 64 + blocks - 1) / blocks;
    for (int64_t b = 0, m = row0; b < blocks; b++, m += block) {
      const int64_t R = row1 - m < block ? row1 - m : block;
      if (method.prefetched) look_ahead(i, b * rows, rows, b * lines, lines);
      t.a = a.activations.codes + m * row_bytes + k * kTileK * 4 / method.per_dword * R;
      const int64_t at = (m * w.tiles + k * R) * t.segments;
      t.a_scales = a.activations.scales + at, t.a_sums = a.activations.sums + at;
      t.C = C + (m - row0) * kTileN;
      if (k == 0) memset(t.C, 0, R * kTileN * sizeof(float));
      if (k == w.tiles - 1) prefetch_output(a, m, R, n);
      t.R = R;
      method.tiles[R](t);
      if (k == w.tiles - 1) kFinish[(int)a.dtype](a, m, R, n, t.C);
    }
  }
};

void multiply_by(const Method& method, const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0,
                 int64_t block1, void* scratch) {
  const PackedWeight& w = a.weight;
  uint8_t* panels = (uint8_t*)scratch;
  const Sweep sweep{a, row0, row1, block1 * w.tiles, method, panels, (float*)(panels + kPanelBytes)};
  TileArgs t;
  t.scale_dtype = w.scale, t.asymmetric = w.asymmetric, t.zero = constant_zero(w);
  t.segments = kTileK / w.segment, t.steps = w.segment / method.per_dword;
  for (int64_t i = block0 * w.tiles; i < block1 * w.tiles; i++) sweep.run(i, i == block0 * w.tiles, t);
}

// Row `m` times blocks block0 .. block1 - 1.
void multiply_row(const MultiplyArgs& a, int64_t m, int64_t block0, int64_t block1) {
  const PackedWeight& w = a.weight;
  const RowArgs row = {a.activations.codes + m * w.tiles * kTileK,
                       a.activations.scales + m * w.tiles * (kTileK / w.segment),
                       a.activations.sums + m * w.tiles * (kTileK / w.segment)};
  const RowKernel kernel = kRowKernels[w.bits == 8][w.asymmetric];
  alignas(64) float C[kTileN];
  for (int64_t n = block0; n < block1; n++) {
    prefetch_output(a, m, 1, n);
    kernel(w, w.data + n * w.tiles * w.tile_bytes, row, C);
    kFinish[(int)a.dtype](a, m, 1, n, C);
  }
}

void multiply(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1, void* scratch) {
  if (a.compute == Compute::int8 && row1 - row0 == 1) return multiply_row(a, row0, block0, block1);
  multiply_by(method_of(a, row1 - row0 <= a.activations.block), a, row0, row1, block0, block1, scratch);
}

int64_t block_rows(Compute, int64_t) { return kBlockRows; }

constexpr LinearKernels linear_kernels = {block_rows, kBf16Products, kPanelBytes, prepare_activations, multiply};

}  // namespace
}  // namespace llmrt
