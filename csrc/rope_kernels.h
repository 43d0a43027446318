#pragma once
#include "rope.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr RopeKernels rope_kernels = {};

}  // namespace
}  // namespace llmrt
