// All kernel templates, and the table that a tier file makes of them.
#pragma once
#include "argmax_kernels.h"
#include "attention_kernels.h"
#include "dense_kernels.h"
#include "experts_kernels.h"
#include "gated_kernels.h"
#include "linear_kernels.h"
#include "norm_kernels.h"
#include "peaks_kernels.h"
#include "quantize_weight_kernels.h"
#include "rope_kernels.h"
#include "static_linear_kernels.h"
#include "tier.h"

namespace llmrt {
namespace {

constexpr Tier tier_of(const char* name, const LinearKernels& linear,
                       const StaticLinearKernels& static_linear = static_linear_kernels) {
  return {name,           linear,           dense_kernels,     norm_kernels,
          rope_kernels,   gated_kernels,    attention_kernels, peak_kernels,
          argmax_kernels, quantize_kernels, static_linear,     expert_kernels};
}

}  // namespace
}  // namespace llmrt
