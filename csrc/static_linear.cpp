// Entry point of static_linear: see ops/static_linear.py for what it means.
#include "static_linear.h"

#include <algorithm>

#include "layout.h"
#include "scratch.h"

namespace llmrt {
namespace {

constexpr int64_t kChunkBytes = 512 << 10;  // of activations that a thread takes a block of outputs through: half an L2
constexpr int64_t kAloneBytes =
    32 << 10;  // activations so small that each thread prepares them for itself, without a barrier

constexpr const char* kEpilogues[] = {"none", "relu", "silu",     "gelu",     "gelu_tanh",
                                      "add",  "mul",  "silu_mul", "gelu_mul", "gelu_tanh_mul"};

int64_t activation_bytes(int64_t M, int64_t tiles) { return M * (tiles * kTileK + 8) + 192; }

// Lays the three arrays of prepared activations into one buffer.
Activations place(void* buffer, int64_t M, int64_t tiles, int64_t block) {
  uint8_t* p = (uint8_t*)buffer;
  const int64_t codes = (M * tiles * kTileK + 63) / 64 * 64, scales = (M * 4 + 63) / 64 * 64;
  return {p, (float*)(p + codes), (int32_t*)(p + codes + scales), M, block};
}

// Chunk-major order over (chunks of rows) x (blocks of outputs), one contiguous range per thread.
void run_tasks(const StaticMultiplyArgs& a, int64_t chunk, int64_t task0, int64_t task1) {
  const int64_t M = a.linear.activations.M, blocks = a.linear.weight.blocks;
  while (task0 < task1) {
    const int64_t row0 = task0 / blocks * chunk, block0 = task0 % blocks;
    const int64_t block1 = std::min(blocks, block0 + task1 - task0);
    tier().static_linear.multiply(a, row0, std::min(M, row0 + chunk), block0, block1);
    task0 += block1 - block0;
  }
}

void run(StaticPrepareArgs prepare, StaticMultiplyArgs a, int64_t M) {
  const StaticLinearKernels& kernels = tier().static_linear;
  const int64_t most = kernels.block_rows(M), row_blocks = (M + most - 1) / most;
  const int64_t rows = (M + row_blocks - 1) / row_blocks, bytes = activation_bytes(M, prepare.tiles);
  const int64_t fitting = std::max(kChunkBytes / (rows * prepare.tiles * kTileK), int64_t{1});
  const int64_t chunks = (row_blocks + fitting - 1) / fitting, chunk = (row_blocks + chunks - 1) / chunks * rows;
  static thread_local Scratch activations;
  const bool alone = bytes <= kAloneBytes;
  if (!alone) {
    prepare.out = a.linear.activations = place(activations.get(bytes), M, prepare.tiles, rows);
    parallel_ranges(row_blocks, 1, [&](int64_t b0, int64_t b1) { kernels.prepare(prepare, b0, b1); });
  }
  const auto prepared = [&] {
    StaticMultiplyArgs mine = a;
    if (alone) {
      StaticPrepareArgs own = prepare;
      own.out = mine.linear.activations = place(activations.get(bytes), M, prepare.tiles, rows);
      kernels.prepare(own, 0, row_blocks);
    }
    return mine;
  };
  // One row block is bound by memory: each thread reads one long range. Many are bound by arithmetic: small pieces
  // balance.
  parallel_pieces((M + chunk - 1) / chunk * a.linear.weight.blocks, row_blocks == 1 ? 1 : 32, prepared,
                  [&](const StaticMultiplyArgs& mine, int64_t t0, int64_t t1) { run_tasks(mine, chunk, t0, t1); });
}

Layout parse_static(const std::string& text) {
  const Layout l = parse_layout(text);
  STD_TORCH_CHECK(text.rfind("int8_sym_channel_", 0) == 0, "layout is '", text,
                  "'; expected int8_sym_channel_ and the dtype of the scales");
  return l;
}

// The weight, or the packed one of a layout: checked, dense.
Tensor take_weight(const Tensor& weight, const Layout& l, int64_t K, MultiplyArgs& a) {
  const Geometry g = geometry(l, K);
  check_dtype(weight, ScalarType::Byte, "weight");
  check_shape(weight, {(a.N + kTileN - 1) / kTileN, g.tiles, g.tile_bytes}, "weight");
  const Tensor w = dense(weight);
  a.weight.data = (const uint8_t*)w.const_data_ptr(), a.weight.blocks = w.size(0), a.weight.tiles = g.tiles;
  a.weight.tile_bytes = g.tile_bytes, a.weight.code_bytes = g.code_bytes, a.weight.scale = l.scale;
  return w;
}

Tensor static_linear(const Tensor& x, const Tensor& weight, const Tensor& sums, const OptionalTensor& bias,
                     const OptionalTensor& other, const OptionalTensor& factors, double input_scale, int64_t input_zero,
                     const std::string& layout, int64_t out_features, const std::string& epilogue) {
  const Layout l = parse_static(layout);
  StaticMultiplyArgs s{};
  MultiplyArgs& a = s.linear;
  a.epilogue = (Epilogue)one_of(kEpilogues, epilogue, "epilogue"), a.dtype = float_dtype(x, "x");
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(rows.K <= kMostInputs, "x has ", rows.K, " features; valid: at most ", kMostInputs);
  STD_TORCH_CHECK(input_scale > 0 && input_scale <= 3.4e38, "input_scale is ", input_scale,
                  "; valid: above 0 and finite");
  STD_TORCH_CHECK(input_zero >= 0 && input_zero <= 255, "input_zero is ", input_zero, "; valid: 0 to 255");
  STD_TORCH_CHECK(out_features >= 0, "out_features is ", out_features, "; valid: at least 0");
  a.width = out_features, a.N = a.epilogue >= Epilogue::silu_mul ? (out_features + 15) / 16 * 32 : out_features;
  const Tensor w = take_weight(weight, l, rows.K, a);
  check_dtype(sums, ScalarType::Int, "sums");
  check_shape(sums, {a.N}, "sums");
  const Tensor kept_sums = dense(sums);
  s.sums = (const int32_t*)kept_sums.const_data_ptr(), s.zero = (int)input_zero;
  OptionalTensor b, o, f;
  if (bias) {
    a.bias_dtype = float_dtype(*bias, "bias");
    check_shape(*bias, {a.N}, "bias");
    b = dense(*bias), a.bias = b->const_data_ptr();
  }
  if (factors) {
    check_dtype(*factors, ScalarType::Float, "factors");
    check_shape(*factors, {rows.K}, "factors");
    f = dense(*factors);
  }
  const bool two = a.epilogue == Epilogue::add || a.epilogue == Epilogue::mul;
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
  run({rows.data,
       a.dtype,
       rows.stride,
       rows.K,
       a.weight.tiles,
       f ? (const float*)f->const_data_ptr() : nullptr,
       (float)input_scale,
       (int)input_zero,
       {}},
      s, rows.M);
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(static_linear) { library.impl("static_linear", TORCH_BOX(&llmrt::static_linear)); }
