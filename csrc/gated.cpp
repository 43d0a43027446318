// Entry points of silu_mul and gelu_mul: see ops/gated.py for what they mean.
#include "gated.h"

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kGrain = 16384;  // elements per thread below which a second thread costs more than it saves

using Kernel = void (*)(const GatedArgs&, int64_t, int64_t);

Tensor multiply(const Kernel (&kernels)[3], const Tensor& gate, const Tensor& up) {
  const Kernel kernel = kernels[(int)float_dtype(gate, "gate")];
  check_dtype(up, gate.scalar_type(), "up");
  const Rows g = rows_of(gate, "gate");
  check_same_shape(up, gate, "up");
  const Rows u = rows_of(up, "up");
  Tensor out = empty(gate, gate.sizes());
  GatedArgs a{g.data, u.data, out.mutable_data_ptr(), g.K, g.stride, u.stride};
  const int64_t count = g.M * g.K;
  if (g.stride == g.K && u.stride == g.K) a.K = count;  // one long row
  parallel_ranges(count, kGrain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) { return multiply(tier().gated.silu, gate, up); }

Tensor gelu_mul(const Tensor& gate, const Tensor& up, std::string approximate) {
  STD_TORCH_CHECK(approximate == "none" || approximate == "tanh", "approximate is '", approximate,
                  "'; valid: none, tanh");
  return multiply(approximate == "tanh" ? tier().gated.gelu_tanh : tier().gated.gelu, gate, up);
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(gated) {
  library.impl("silu_mul", TORCH_BOX(&llmrt::silu_mul));
  library.impl("gelu_mul", TORCH_BOX(&llmrt::gelu_mul));
}
