// Probes of the machine's limits, for `llmrt doctor` and for the percentages in benchmarks.
#pragma once
#include <stdint.h>

namespace llmrt {

// The first three run `iterations` rounds of independent dot-product or FMA chains on the calling thread and return the
// number of operations done (a multiply and an add count as two); null where the tier has no such instruction.
struct PeakKernels {
  double (*int8)(int64_t iterations);
  double (*bf16)(int64_t iterations);
  double (*fp32)(int64_t iterations);
  int64_t (*read)(const void* bytes, int64_t count);  // reads count bytes (a multiple of 256), returns a checksum
};

// Returns the best rate of the repetitions that start within `seconds`, all `threads` busy at once: for kind int8, bf16
// and fp32 operations per second, for read bytes per second over a buffer far larger than the caches. 0 where the tier
// lacks the instruction, or there is no tier. Throws std::invalid_argument, or std::bad_alloc without memory for the
// buffer.
double measure_peak(const char* kind, int64_t threads, double seconds);

}  // namespace llmrt
