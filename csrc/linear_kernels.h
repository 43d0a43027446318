#pragma once
#include "linear.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr LinearKernels linear_kernels = {};

}  // namespace
}  // namespace llmrt
