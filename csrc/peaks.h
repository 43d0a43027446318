// Probes of the machine's limits, for `llmrt doctor` and for the percentages in benchmarks.
#pragma once
#include <stdint.h>

namespace llmrt {

// Each runs `iterations` rounds of independent dot-product or FMA chains on the calling thread and returns the number
// of operations done (a multiply and an add count as two); null where the tier has no such instruction.
struct PeakKernels {
  double (*int8)(int64_t iterations);
  double (*bf16)(int64_t iterations);
  double (*fp32)(int64_t iterations);
  int64_t (*read)(const void* bytes, int64_t count);  // reads count bytes (a multiple of 256), returns a checksum
};

}  // namespace llmrt
