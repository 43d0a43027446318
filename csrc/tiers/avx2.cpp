// The avx2 tier: the kernel templates compiled with the flags that setup.py has for this file.
#include "tier_kernels.h"

const llmrt::Tier llmrt::tier_avx2 = llmrt::tier_of("avx2", llmrt::linear_kernels);
