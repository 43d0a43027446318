// RMSNorm and LayerNorm, alone or after a residual sum; one work-group per row. T: dtype of the rows.
#include "element.hpp"

namespace norm {

template <bool kMean>
inline void row(const T* x, const T* residual, const void* weight, const void* bias, int64_t kind, T* out, T* sum,
                int64_t columns, int64_t x_stride, int64_t residual_stride, float eps, float offset) {
  const auto it = item();
  const auto group = it.get_group();
  const int64_t m = it.get_group(2);
  const int first = it.get_local_id(2), step = it.get_local_range(2);
  x += m * x_stride, out += m * columns;
  if (residual) residual += m * residual_stride, sum += m * columns;
  // The norm is that of the sum as it is stored.
  float total = 0.f;
  for (int64_t i = first; i < columns; i += step) {
    float v = load(x + i);
    if (residual) store(sum + i, v + load(residual + i)), v = load(sum + i);
    total += kMean ? v : v * v;
  }
  total = sycl::reduce_over_group(group, total, sycl::plus<float>()) / columns;
  const T* from = residual ? sum : x;
  float mean = kMean ? total : 0.f;
  if (kMean) {
    float sum1 = 0.f, sum2 = 0.f;  // of the differences to the mean; sum1 is what the mean's own rounding left
    for (int64_t i = first; i < columns; i += step) {
      const float v = load(from + i) - mean;
      sum1 += v, sum2 += v * v;
    }
    const float rest = sycl::reduce_over_group(group, sum1, sycl::plus<float>()) / columns;
    total = sycl::reduce_over_group(group, sum2, sycl::plus<float>()) / columns - rest * rest;
    mean += rest;
  }
  const float scale = 1.f / sycl::sqrt(total + eps);
  for (int64_t i = first; i < columns; i += step) {
    float v = (load(from + i) - mean) * scale;
    if (weight) v *= load_kind(weight, kind, i) + offset;
    if (bias) v += load_kind(bias, kind, i);
    store(out + i, v);
  }
}

}  // namespace norm

KERNEL(32)
void rms_norm(const T* x, const T* residual, const void* weight, int64_t kind, T* out, T* sum, int64_t columns,
              int64_t x_stride, int64_t residual_stride, float eps, float offset) {
  norm::row<false>(x, residual, weight, nullptr, kind, out, sum, columns, x_stride, residual_stride, eps, offset);
}

KERNEL(32)
void layer_norm(const T* x, const T* residual, const void* weight, const void* bias, int64_t kind, T* out, T* sum,
                int64_t columns, int64_t x_stride, int64_t residual_stride, float eps) {
  norm::row<true>(x, residual, weight, bias, kind, out, sum, columns, x_stride, residual_stride, eps, 0.f);
}
