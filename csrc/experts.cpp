// Entry point of quant_experts: see ops/experts.py for what it means.
#include "experts.h"

#include <string.h>

#include <algorithm>
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

  const uint8_t* data_of(int64_t expert) const { return args.weight.data + expert * expert_bytes; }

  // Runs M rows of inputs, one after another, through one expert.
  void run(int64_t expert, const void* x, DType dtype, int64_t M, float* out) const {
    MultiplyArgs a = args;
    a.weight.data = data_of(expert), a.out = out;
    run_linear({x, dtype, K, K}, a, M, g);
  }
};

// Rows of x, of which row i is `row_of(i)`, one after another, their columns in the order of `perm` if there is one.
template <class T, class RowOf>
void gather_as(const T* x, int64_t stride, int64_t count, int64_t K, const int32_t* perm, const RowOf& row_of, T* out) {
  parallel_ranges(count, (kGrain + K - 1) / K, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const T* from = x + row_of(i) * stride;
      T* to = out + i * K;
      if (!perm) {
        memcpy(to, from, K * sizeof(T));
      } else {
        for (int64_t j = 0; j < K; j++) to[j] = from[perm[j]];
      }
    }
  });
}
template <class RowOf>
void gather(const void* x, DType dtype, int64_t stride, int64_t count, int64_t K, const int32_t* perm,
            const RowOf& row_of, void* out) {
  if (size_of(dtype) == 4)
    gather_as((const uint32_t*)x, stride, count, K, perm, row_of, (uint32_t*)out);
  else
    gather_as((const uint16_t*)x, stride, count, K, perm, row_of, (uint16_t*)out);
}

// places[first[e] .. first[e + 1]): which elements of indices choose expert e, rising.
struct Choice {
  const int64_t* chosen;
  std::vector<int64_t> first, places;

  Choice(const Tensor& indices, int64_t experts)
      : chosen(indices.const_data_ptr<int64_t>()), first(experts + 1), places(indices.numel()) {
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

struct Layer {
  const Rows& x;
  DType dtype;
  const Choice& choice;
  const Weights &up, &down;

  // Scratch of `count` rows.
  struct Buffers {
    uint8_t* rows;
    float *hidden, *ordered, *results;
  };
  Buffers buffers(int64_t count) const {
    static thread_local Scratch rows, hidden, ordered, results;
    const int64_t H = up.K, width = down.K;
    float* h = (float*)hidden.get(count * width * 4);
    return {(uint8_t*)rows.get(count * H * size_of(dtype)), h, down.perm ? (float*)ordered.get(count * width * 4) : h,
            (float*)results.get(count * H * 4)};
  }

  // One expert after the other, each over the rows that chose it.
  void by_expert(AddRowsArgs add) const {
    const Buffers b = buffers(choice.most());
    add.rows = b.results;
    for (int64_t e = 0; e + 1 < (int64_t)choice.first.size(); e++) {
      const int64_t count = choice.first[e + 1] - choice.first[e];
      if (!count) continue;
      add.places = choice.places.data() + choice.first[e], add.count = count;
      const auto token = [&](int64_t i) { return add.places[i] / add.k; };
      gather(x.data, dtype, x.stride, count, up.K, up.order_of(e), token, b.rows);
      up.run(e, b.rows, dtype, count, b.hidden);
      if (down.perm)
        gather(b.hidden, DType::f32, down.K, count, down.K, down.order_of(e), [](int64_t i) { return i; }, b.ordered);
      down.run(e, b.ordered, DType::f32, count, b.results);
      // By columns: an expert may be chosen twice for a token.
      parallel_ranges(up.K, (kGrain + count - 1) / count,
                      [&](int64_t begin, int64_t end) { tier().experts.add_rows(add, begin, end); });
    }
  }

  // The experts of one token side by side: one after the other, each would wait twice for all threads.
  void one_token(AddRowsArgs add) const {
    const int64_t count = (int64_t)choice.places.size(), H = up.K, width = down.K, row_bytes = H * size_of(dtype);
    const Buffers b = buffers(count);
    add.rows = b.results, add.places = choice.places.data(), add.count = count;
    const auto expert = [&](int64_t i) { return choice.chosen[choice.places[i]]; };
    const auto same = [](int64_t) { return int64_t{0}; };
    std::vector<const void*> inputs(up.perm ? count : 1, x.data), middles(count);
    std::vector<RowProduct> ups(count), downs(count);
    for (int64_t i = 0; i < count; i++) {
      if (up.perm) {
        gather(x.data, dtype, 0, 1, H, up.order_of(expert(i)), same, b.rows + i * row_bytes);
        inputs[i] = b.rows + i * row_bytes;
      }
      middles[i] = b.ordered + i * width;
      ups[i] = {up.perm ? i : 0, up.data_of(expert(i)), b.hidden + i * width};
      downs[i] = {i, down.data_of(expert(i)), b.results + i * H};
    }
    run_rows({nullptr, dtype, H, H}, up.args, inputs, ups, up.g);
    for (int64_t i = 0; i < count && down.perm; i++)
      gather(b.hidden + i * width, DType::f32, 0, 1, width, down.order_of(expert(i)), same, b.ordered + i * width);
    run_rows({nullptr, DType::f32, width, width}, down.args, middles, downs, down.g);
    tier().experts.add_rows(add, 0, H);
  }

  void run(AddRowsArgs add, void* out) const {
    static thread_local Scratch sums;
    const int64_t size = x.M * up.K;
    add.sums = (float*)sums.get(size * 4), add.H = up.K;
    memset(add.sums, 0, size * 4);
    if (x.M == 1 && add.k > 1)
      one_token(add);
    else
      by_expert(add);
    parallel_ranges(size, kGrain,
                    [&](int64_t begin, int64_t end) { tier().experts.round(add.sums, out, dtype, begin, end); });
  }
};

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
  add.scores = weights.const_data_ptr(), add.dtype = score_dtype, add.k = indices.size(1);
  Layer{rows, dtype, Choice(chosen, experts), first, second}.run(add, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(experts) { library.impl("quant_experts", TORCH_BOX(&llmrt::quant_experts)); }
