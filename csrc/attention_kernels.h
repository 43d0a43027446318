#pragma once
#include "attention.h"
#include "vec.h"

namespace llmrt {
namespace {

constexpr AttentionKernels attention_kernels = {};

}  // namespace
}  // namespace llmrt
