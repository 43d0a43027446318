// measure_peak: times the probes of the tier in use on several threads at once.
#include "peaks.h"

#include <omp.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "tier.h"

namespace llmrt {
namespace {

constexpr int64_t kHugePage = 2 << 20;
// Seconds of a compute round: long against the clock and the barrier, short against the time slices of a busy machine's
// scheduler, so that some rounds run undisturbed.
constexpr double kRound = 1e-3;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs work(thread, threads) on all threads at once; returns the sum of the results over the time from the first start
// to the last end.
template <class Work>
double rate(int threads, const Work& work) {
  double done = 0, start = std::numeric_limits<double>::max(), end = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done) reduction(min : start) reduction(max : end)
  {
#pragma omp barrier
    start = now();
    done += work(omp_get_thread_num(), omp_get_num_threads());
    end = now();
  }
  return done / (end - start);
}

// The best rate of the rounds that start within `seconds`.
template <class Work>
double best_rate(int threads, double seconds, const Work& work) {
  const double stop = now() + seconds;
  double best = 0;
  do best = std::max(best, rate(threads, work));
  while (now() < stop);
  return best;
}

double compute_rate(double (*chains)(int64_t), int threads, double seconds) {
  int64_t iterations = 1024;
  for (double start = now(); chains(iterations), now() - start < kRound; start = now()) iterations *= 2;
  return best_rate(threads, seconds, [&](int, int) { return chains(iterations); });
}

// Memory on huge pages where the system has them, so that page table walks do not limit the reads.
class Buffer {
 public:
  explicit Buffer(int64_t size) : mapped_(size + kHugePage) {
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    data = (char*)(((uintptr_t)base_ + kHugePage - 1) / kHugePage * kHugePage);
    madvise(data, size, MADV_HUGEPAGE);
  }
  ~Buffer() { munmap(base_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data;

 private:
  size_t mapped_;
  void* base_;
};

double read_rate(int64_t (*read)(const void*, int64_t), int threads, double seconds) {
  const int64_t l3 = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
  const int64_t size = std::max<int64_t>(int64_t{1} << 30, 8 * l3);
  const Buffer buffer(size);
  const auto share = [&](int count) { return size / count / 256 * 256; };  // of one thread, in bytes
  // The thread that reads a page also touches it first: the page then lies in the memory next to it.
  rate(threads, [&](int t, int n) -> double {
    memset(buffer.data + t * share(n), 1, share(n));
    return share(n);
  });
  return best_rate(threads, seconds, [&](int t, int n) -> double {
    read(buffer.data + t * share(n), share(n));
    return share(n);
  });
}

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

double measure_peak(const char* kind, int64_t threads, double seconds) {
  const std::string name = kind;
  check(name == "int8" || name == "bf16" || name == "fp32" || name == "read",
        "kind is '" + name + "'; valid: int8, bf16, fp32, read");
  const int processors = omp_get_num_procs();
  check(1 <= threads && threads <= processors,
        "threads is " + std::to_string(threads) + "; valid: 1 to " + std::to_string(processors));
  check(0 < seconds && seconds <= 60, "seconds is " + std::to_string(seconds) + "; valid: above 0, at most 60");
  const Tier* tier = current_tier();
  if (!tier) return 0;
  if (name == "read") return read_rate(tier->peaks.read, (int)threads, seconds);
  const auto chains = name == "int8" ? tier->peaks.int8 : name == "bf16" ? tier->peaks.bf16 : tier->peaks.fp32;
  return chains ? compute_rate(chains, (int)threads, seconds) : 0;
}

}  // namespace llmrt
