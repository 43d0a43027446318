#pragma once
#include "gated.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr GatedKernels gated_kernels = {};

}  // namespace
}  // namespace llmrt
