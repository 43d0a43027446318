#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct LinearKernels {};

}  // namespace llmrt
