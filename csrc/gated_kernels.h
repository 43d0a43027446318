#pragma once
#include "gated.h"
#include "row.h"

namespace llmrt {
namespace {

template <class T, F32 (*activation)(F32)>
void gated_elements(const GatedArgs& a, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t m = begin / a.K, k = begin % a.K;
    const int64_t count = end - begin < a.K - k ? end - begin : a.K - k;
    const T* gate = (const T*)a.gate + m * a.ld_gate + k;
    const T* up = (const T*)a.up + m * a.ld_up + k;
    T* out = (T*)a.out + begin;
    for_each_vector(count,
                    [&](int64_t i, auto n) { store(out + i, activation(load(gate + i, n)) * load(up + i, n), n); });
    begin += count;
  }
}

constexpr GatedKernels gated_kernels = {
    {gated_elements<float, silu>, gated_elements<bf16, silu>, gated_elements<f16, silu>},
    {gated_elements<float, gelu>, gated_elements<bf16, gelu>, gated_elements<f16, gelu>},
    {gated_elements<float, gelu_tanh>, gated_elements<bf16, gelu_tanh>, gated_elements<f16, gelu_tanh>}};

}  // namespace
}  // namespace llmrt
