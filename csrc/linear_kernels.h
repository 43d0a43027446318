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

inline Method method_of(const MultiplyArgs& a, bool one_block) {
  const PackedWeight& w = a.weight;
  const bool wide = w.bits == 8, book = w.coding == Coding::book;
  const int coding = (int)w.coding;
  if (a.compute == Compute::int8) {
    if (one_block && book) return {kDigits.of, nullptr, false, 4, 0};
    if (one_block) return {(wide ? kBytes : kNibbles)[w.asymmetric].of, nullptr, false, 4, 0};
    return {kBytePanels[wide || book][w.asymmetric].of, wide ? nullptr : kExpandBytes[book], !wide, 4, wide ? 1 : 2};
  }
  if (a.compute == Compute::bf16) {
    if (one_block) return {kPairs[coding].of, nullptr, false, 2, 0};
    return {kPairPanels.of, kExpandPairs[coding], true, 2, 2, kDepth};
  }
  if (one_block) return {kFloats[coding].of, nullptr, false, 1, 0};
  return {kFloatPanels.of, kExpandFloats[coding], false, 1, 1};  // two panels of floats would not fit a 32 KB L1
}

constexpr int64_t kFloatPanelBytes = kTileK * kTileN * 4, kPairPanelBytes = kTileK * kTileN * 2;  // of one tile
constexpr int64_t kPanelBytes = kBf16Products ? 2 * kDepth * kPairPanelBytes : kFloatPanelBytes;

// A number of tiles of one block of outputs.
struct Panel {
  int64_t block, k, count;  // k: its first tile in the block
};

// The order of panels: of a group of blocks, all panels of one span of inputs after the other, so that the activations
// of a span come from an L2 for every block but the first.
class Order {
 public:
  Order(const MultiplyArgs& a, int64_t depth, int64_t block0, int64_t block1)
      : tiles_(a.weight.tiles), span_(a.span), group_(a.group), depth_(depth), end_(block1), first_(block0) {
    start(0);
  }
  bool done() const { return first_ >= end_; }
  Panel panel() const {
    const int64_t end = begin_ + span_ < tiles_ ? begin_ + span_ : tiles_;
    return {block_, k_, end - k_ < depth_ ? end - k_ : depth_};
  }
  int64_t column() const { return block_ - first_; }  // of the block in its group
  void advance() {
    k_ += depth_;
    if (k_ < tiles_ && k_ < begin_ + span_) return;
    k_ = begin_;
    if (++block_ < last_) return;
    if (begin_ + span_ < tiles_) return start(begin_ + span_);
    first_ += group_;
    start(0);
  }

 private:
  void start(int64_t begin) {
    last_ = first_ + group_ < end_ ? first_ + group_ : end_;
    begin_ = k_ = begin, block_ = first_;
  }
  int64_t tiles_, span_, group_, depth_, end_;
  int64_t first_, last_, begin_, block_, k_;  // blocks of the group; the span's first tile
};

// Rows row0 .. row1 - 1 times panels.
struct Sweep {
  const MultiplyArgs& a;
  int64_t row0, row1;
  Method method;
  uint8_t* panels;
  float* C;  // [group][row1 - row0][32]

  const uint8_t* tile_of(const Panel& panel) const {
    return a.weight.data + (panel.block * a.weight.tiles + panel.k) * a.weight.tile_bytes;
  }

  // Decodes rows of codes of a panel, counted through its tiles.
  void expand(const Panel& panel, int64_t begin, int64_t end, uint8_t* to) const {
    const int64_t rows = a.weight.code_bytes / 64, bytes = kTileK * kTileN * 4 / method.per_dword;
    const uint8_t* tile = tile_of(panel);
    if (end > panel.count * rows) end = panel.count * rows;
    for (int64_t i = begin / rows; i * rows < end; i++) {
      const int64_t first = begin > i * rows ? begin - i * rows : 0,
                    last = end < (i + 1) * rows ? end - i * rows : rows;
      method.expand(a.weight, tile + i * a.weight.tile_bytes, first, last, to + i * bytes);
    }
  }

  // Makes part b of `blocks` of the panels to come ready.
  void look_ahead(const Order& next, const Order& far, uint8_t* to, int64_t b, int64_t blocks) const {
    const int64_t codes = method.depth * (a.weight.code_bytes / 64);
    if (method.ahead && !next.done()) expand(next.panel(), b * codes / blocks, (b + 1) * codes / blocks, to);
    if (far.done()) return;
    const uint8_t* tile = tile_of(far.panel());
    const int64_t lines = far.panel().count * a.weight.tile_bytes / 64;
    for (int64_t j = b * lines / blocks; j < (b + 1) * lines / blocks; j++) __builtin_prefetch(tile + j * 64, 0, 2);
  }

  void run(const Order& now, const Order& next, const Order& far, bool odd, TileArgs t) const {
    const PackedWeight& w = a.weight;
    const int64_t block = a.activations.block, blocks = (row1 - row0 + block - 1) / block;
    const int64_t row_bytes = w.tiles * kTileK * 4 / method.per_dword;
    const Panel panel = now.panel();
    const uint8_t* tile = tile_of(panel);
    uint8_t* const here = panels + (method.ahead && odd ? kPanelBytes / 2 : 0);
    uint8_t* const there = panels + (odd ? 0 : kPanelBytes / 2);
    if (method.expand && !method.ahead) expand(panel, 0, panel.count * (w.code_bytes / 64), here);
    t.codes = method.expand ? here : tile, t.scales = scales_of(w, tile), t.zeros = zeros_of(w, tile);
    const bool floats = method.expand && a.compute != Compute::int8;
    const Stretches stretches(w, tile, floats ? panel.count : 0, t.steps, t.unit);
    t.stretches = &stretches;
    const bool last = panel.k + panel.count == w.tiles;
    float* const sums = C + now.column() * (row1 - row0) * kTileN;
    for (int64_t b = 0, m = row0; b < blocks; b++, m += block) {
      const int64_t R = row1 - m < block ? row1 - m : block;
      if (method.prefetched) look_ahead(next, far, there, b, blocks);
      t.a = a.activations.codes + m * row_bytes + panel.k * kTileK * 4 / method.per_dword * R;
      const int64_t at = (m * w.tiles + panel.k * R) * t.segments;
      t.a_scales = a.activations.scales + at, t.a_sums = a.activations.sums + at;
      t.C = sums + (m - row0) * kTileN;
      if (panel.k == 0) memset(t.C, 0, R * kTileN * sizeof(float));
      if (last) prefetch_output(a, m, R, panel.block);
      t.R = R;
      method.tiles[R](t);
      if (last) kFinish[(int)a.dtype](a, m, R, panel.block, t.C);
    }
  }
};

void multiply_by(const Method& method, const MultiplyArgs& a, int64_t row0, int64_t row1, int64_t block0,
                 int64_t block1, void* scratch) {
  const PackedWeight& w = a.weight;
  uint8_t* panels = (uint8_t*)scratch;
  const Sweep sweep{a, row0, row1, method, panels, (float*)(panels + kPanelBytes)};
  TileArgs t;
  t.scale_dtype = w.scale, t.asymmetric = w.asymmetric, t.zero = constant_zero(w);
  t.book = w.book, t.digits = w.digits;
  t.unit = a.compute != Compute::bf16 ? 1.f : unit_of_pairs(w.coding);
  t.segments = kTileK / w.segment, t.steps = w.segment / method.per_dword;
  Order now(a, method.depth, block0, block1), next = now, far = now;
  next.advance();
  for (int64_t i = 0; i < method.prefetched && !far.done(); i++) far.advance();
  if (method.ahead) sweep.expand(now.panel(), 0, now.panel().count * (w.code_bytes / 64), panels);
  for (bool odd = false; !now.done(); odd = !odd) {
    sweep.run(now, next, far, odd, t);
    now = next;
    next.advance();
    if (!far.done()) far.advance();
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
  multiply_by(method_of(a, row1 - row0 <= a.activations.block), a, row0, row1, block0, block1, scratch);
}

int64_t block_rows(Compute, int64_t) { return kBlockRows; }

constexpr LinearKernels linear_kernels = {block_rows, kBf16Products, kPanelBytes, prepare_activations, multiply};

}  // namespace
}  // namespace llmrt
