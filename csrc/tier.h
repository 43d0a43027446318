// One table of kernels per ISA tier; the entry points call through `tier()`. See tiers/*.cpp for who fills it.
#pragma once
#include "argmax.h"
#include "attention.h"
#include "dense.h"
#include "experts.h"
#include "gated.h"
#include "linear.h"
#include "norm.h"
#include "peaks.h"
#include "quantize_weight.h"
#include "rope.h"
#include "static_linear.h"

namespace llmrt {

struct Tier {
  const char* name;
  LinearKernels linear;
  DenseKernels dense;
  NormKernels norm;
  RopeKernels rope;
  GatedKernels gated;
  AttentionKernels attention;
  PeakKernels peaks;
  ArgmaxKernels argmax;
  QuantizeKernels quantize;
  StaticLinearKernels static_linear;
  ExpertKernels experts;
};

extern const Tier tier_avx2, tier_avx_vnni, tier_avx512_vnni, tier_avx512_bf16, tier_amx;

// The table in use: the best that CPU and OS support, or the lower one that LLMRT_CPU_ISA names; null where the CPU is
// below AVX2 or LLMRT_CPU_ISA=reference (then no CPU kernel is registered and the Python references run).
const Tier* current_tier();
inline const Tier& tier() { return *current_tier(); }

}  // namespace llmrt
