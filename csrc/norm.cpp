// Entry points of the norms: see ops/norm.py for what they mean.
#include "norm.h"

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per thread below which a second thread costs more than it saves

using Kernel = void (*)(const NormArgs&, int64_t, int64_t);

// A weight or bias: checks it, makes it dense and keeps it alive.
struct Parameter {
  Tensor tensor;
  DType dtype;
  Parameter(const Tensor& t, int64_t K, const char* name) : tensor(t), dtype(float_dtype(t, name)) {
    check_shape(t, {K}, name);
    if (!t.is_contiguous()) tensor = torch::stable::contiguous(t);
  }
  const void* data() const { return tensor.const_data_ptr(); }
};
using OptionalParameter = std::optional<Parameter>;

// Fills in the matrices and runs the kernel of x's dtype; `a` has the parameters.
Tensor normalize(const Kernel (&kernels)[3], NormArgs a, const Rows& x) {
  Tensor out = empty(x.tensor, x.tensor.sizes());
  const Kernel kernel = kernels[(int)float_dtype(x.tensor, "x")];
  a.x = x.data, a.K = x.K, a.ldx = x.stride, a.out = out.mutable_data_ptr();
  parallel_ranges(x.M, 1 + kGrain / (a.K + 1), [&](int64_t m0, int64_t m1) { kernel(a, m0, m1); });
  return out;
}

std::tuple<Tensor, Tensor> add_normalize(const Kernel (&kernels)[3], NormArgs a, const Rows& x,
                                         const Tensor& residual) {
  check_dtype(residual, x.tensor.scalar_type(), "residual");
  check_same_shape(residual, x.tensor, "residual");
  const Rows r = rows_of(residual, "residual");
  Tensor sum = empty(x.tensor, x.tensor.sizes());
  a.residual = r.data, a.ldr = r.stride, a.sum = sum.mutable_data_ptr();
  return {normalize(kernels, a, x), sum};
}

NormArgs rms_args(const Parameter& weight, double eps, double offset) {
  NormArgs a{};
  a.weight = weight.data(), a.weight_dtype = weight.dtype, a.eps = (float)eps, a.offset = (float)offset;
  return a;
}

NormArgs layer_args(const OptionalParameter& weight, const OptionalParameter& bias, double eps) {
  NormArgs a{};
  a.eps = (float)eps;
  if (bias) a.bias = bias->data(), a.weight_dtype = bias->dtype;
  if (weight) {
    if (bias) check_dtype(bias->tensor, weight->tensor.scalar_type(), "bias");
    a.weight = weight->data(), a.weight_dtype = weight->dtype;
  }
  return a;
}

OptionalParameter optional(const OptionalTensor& t, int64_t K, const char* name) {
  if (!t) return std::nullopt;
  return Parameter(*t, K, name);
}

Rows checked_rows(const Tensor& x) {
  float_dtype(x, "x");
  return rows_of(x, "x");
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  const Rows rows = checked_rows(x);
  const Parameter w(weight, rows.K, "weight");
  return normalize(tier().norm.rms, rms_args(w, eps, offset), rows);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                        double offset) {
  const Rows rows = checked_rows(x);
  const Parameter w(weight, rows.K, "weight");
  return add_normalize(tier().norm.rms, rms_args(w, eps, offset), rows, residual);
}

Tensor layer_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Rows rows = checked_rows(x);
  const OptionalParameter w = optional(weight, rows.K, "weight"), b = optional(bias, rows.K, "bias");
  return normalize(tier().norm.layer, layer_args(w, b, eps), rows);
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps) {
  const Rows rows = checked_rows(x);
  const OptionalParameter w = optional(weight, rows.K, "weight"), b = optional(bias, rows.K, "bias");
  return add_normalize(tier().norm.layer, layer_args(w, b, eps), rows, residual);
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(norm) {
  library.impl("rms_norm", TORCH_BOX(&llmrt::rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&llmrt::add_rms_norm));
  library.impl("layer_norm", TORCH_BOX(&llmrt::layer_norm));
  library.impl("add_layer_norm", TORCH_BOX(&llmrt::add_layer_norm));
}
