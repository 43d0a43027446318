// The amx tier: the kernel templates compiled with the flags that setup.py has for this file.
#include "linear_matrix_kernels.h"
#include "static_linear_matrix_kernels.h"
#include "tier_kernels.h"

const llmrt::Tier llmrt::tier_amx =
    llmrt::tier_of("amx", llmrt::matrix_linear_kernels, llmrt::matrix_static_linear_kernels);
