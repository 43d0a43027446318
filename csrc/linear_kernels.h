// The loops around the register tiles of the quantized linear, and what happens to the sums.
#pragma once
#include "epilogue_kernels.h"
#include "linear.h"
#include "linear_decode.h"
#include "linear_panels.h"
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
  int64_t prefetched;  // which of the next panels is prefetched: the first that nothing has read yet
  int64_t depth = 1;   // tiles of a panel
};

inline Method method_of(const MultiplyArgs& a, int64_t rows) {
  const int64_t row_blocks = (rows + a.activations.block - 1) / a.activations.block;
  const bool one_block = row_blocks == 1;
  const PackedWeight& w = a.weight;
  const bool wide = w.bits == 8, book = w.coding == Coding::book;
  const int coding = (int)w.coding;
  if (a.compute == Compute::int8) {
    if (one_block && book) return {kDigits.of, nullptr, false, 4, 0};
    if (one_block) return {(wide ? kBytes : kNibbles)[w.asymmetric].of, nullptr, false, 4, 0};
    return {kBytePanels[wide || book][w.asymmetric].of, wide ? nullptr : kExpandBytes[book], !wide, 4, wide ? 1 : 2};
  }
  if (a.compute == Compute::bf16) {
    // Without a panel, codes of bytes are two products each.
    const bool twice = w.coding == Coding::bytes && rows >= 8;
    if (one_block && !twice) return {kPairs[coding].of, nullptr, false, 2, 0};
    // A panel that few row blocks read shall not leave the L1 in between.
    return {kPairPanels.of, kExpandPairs[coding], true, 2, 2, row_blocks < kDeepBlocks ? 1 : kDepth};
  }
  if (one_block) return {kFloats[coding].of, nullptr, false, 1, 0};
  return {kFloatPanels.of, kExpandFloats[coding], false, 1, 1};  // two panels of floats would not fit a 32 KB L1
}

constexpr int64_t kFloatPanelBytes = kTileK * kTileN * 4, kPairPanelBytes = kTileK * kTileN * 2;  // of one tile
constexpr int64_t kPanelBytes = kBf16Products ? 2 * kDepth * kPairPanelBytes : kFloatPanelBytes;

// A number of tiles of one block of outputs.
struct Panel {
  int64_t block, k, count;  // k: its first tile in the block
  const uint8_t* tile;      // null after the last panel
};

// All panels of blocks block0 .. block1 - 1, one after another.
class Panels {
 public:
  Panels(const PackedWeight& w, int64_t depth, int64_t block0, int64_t block1)
      : w_(w), depth_(depth), end_(block1), block_(block0) {}
  Panel next() {
    if (block_ == end_) return {};
    const int64_t left = w_.tiles - k_;
    const Panel panel{block_, k_, left < depth_ ? left : depth_, w_.data + (block_ * w_.tiles + k_) * w_.tile_bytes};
    k_ += panel.count;
    if (k_ == w_.tiles) k_ = 0, block_++;
    return panel;
  }

 private:
  const PackedWeight& w_;
  int64_t depth_, end_, block_, k_ = 0;
};

// Rows row0 .. row1 - 1 times panels.
struct Sweep {
  const MultiplyArgs& a;
  int64_t row0, row1;
  Method method;
  uint8_t* panels;
  float* C;  // [row1 - row0][32]

  int64_t code_rows = a.weight.code_bytes / 64;            // of a tile
  int64_t tile_row_bytes = kTileK * 4 / method.per_dword;  // of prepared activations

  // Decodes rows of codes of a panel, counted through its tiles.
  void expand(const Panel& panel, int64_t begin, int64_t end, uint8_t* to) const {
    const uint8_t* tile = panel.tile;
    if (end > panel.count * code_rows) end = panel.count * code_rows;
    for (int64_t row = 0; row < end; row += code_rows) {  // the tile's first
      const int64_t from = begin > row ? begin - row : 0, most = end - row < code_rows ? end - row : code_rows;
      if (from < most) method.expand(a.weight, tile, from, most, to);
      tile += a.weight.tile_bytes, to += tile_row_bytes * kTileN;
    }
  }

  // What each row block does for the panels to come: rows of codes of the next one to decode, lines of a later one to
  // prefetch.
  struct Ahead {
    Panel next;
    uint8_t* to;
    int64_t rows;
    const uint8_t* far;
    int64_t lines, end;  // of all row blocks together
  };
  Ahead ahead_of(const Panel& next, const Panel& far, uint8_t* to, int64_t blocks) const {
    Ahead ahead{next, to, 0, far.tile, 0, 0};
    if (method.ahead && next.tile) ahead.rows = (next.count * code_rows + blocks - 1) / blocks;
    if (method.prefetched && far.tile) {
      ahead.end = far.count * a.weight.tile_bytes / 64;
      ahead.lines = (ahead.end + blocks - 1) / blocks;
    }
    return ahead;
  }
  void look_ahead(const Ahead& ahead, int64_t b) const {
    if (ahead.rows) expand(ahead.next, b * ahead.rows, (b + 1) * ahead.rows, ahead.to);
    const int64_t end = (b + 1) * ahead.lines < ahead.end ? (b + 1) * ahead.lines : ahead.end;
    for (int64_t j = b * ahead.lines; j < end; j++) __builtin_prefetch(ahead.far + j * 64, 0, 2);
  }

  void run(const Panel& panel, const Panel& next, const Panel& far, bool odd, TileArgs t) const {
    const PackedWeight& w = a.weight;
    const int64_t block = a.activations.block, blocks = (row1 - row0 + block - 1) / block;
    const int64_t row_bytes = w.tiles * tile_row_bytes;
    const uint8_t* tile = panel.tile;
    uint8_t* const here = panels + (method.ahead && odd ? kPanelBytes / 2 : 0);
    uint8_t* const there = panels + (odd ? 0 : kPanelBytes / 2);
    if (method.expand && !method.ahead) expand(panel, 0, panel.count * code_rows, here);
    t.codes = method.expand ? here : tile, t.scales = scales_of(w, tile), t.zeros = zeros_of(w, tile);
    const bool floats = method.expand && a.compute != Compute::int8;
    const Stretches stretches(w, tile, floats ? panel.count : 0, t.steps, t.unit);
    t.stretches = &stretches;
    const bool last = panel.k + panel.count == w.tiles;
    const Ahead ahead = ahead_of(next, far, there, blocks);
    for (int64_t b = 0, m = row0; b < blocks; b++, m += block) {
      const int64_t R = row1 - m < block ? row1 - m : block;
      look_ahead(ahead, b);
      t.a = a.activations.codes + m * row_bytes + panel.k * tile_row_bytes * R;
      const int64_t at = (m * w.tiles + panel.k * R) * t.segments;
      t.a_scales = a.activations.scales + at, t.a_sums = a.activations.sums + at;
      t.C = C + (m - row0) * kTileN;
      if (panel.k == 0) memset(t.C, 0, R * kTileN * sizeof(float));
      if (last) prefetch_output(a, m, R, panel.block);
      t.R = R;
      method.tiles[R](t);
      if (last) kFinish[(int)a.dtype](a, m, R, panel.block, t.C);
    }
  }
};

// What tiles need to know of a whole product.
inline TileArgs tile_args(const Method& method, const MultiplyArgs& a) {
  const PackedWeight& w = a.weight;
  TileArgs t{};
  t.scale_dtype = w.scale, t.asymmetric = w.asymmetric, t.zero = constant_zero(w);
  t.book = w.book, t.digits = w.digits;
  t.unit = a.compute != Compute::bf16 ? 1.f : unit_of_pairs(w.coding);
  t.segments = kTileK / w.segment, t.steps = w.segment / method.per_dword;
  return t;
}

void multiply_by(const Method& method, const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0,
                 int64_t block1, void* scratch) {
  uint8_t* panels = (uint8_t*)scratch;
  const Sweep sweep{a, row0, row1, method, panels, (float*)(panels + kPanelBytes)};
  const TileArgs t = tile_args(method, a);
  Panels all(a.weight, method.depth, block0, block1);
  Panel now = all.next(), next = all.next(), later = all.next();
  if (method.ahead) sweep.expand(now, 0, now.count * sweep.code_rows, panels);
  for (bool odd = false; now.tile; odd = !odd) {
    sweep.run(now, next, method.prefetched > 1 ? later : next, odd, t);
    now = next, next = later, later = all.next();
  }
}

// One row block, whose tiles read the weight itself.
void multiply_block(const Method& method, const MultiplyArgs& a, int64_t row0, int64_t R, int64_t block0,
                    int64_t block1) {
  const PackedWeight& w = a.weight;
  const int64_t tile_row_bytes = kTileK * 4 / method.per_dword;
  alignas(64) float C[kBlockRows * kTileN];
  TileArgs t = tile_args(method, a);
  t.R = R, t.C = C, t.codes = w.data + block0 * w.tiles * w.tile_bytes;
  for (int64_t n = block0; n < block1; n++) {
    const int64_t at = row0 * w.tiles * t.segments;
    t.a = a.activations.codes + row0 * w.tiles * tile_row_bytes;
    t.a_scales = a.activations.scales + at, t.a_sums = a.activations.sums + at;
    memset(C, 0, R * kTileN * sizeof(float));
    prefetch_output(a, row0, R, n);
    for (int64_t k = 0; k < w.tiles; k++) {
      t.scales = scales_of(w, t.codes), t.zeros = zeros_of(w, t.codes);
      method.tiles[R](t);
      t.codes += w.tile_bytes, t.a += tile_row_bytes * R;
      t.a_scales += R * t.segments, t.a_sums += R * t.segments;
    }
    kFinish[(int)a.dtype](a, row0, R, n, C);
  }
}

// Row `m` times blocks block0 .. block1 - 1.
void multiply_row(const MultiplyArgs& a, int64_t m, int64_t block0, int64_t block1) {
  const PackedWeight& w = a.weight;
  const RowArgs row = {a.activations.codes + m * w.tiles * kTileK,
                       a.activations.scales + m * w.tiles * (kTileK / w.segment),
                       a.activations.sums + m * w.tiles * (kTileK / w.segment)};
  const RowKernel kernel = kRowKernels[(int)w.coding][w.asymmetric];
  alignas(64) float C[kTileN];
  for (int64_t n = block0; n < block1; n++) {
    prefetch_output(a, m, 1, n);
    kernel(w, w.data + n * w.tiles * w.tile_bytes, row, C);
    kFinish[(int)a.dtype](a, m, 1, n, C);
  }
}

void multiply(const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0, int64_t block1, void* scratch) {
  if (a.compute == Compute::int8 && row1 - row0 == 1) return multiply_row(a, row0, block0, block1);
  const Method method = method_of(a, row1 - row0);
  if (row1 - row0 <= a.activations.block && !method.expand)
    return multiply_block(method, a, row0, row1 - row0, block0, block1);
  multiply_by(method, a, row0, row1, block0, block1, scratch);
}

int64_t block_rows(Compute, int64_t) { return kBlockRows; }

constexpr LinearKernels linear_kernels = {block_rows, kBf16Products, kPanelBytes, prepare_activations, multiply};

}  // namespace
}  // namespace llmrt
