// Entry points of dense_linear, parallel_linear and gated_linear: see ops/dense.py for what they mean.
#include "dense.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <vector>

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kGrain = 32768;  // products per thread below which a second thread costs more than it saves

// Rows of x up to which the kernels here, which read the weight once, beat torch's GEMM. Measured: equal at about 32 in
// bf16 and later in float32; 16 leaves room for CPUs with matrix units.
constexpr int64_t kMostRows = 16;

constexpr const char* kEpilogues[] = {"none", "relu", "silu", "gelu", "gelu_tanh", "add", "mul"};
constexpr const char* kActivations[] = {"silu", "gelu", "gelu_tanh"};
constexpr Epilogue kGated[] = {Epilogue::silu_mul, Epilogue::gelu_mul, Epilogue::gelu_tanh_mul};

// Whether torch's GEMM of this dtype has instructions for it on this CPU; else it is a slow loop.
bool torch_has_gemm(DType t) {
  const auto ask = [](const char* name) {
    StableIValue answer = 0;
    return torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) == 0 && torch::stable::detail::to<bool>(answer);
  };
  static const bool bf16 = ask("mkldnn::_is_mkldnn_bf16_supported"), f16 = ask("mkldnn::_is_mkldnn_fp16_supported");
  return t == DType::f32 || (t == DType::bf16 ? bf16 : f16);
}

Tensor matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

struct NoGrad {
  const bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

// What all linears of a call share.
struct Input {
  Rows rows;
  ScalarType type;
  DType dtype;
  explicit Input(const Tensor& x) : rows(rows_of(x, "x")), type(x.scalar_type()), dtype(float_dtype(x, "x")) {}
  bool by_torch() const { return rows.K > 0 && rows.M > kMostRows && torch_has_gemm(dtype); }
};

// A weight with its bias, checked and kept alive.
struct Weight {
  Tensor weight;
  OptionalTensor bias;
  int64_t N;
  Weight(const Input& x, const Tensor& w, const OptionalTensor& b, const std::string& weight_name,
         const std::string& bias_name)
      : weight(w) {
    const char *name = weight_name.c_str(), *of_bias = bias_name.c_str();
    check_dtype(w, x.type, name);
    check_shape(w, {-1, x.rows.K}, name);
    N = w.size(0);
    STD_TORCH_CHECK(x.rows.K <= 1 || w.stride(1) == 1, name, " has strides [", w.stride(0), ", ", w.stride(1),
                    "]; expected contiguous rows: [any, 1]");
    if (!b) return;
    check_dtype(*b, x.type, of_bias);
    check_shape(*b, {N}, of_bias);
    bias = dense(*b);
  }
  DenseArgs::Linear linear() const {
    return {weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, weight.stride(0)};
  }
  // out = x W^T + b by torch's GEMM, past the dispatcher: no autocast, no autograd. `added` is [M, N], for lack of a
  // bias.
  void multiply(const Input& x, const Tensor& out, const Tensor* added = nullptr) const {
    const NoGrad no_grad;
    const int64_t M = x.rows.M, K = x.rows.K;
    const Tensor y = matrix(out, M, N, N, 1), a = matrix(x.rows.tensor, M, K, x.rows.stride, 1);
    const Tensor transposed = matrix(weight, K, N, 1, weight.stride(0));
    if (!bias && !added) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), a.get(), transposed.get()));
      return;
    }
    const Tensor start = bias ? matrix(*bias, M, N, 0, 1) : *added;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start.get(), a.get(), transposed.get(), 1.0, 1.0));
  }
};

Tensor output(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()));
}

DenseArgs arguments(const Input& x, const Weight& w, const Tensor& out) {
  DenseArgs a{};
  a.x = x.rows.data, a.M = x.rows.M, a.K = x.rows.K, a.ldx = x.rows.stride;
  a.linear = w.linear(), a.N = w.N, a.out = out.mutable_data_ptr();
  return a;
}

// One parallel region over the outputs of all calls: each thread reads one long range of their weights.
void multiply(const DenseArgs* calls, size_t count, DType dtype) {
  int64_t total = 0;
  for (size_t i = 0; i < count; i++) total += calls[i].N;
  const auto kernel = tier().dense.multiply[(int)dtype];
  parallel_ranges(total, 1 + kGrain / (calls->M * calls->K + 1), [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (size_t i = 0; i < count; start += calls[i++].N) {
      const int64_t n0 = begin > start ? begin - start : 0, n1 = end - start < calls[i].N ? end - start : calls[i].N;
      if (n0 < n1) kernel(calls[i], n0, n1);
    }
  });
}

Tensor dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& other,
                    const std::string& epilogue) {
  const Input in(x);
  const Epilogue e = (Epilogue)one_of(kEpilogues, epilogue, "epilogue");
  const Weight w(in, weight, bias, "weight", "bias");
  STD_TORCH_CHECK(other.has_value() == (e >= Epilogue::add), "other ", other ? "given" : "missing", " for epilogue '",
                  epilogue, "'");
  const Tensor out = output(x, w.N);
  DenseArgs a = arguments(in, w, out);
  a.epilogue = e;
  std::optional<Rows> rows;
  if (other) {
    check_dtype(*other, in.type, "other");
    check_same_shape(*other, out, "other");
    rows = rows_of(*other, "other"), a.other = rows->data, a.ldo = rows->stride;
  }
  if (!a.M || !a.N) return out;
  if (!in.by_torch()) {
    multiply(&a, 1, in.dtype);
  } else if (e == Epilogue::add && !w.bias) {
    const Tensor added = matrix(rows->tensor, a.M, a.N, a.ldo, 1);
    w.multiply(in, out, &added);
  } else {
    w.multiply(in, out);
    const auto kernel = tier().dense.finish[(int)in.dtype];
    if (e != Epilogue::none) parallel_ranges(a.M, 1 + kGrain / a.N, [&](int64_t m0, int64_t m1) { kernel(a, m0, m1); });
  }
  return out;
}

std::vector<Tensor> parallel_linear(const Tensor& x, const std::vector<Tensor>& weights,
                                    const std::vector<OptionalTensor>& biases) {
  const Input in(x);
  const size_t count = weights.size();
  STD_TORCH_CHECK(count > 0, "weights is empty; expected at least one tensor");
  STD_TORCH_CHECK(biases.empty() || biases.size() == count, "biases has ", biases.size(), " tensors; expected 0 or ",
                  count, ", as many as weights");
  std::vector<Weight> kept;
  std::vector<Tensor> outs;
  std::vector<DenseArgs> calls;
  for (size_t i = 0; i < count; i++) {
    const std::string index = "[" + std::to_string(i) + "]";
    kept.emplace_back(in, weights[i], biases.empty() ? OptionalTensor() : biases[i], "weights" + index,
                      "biases" + index);
    outs.push_back(output(x, kept[i].N));
    calls.push_back(arguments(in, kept[i], outs[i]));
  }
  if (!in.rows.M) return outs;
  if (!in.by_torch())
    multiply(calls.data(), count, in.dtype);
  else
    for (size_t i = 0; i < count; i++)
      if (kept[i].N) kept[i].multiply(in, outs[i]);
  return outs;
}

Tensor gated_linear(const Tensor& x, const Tensor& gate_weight, const Tensor& up_weight,
                    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const std::string& activation) {
  const Input in(x);
  const int which = one_of(kActivations, activation, "activation");
  const Weight gate(in, gate_weight, gate_bias, "gate_weight", "gate_bias");
  const Weight up(in, up_weight, up_bias, "up_weight", "up_bias");
  check_same_shape(up_weight, gate_weight, "up_weight");
  const Tensor out = output(x, gate.N);
  DenseArgs a = arguments(in, gate, out);
  a.up = up.linear(), a.epilogue = kGated[which];
  if (!a.M || !a.N) return out;
  if (!in.by_torch()) {
    multiply(&a, 1, in.dtype);
    return out;
  }
  const Tensor other = output(x, up.N);
  gate.multiply(in, out), up.multiply(in, other);
  const auto& kernels = tier().gated;
  const auto kernel = (which == 0 ? kernels.silu : which == 1 ? kernels.gelu : kernels.gelu_tanh)[(int)in.dtype];
  const int64_t elements = a.M * a.N;  // one long row
  const GatedArgs g{a.out, other.const_data_ptr(), a.out, elements, elements, elements};
  parallel_ranges(elements, kGrain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(dense) {
  library.impl("dense_linear", TORCH_BOX(&llmrt::dense_linear));
  library.impl("parallel_linear", TORCH_BOX(&llmrt::parallel_linear));
  library.impl("gated_linear", TORCH_BOX(&llmrt::gated_linear));
}
