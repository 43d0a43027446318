#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct AttentionKernels {};

}  // namespace llmrt
