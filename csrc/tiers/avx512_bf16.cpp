// The avx512_bf16 tier: the kernel templates compiled with the flags that setup.py has for this file.
#include "tier_kernels.h"

const llmrt::Tier llmrt::tier_avx512_bf16 = llmrt::tier_of("avx512_bf16", llmrt::linear_kernels);
