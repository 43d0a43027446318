// What linears do with a product before they round it.
#pragma once

namespace llmrt {

enum class Epilogue : int { none, relu, silu, gelu, gelu_tanh, add, mul, silu_mul, gelu_mul, gelu_tanh_mul };

}  // namespace llmrt
