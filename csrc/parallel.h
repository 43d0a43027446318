// OpenMP for entry points (never for tier files: they may be built by a compiler with another OpenMP runtime). The
// extension shares libgomp with torch, so torch.set_num_threads rules here too.
#pragma once
#include <omp.h>
#include <stdint.h>

namespace llmrt {

// Splits [0, count) into one contiguous range per thread, at least `grain` long, and calls f(begin, end).
template <class Function>
void parallel_ranges(int64_t count, int64_t grain, const Function& f) {
  if (count <= 0) return;
  int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int64_t most = (count + grain - 1) / grain;
  if (threads > most) threads = most;
  if (threads <= 1) return f(0, count);
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
    if (count * t / n < count * (t + 1) / n) f(count * t / n, count * (t + 1) / n);
  }
}

}  // namespace llmrt
