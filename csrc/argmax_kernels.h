#pragma once
#include "argmax.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr int64_t kSearched = 512;  // elements whose largest is found before its place is

// The first largest of a few floats.
inline Largest first_largest(const float* x, int64_t count, int64_t index) {
  Largest best{x[0], index};
  for (int64_t i = 1; i < count; i++) {
    const Largest next{x[i], index + i};
    if (next.above(best)) best = next;
  }
  return best;
}

template <class T>
Largest largest(const void* row, int64_t begin, int64_t end) {
  const T* x = (const T*)row;
  Largest best{0, -1};
  float floats[kSearched];
  for (int64_t i = begin; i < end; i += kSearched) {
    const int64_t count = end - i < kSearched ? end - i : kSearched, whole = count / F32::lanes * F32::lanes;
    F32 most = F32::set1(-__builtin_inff()), zero = F32::zero();
    for (int64_t j = 0; j < whole; j += F32::lanes) {
      const F32 v = load(x + i + j);
      most = max(most, v), zero = fma(v, F32::zero(), zero);
    }
    // A NaN, which max may lose, and infinities make this sum NaN: then, and where a larger one is, look at each
    // element.
    const bool finite = sum(zero) == 0;
    if (finite && whole == count && best.index >= 0 && !(max_of(most) > best.value)) continue;
    for (int64_t j = 0; j < whole; j += F32::lanes) store(floats + j, load(x + i + j));
    if (whole < count) store(floats + whole, load(x + i + whole, count - whole), count - whole);
    const Largest here = first_largest(floats, count, i);
    if (best.index < 0 || here.above(best)) best = here;
  }
  return best;
}

constexpr ArgmaxKernels argmax_kernels = {{largest<float>, largest<bf16>, largest<f16>}};

}  // namespace
}  // namespace llmrt
