#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

struct GatedKernels {};

}  // namespace llmrt
