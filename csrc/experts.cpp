// Entry point of quant_experts: see ops/experts.py for what it means.
#include "experts.h"

#include <string.h>

#include <vector>

#include "linear_run.h"
#include "scratch.h"

namespace llmrt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per thread below which a second thread costs more than it saves
constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh"};
constexpr Epilogue kProducts[] = {Epilogue::silu_mul, Epilogue::gelu_mul, Epilogue::gelu_tanh_mul};

// One of the two packed weights of all experts, [E][blocks][tiles][tile_bytes].
struct Weights {
  Layout layout;
  Geometry g;
  Tensor tensor;
  OptionalTensor perm;  // int32 [E, K]
  const char* perm_name;
  int64_t K, expert_bytes;
  MultiplyArgs args{};

  Weights(const Tensor& packed, const OptionalTensor& order, const std::string& text, const std::string& compute,
          int64_t K, int64_t N, int64_t width, Epilogue epilogue, const char* name, const char* perm_name)
      : layout(parse_layout(text)), g(geometry(layout, K)), tensor(dense(packed)), perm_name(perm_name), K(K) {
    const int64_t blocks = (N + kTileN - 1) / kTileN;
    check_dtype(packed, ScalarType::Byte, name);
    check_shape(packed, {-1, blocks, g.tiles, g.tile_bytes}, name);
    expert_bytes = blocks * g.tiles * g.tile_bytes;
    args.compute = parse_compute(compute, *layout.format), args.epilogue = epilogue, args.dtype = DType::f32;
    args.N = N, args.width = width;
    args.weight = packed_weight(tensor.const_data_ptr(), blocks, layout, g, args.compute);
    if (!order) return;
    check_dtype(*order, ScalarType::Int, perm_name);
    check_shape(*order, {packed.size(0), K}, perm_name);
    perm = dense(*order);
  }

  const int32_t* order_of(int64_t expert) const {
    if (!perm) return nullptr;
    const int32_t* p = perm->const_data_ptr<int32_t>() + expert * K;
    for (int64_t i = 0; i < K; i++)
      STD_TORCH_CHECK(p[i] >= 0 && p[i] < K, perm_name, " has the value ", p[i], "; valid: 0 to ", K - 1);
    return p;
  }

  void run(int64_t expert, const void* x, DType dtype, int64_t M, float* out) const {
    MultiplyArgs a = args;
    a.weight.data += expert * expert_bytes, a.out = out;
    run_linear({x, dtype, K, K}, a, M, g);
  }
};

// Rows of x, of which row i is `row_of(i)`, one after another, their columns in the order of `perm` if there is one.
template <class T, class RowOf>
void gather(const void* x, int64_t stride, int64_t count, int64_t K, const int32_t* perm, const RowOf& row_of,
            void* out) {
  parallel_ranges(count, (kGrain + K - 1) / K, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const T* from = (const T*)x + row_of(i) * stride;
      T* to = (T*)out + i * K;
      if (!perm) {
        memcpy(to, from, K * sizeof(T));
      } else {
        for (int64_t j = 0; j < K; j++) to[j] = from[perm[j]];
      }
    }
  });
}

// places[first[e] .. first[e + 1]): which elements of indices choose expert e, rising.
struct Choice {
  std::vector<int64_t> first, places;

  Choice(const Tensor& indices, int64_t experts) : first(experts + 1), places(indices.numel()) {
    const int64_t* chosen = indices.const_data_ptr<int64_t>();
    const int64_t count = (int64_t)places.size();
    for (int64_t i = 0; i < count; i++) {
      STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, "indices has the value ", chosen[i], "; valid: 0 to ",
                      experts - 1);
      first[chosen[i] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++) first[e + 1] += first[e];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < count; i++) places[next[chosen[i]]++] = i;
  }

  int64_t most() const {
    int64_t most = 0;
    for (size_t e = 0; e + 1 < first.size(); e++) most = std::max(most, first[e + 1] - first[e]);
    return most;
  }
};

struct Buffers {
  Scratch rows, hidden, ordered, results, sums;
};

void run_experts(const Rows& x, DType dtype, const Choice& choice, int64_t k, const Weights& up, const Weights& down,
                 AddRowsArgs add, void* out) {
  static thread_local Buffers buffers;
  const int64_t most = choice.most(), width = up.args.width, H = up.K, size = size_of(dtype);
  void* rows = buffers.rows.get(most * H * size);
  float* hidden = (float*)buffers.hidden.get(most * width * 4);
  float* ordered = down.perm ? (float*)buffers.ordered.get(most * width * 4) : hidden;
  float* results = (float*)buffers.results.get(most * H * 4);
  add.sums = (float*)buffers.sums.get(x.M * H * 4), add.rows = results, add.k = k, add.H = H;
  memset(add.sums, 0, x.M * H * 4);
  for (int64_t e = 0; e + 1 < (int64_t)choice.first.size(); e++) {
    const int64_t count = choice.first[e + 1] - choice.first[e];
    if (!count) continue;
    const int64_t* places = choice.places.data() + choice.first[e];
    const auto token = [&](int64_t i) { return places[i] / k; };
    if (size == 4)
      gather<uint32_t>(x.data, x.stride, count, H, up.order_of(e), token, rows);
    else
      gather<uint16_t>(x.data, x.stride, count, H, up.order_of(e), token, rows);
    up.run(e, rows, dtype, count, hidden);
    if (down.perm)
      gather<uint32_t>(hidden, width, count, width, down.order_of(e), [](int64_t i) { return i; }, ordered);
    down.run(e, ordered, DType::f32, count, results);
    add.places = places, add.count = count;
    // By columns: an expert may be chosen twice for a token.
    parallel_ranges(H, (kGrain + count - 1) / count,
                    [&](int64_t begin, int64_t end) { tier().experts.add_rows(add, begin, end); });
  }
  parallel_ranges(x.M * H, kGrain,
                  [&](int64_t begin, int64_t end) { tier().experts.round(add.sums, out, dtype, begin, end); });
}

Tensor quant_experts(const Tensor& x, const Tensor& indices, const Tensor& scores, const Tensor& gate_up,
                     const Tensor& down, const OptionalTensor& perm, const OptionalTensor& down_perm,
                     const std::string& layout, const std::string& down_layout, int64_t width,
                     const std::string& compute, const std::string& down_compute, const std::string& activation) {
  const DType dtype = float_dtype(x, "x");
  check_shape(x, {-1, -1}, "x");
  const Rows rows = rows_of(x, "x");
  check_dtype(indices, ScalarType::Long, "indices");
  check_shape(indices, {rows.M, -1}, "indices");
  const DType score_dtype = float_dtype(scores, "scores");
  check_same_shape(scores, indices, "scores");
  STD_TORCH_CHECK(width >= 1, "width is ", width, "; valid: at least 1");
  const Epilogue product = kProducts[one_of(kActivations, activation, "activation")];
  const Weights first(gate_up, perm, layout, compute, rows.K, (width + 15) / 16 * 32, width, product, "gate_up",
                      "perm");
  const Weights second(down, down_perm, down_layout, down_compute, width, rows.K, rows.K, Epilogue::none, "down",
                       "down_perm");
  const int64_t experts = gate_up.size(0);
  STD_TORCH_CHECK(down.size(0) == experts, "down has ", down.size(0), " experts; expected those of gate_up, ", experts);
  const Tensor out = empty(x, x.sizes());
  if (!rows.M) return out;
  const Tensor chosen = dense(indices), weights = dense(scores);
  AddRowsArgs add{};
  add.scores = weights.const_data_ptr(), add.dtype = score_dtype;
  run_experts(rows, dtype, Choice(chosen, experts), indices.size(1), first, second, add, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(experts) { library.impl("quant_experts", TORCH_BOX(&llmrt::quant_experts)); }
