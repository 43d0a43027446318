#pragma once
#include "peaks.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr PeakKernels peak_kernels = {nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace llmrt
