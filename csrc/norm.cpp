// Entry points of rms_norm and add_rms_norm: see ops/norm.py for what they mean.
#include "norm.h"

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per thread below which a second thread costs more than it saves

NormArgs norm_args(const Rows& x, const Tensor& weight, double eps) {
  NormArgs a{};
  a.x = x.data, a.K = x.K, a.ldx = x.stride, a.eps = eps;
  a.dtype = float_dtype(x.tensor, "x"), a.weight_dtype = float_dtype(weight, "weight");
  check_shape(weight, {x.K}, "weight");
  return a;
}

void run(void (*kernel)(const NormArgs&, int64_t, int64_t), const NormArgs& a, int64_t M) {
  parallel_ranges(M, 1 + kGrain / (a.K + 1), [&](int64_t m0, int64_t m1) { kernel(a, m0, m1); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset) {
  Rows rows = rows_of(x, "x");
  Tensor w = dense(weight), out = torch::stable::new_empty(x, x.sizes());
  NormArgs a = norm_args(rows, w, eps);
  a.weight = w.const_data_ptr(), a.offset = (float)offset, a.out = out.mutable_data_ptr();
  run(tier().norm.rms, a, rows.M);
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(norm) { library.impl("rms_norm", TORCH_BOX(&llmrt::rms_norm)); }
