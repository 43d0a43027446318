// The avx512_vnni tier: the kernel templates compiled with the flags that setup.py has for this file.
#include "tier_kernels.h"

const llmrt::Tier llmrt::tier_avx512_vnni = llmrt::tier_of("avx512_vnni", llmrt::linear_kernels);
