// An activation of one tensor times another; a work-group handles a part of one row.
#include "element.hpp"

namespace gated {
constexpr int kElements = 4;  // of one item; gated.py's ELEMENTS
}

KERNEL(32)
void gated_row(const T* gate, const T* up, T* out, int64_t columns, int64_t gate_stride, int64_t up_stride,
               int64_t activation) {
  const auto it = item();
  const int64_t m = it.get_group(2), step = it.get_local_range(2);
  gate += m * gate_stride, up += m * up_stride, out += m * columns;
  const int64_t first = it.get_group(1) * step * gated::kElements + it.get_local_id(2);
#pragma unroll
  for (int e = 0; e < gated::kElements; e++) {
    const int64_t i = first + e * step;
    if (i >= columns) return;
    const float x = load(gate + i);
    const float y = activation == 0 ? silu(x) : activation == 1 ? gelu(x) : gelu_tanh(x);
    store(out + i, y * load(up + i));
  }
}
