// The place of the first largest element; one work-group per row. Not a number is larger than all.
#include "element.hpp"

namespace argmax {

// Numbers in their order as unsigned integers; 0.f and -0.f are the same.
inline uint32_t ordered(float v) {
  if (v != v) return 0xffffffff;
  const uint32_t bits = sycl::bit_cast<uint32_t>(v + 0.f);
  return v == 0.f ? 0x80000000 : bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

}  // namespace argmax

KERNEL(32)
void argmax_row(const T* x, int64_t* out, int64_t columns, int64_t stride) {
  const auto it = item();
  const int64_t m = it.get_group(2);
  const uint32_t step = it.get_local_range(2), count = columns;
  x += m * stride;
  uint32_t best = 0, place = 0;
  for (uint32_t i = it.get_local_id(2); i < count; i += step) {
    const uint32_t v = argmax::ordered(load(x + i));
    if (v > best) best = v, place = i;
  }
  const uint64_t mine = static_cast<uint64_t>(best) << 32 | (0xffffffff - place);
  const uint64_t most = sycl::reduce_over_group(it.get_group(), mine, sycl::maximum<uint64_t>());
  if (it.get_local_id(2) == 0) out[m] = 0xffffffff - static_cast<uint32_t>(most);
}
