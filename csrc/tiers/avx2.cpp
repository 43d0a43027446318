// The avx2 tier: the kernel templates compiled with the flags that setup.py has for this file.
#include "attention_kernels.h"
#include "dense_kernels.h"
#include "gated_kernels.h"
#include "linear_kernels.h"
#include "norm_kernels.h"
#include "peaks_kernels.h"
#include "quantize_weight_kernels.h"
#include "rope_kernels.h"
#include "tier.h"

const llmrt::Tier llmrt::tier_avx2 = {"avx2",        linear_kernels,    dense_kernels, norm_kernels,    rope_kernels,
                                      gated_kernels, attention_kernels, peak_kernels,  quantize_kernels};
