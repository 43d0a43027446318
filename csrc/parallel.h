// OpenMP for entry points (never for tier files: they may be built by a compiler with another OpenMP runtime). The
// extension shares libgomp with torch, so torch.set_num_threads rules here too.
#pragma once
#include <omp.h>
#include <stdint.h>

#include <atomic>
#include <memory>

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

// Like parallel_ranges, but in `per_thread` pieces per thread, of which each thread, done with its own, takes
// from the others: a thread that the system holds up leaves its work to the others, and yet each works on neighbouring
// pieces. Each thread calls start() once and hands its result to f(state, begin, end).
template <class Start, class Function>
void parallel_pieces(int64_t count, int64_t per_thread, const Start& start, const Function& f) {
  if (count <= 0) return;
  constexpr int64_t kMost = 1024;
  int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads > count) threads = count;
  if (threads > kMost) threads = kMost;
  if (threads <= 1) return f(start(), 0, count);
  struct alignas(64) Share {
    std::atomic<int64_t> next{0}, end{0};
  };
  static thread_local std::unique_ptr<Share[]> shares(new Share[kMost]);
  Share* const share = shares.get();
  const int64_t pieces = count < per_thread * threads ? count : per_thread * threads;
  for (int64_t t = 0; t < threads; t++) {
    share[t].next.store(pieces * t / threads, std::memory_order_relaxed);
    share[t].end.store(pieces * (t + 1) / threads, std::memory_order_relaxed);
  }
#pragma omp parallel num_threads(threads)
  {
    const auto state = start();
    const int64_t first = omp_get_thread_num();
    for (int64_t t = 0; t < threads; t++) {
      Share& s = share[(first + t) % threads];
      for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end.load(std::memory_order_relaxed);)
        f(state, count * i / pieces, count * (i + 1) / pieces);
    }
  }
}

}  // namespace llmrt
