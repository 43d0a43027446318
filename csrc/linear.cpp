// Entry point of quant_linear: see ops/linear.py for what it means.
#include "linear.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "linear_run.h"
#include "scratch.h"

namespace llmrt {
namespace {

// A thread decodes each part of the weight once per chunk of rows. Their prepared activations pass by for every block
// of 32 outputs, at 2 bytes per clock, from an L3; their sums, 128 bytes a row, stay in an L2. Smaller chunks, for an
// L2 or an L1, were slower for all but int8 products of groups of 32 with many inputs. A single chunk is one for all
// threads, of several each thread has its own in the L3.
constexpr int64_t kChunkRows = 528, kChunkBytes = 4608 << 10;
// Activations so small that each thread prepares them for itself, without a barrier.
constexpr int64_t kAloneBytes = 32 << 10;

constexpr const char* kEpilogues[] = {"none", "relu", "silu",     "gelu",     "gelu_tanh",
                                      "add",  "mul",  "silu_mul", "gelu_mul", "gelu_tanh_mul"};

float round_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  memcpy(&x, &bits, 4);
  return x;
}

// What the kernels multiply for a code: see Format.values of ops/formats.py.
void set_values(PackedWeight& w, const Layout& l, Compute compute) {
  const Format& f = *l.format;
  const bool book = f.coding == Coding::book;
  w.bits = l.bits, w.asymmetric = l.asymmetric, w.scale = l.scale, w.coding = f.coding;
  w.zero = book ? 128 : l.zero, w.unit = book ? 1.f / (float)f.digits : 1.f;
  for (int i = 0; i < 16; i++) {
    w.book[i] = !book                      ? (float)(i - (l.asymmetric ? 0 : l.zero))
                : compute == Compute::bf16 ? round_to_bf16(f.book[i])
                                           : f.book[i];
    w.digits[i] = (uint8_t)(128 + std::lrint(f.book[i] * (float)f.digits));
  }
}

struct Sizes {
  int64_t row_bytes, segments;  // of one prepared row
  int64_t bytes(int64_t rows) const { return rows * (row_bytes + 8 * segments) + 192; }
};

// Lays the three arrays of prepared activations into one buffer.
Activations place(void* buffer, const Sizes& sizes, int64_t M, int64_t block) {
  uint8_t* p = (uint8_t*)buffer;
  const int64_t codes = (M * sizes.row_bytes + 63) / 64 * 64, scales = (M * sizes.segments * 4 + 63) / 64 * 64;
  return {p, (float*)(p + codes), (int32_t*)(p + codes + scales), M, block};
}

// Chunk-major order over (chunks of rows) x (blocks of outputs), one contiguous range per thread.
struct Grid {
  int64_t M, chunk, blocks;
  int64_t tasks() const { return (M + chunk - 1) / chunk * blocks; }

  void run(const MultiplyArgs& a, int64_t task0, int64_t task1, void* scratch) const {
    while (task0 < task1) {
      const int64_t row0 = task0 / blocks * chunk, block0 = task0 % blocks;
      const int64_t block1 = std::min(blocks, block0 + task1 - task0);
      tier().linear.multiply(a, row0, std::min(M, row0 + chunk), block0, block1, scratch);
      task0 += block1 - block0;
    }
  }
};

void run(PrepareArgs prepare, MultiplyArgs a, int64_t M, const Sizes& sizes) {
  const LinearKernels& kernels = tier().linear;
  // Row blocks of about equal size, chunks of row blocks of about equal number.
  const int64_t most = kernels.block_rows(a.compute, M), row_blocks = (M + most - 1) / most;
  const int64_t rows = (M + row_blocks - 1) / row_blocks;
  const int64_t most_rows = M <= kChunkRows ? M : std::min(kChunkRows, kChunkBytes / sizes.row_bytes);
  const int64_t fitting = std::max(int64_t{4}, (most_rows + rows - 1) / rows);
  const int64_t chunks = (row_blocks + fitting - 1) / fitting;
  const Grid grid{M, (row_blocks + chunks - 1) / chunks * rows, a.weight.blocks};
  const int64_t scratch_bytes = kernels.panel_bytes + grid.chunk * 128;
  static thread_local Scratch activations, scratch;
  const bool alone = sizes.bytes(M) <= kAloneBytes;
  if (!alone) {
    prepare.out = a.activations = place(activations.get(sizes.bytes(M)), sizes, M, rows);
    parallel_ranges(row_blocks, 1, [&](int64_t b0, int64_t b1) { kernels.prepare(prepare, a.weight, b0, b1); });
  }
  const auto prepared = [&] {
    MultiplyArgs mine = a;
    if (alone) {
      PrepareArgs own = prepare;
      own.out = mine.activations = place(activations.get(sizes.bytes(M)), sizes, M, rows);
      kernels.prepare(own, a.weight, 0, row_blocks);
    }
    return mine;
  };
  // One row block is bound by memory: long ranges, and pieces that a thread which got less of the memory leaves to the
  // other. Many are bound by arithmetic: small pieces balance.
  parallel_pieces(
      grid.tasks(), row_blocks == 1 ? 8 : 32, prepared,
      [&](const MultiplyArgs& mine, int64_t t0, int64_t t1) { grid.run(mine, t0, t1, scratch.get(scratch_bytes)); });
}

// Completes the arguments of a product from its geometry.
Sizes settle(PrepareArgs& p, MultiplyArgs& a, const Geometry& g) {
  p.group = g.group, p.padded_group = g.padded_group, p.compute = a.compute;
  if (a.compute == Compute::bf16 && !tier().linear.bf16_products)
    p.compute = a.compute = Compute::f32, p.round_to_bf16 = true;
  const int64_t element = a.compute == Compute::int8 ? 1 : a.compute == Compute::bf16 ? 2 : 4;
  return {g.tiles * kTileK * element, g.tiles * g.segments()};
}

}  // namespace

Compute parse_compute(const std::string& text, const Format& format) {
  STD_TORCH_CHECK(text != "int8" || !is_float8(format.coding), "compute is 'int8' for ", format.name,
                  "; valid: bf16, fp16, fp32");
  if (text == "int8") return Compute::int8;
  if (text == "bf16") return Compute::bf16;
  STD_TORCH_CHECK(text == "fp32" || text == "fp16", "compute is '", text, "'; valid: int8, bf16, fp16, fp32");
  return Compute::f32;
}

PackedWeight packed_weight(const void* data, int64_t blocks, const Layout& l, const Geometry& g, Compute compute) {
  PackedWeight w{};
  w.data = (const uint8_t*)data, w.blocks = blocks, w.segment = g.segment, w.tiles = g.tiles;
  w.tile_bytes = g.tile_bytes, w.code_bytes = g.code_bytes, w.scale_bytes = g.scale_bytes;
  set_values(w, l, compute);
  return w;
}

void run_linear(PrepareArgs p, MultiplyArgs a, int64_t M, const Geometry& g) {
  const Sizes sizes = settle(p, a, g);
  run(p, a, M, sizes);
}

void run_rows(PrepareArgs p, MultiplyArgs a, const std::vector<const void*>& inputs,
              const std::vector<RowProduct>& products, const Geometry& g) {
  const Sizes sizes = settle(p, a, g);
  const LinearKernels& kernels = tier().linear;
  static thread_local Scratch activations, scratch;
  const int64_t row_bytes = (sizes.bytes(1) + 63) / 64 * 64, all = row_bytes * (int64_t)inputs.size();
  const auto row = [&](void* base, int64_t i) { return place((uint8_t*)base + i * row_bytes, sizes, 1, 1); };
  const auto prepare = [&](void* base, int64_t begin, int64_t end) {
    PrepareArgs own = p;
    for (int64_t i = begin; i < end; i++) {
      own.x = inputs[i], own.out = row(base, i);
      kernels.prepare(own, a.weight, 0, 1);
    }
  };
  void* shared = nullptr;
  if (all > kAloneBytes) {
    shared = activations.get(all);
    parallel_ranges((int64_t)inputs.size(), 1, [&](int64_t begin, int64_t end) { prepare(shared, begin, end); });
  }
  const auto prepared = [&] {
    if (shared) return shared;
    void* own = activations.get(all);
    prepare(own, 0, (int64_t)inputs.size());
    return own;
  };
  const int64_t blocks = a.weight.blocks;
  parallel_pieces((int64_t)products.size() * blocks, 8, prepared, [&](void* base, int64_t task0, int64_t task1) {
    MultiplyArgs one = a;
    while (task0 < task1) {
      const RowProduct& product = products[task0 / blocks];
      const int64_t block0 = task0 % blocks, block1 = std::min(blocks, block0 + task1 - task0);
      one.weight.data = (const uint8_t*)product.weight, one.out = product.out;
      one.activations = row(base, product.input);
      kernels.multiply(one, 0, 1, block0, block1, scratch.get(kernels.panel_bytes + 128));
      task0 += block1 - block0;
    }
  });
}

namespace {

Tensor quant_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& other,
                    const std::string& layout, int64_t out_features, const std::string& compute,
                    const std::string& epilogue) {
  const Layout l = parse_layout(layout);
  MultiplyArgs a{};
  a.epilogue = (Epilogue)one_of(kEpilogues, epilogue, "epilogue"), a.compute = parse_compute(compute, *l.format),
  a.dtype = float_dtype(x, "x");
  const bool gated = a.epilogue >= Epilogue::silu_mul;
  const bool two = a.epilogue == Epilogue::add || a.epilogue == Epilogue::mul;
  const Rows rows = rows_of(x, "x");
  const Geometry g = geometry(l, rows.K);
  a.width = out_features, a.N = gated ? (out_features + 15) / 16 * 32 : out_features;
  STD_TORCH_CHECK(out_features >= 0, "out_features is ", out_features, "; valid: at least 0");
  check_dtype(weight, ScalarType::Byte, "weight");
  check_shape(weight, {(a.N + kTileN - 1) / kTileN, g.tiles, g.tile_bytes}, "weight");
  const Tensor w = dense(weight);
  a.weight = packed_weight(w.const_data_ptr(), w.size(0), l, g, a.compute);
  OptionalTensor b, o;
  if (bias) {
    a.bias_dtype = float_dtype(*bias, "bias");
    check_shape(*bias, {a.N}, "bias");
    b = dense(*bias), a.bias = b->const_data_ptr();
  }
  STD_TORCH_CHECK(other.has_value() == two, "other ", other ? "given" : "missing", " for epilogue '", epilogue, "'");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  const Tensor out = empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
  if (other) {
    check_dtype(*other, x.scalar_type(), "other");
    check_same_shape(*other, out, "other");
    o = dense(*other), a.other = o->const_data_ptr();
  }
  if (!rows.M || !out_features) return out;
  a.out = out.mutable_data_ptr();
  run_linear({rows.data, a.dtype, rows.stride, rows.K}, a, rows.M, g);
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(linear) { library.impl("quant_linear", TORCH_BOX(&llmrt::quant_linear)); }
