#pragma once
#include "experts.h"
#include "row.h"

namespace llmrt {
namespace {

void add_rows(const AddRowsArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < a.count; r++) {
    alignas(64) float score[F32::lanes];
    store(score, load(a.scores, a.dtype, a.places[r], 1));
    const F32 factor = F32::set1(score[0]);
    const float* row = a.rows + r * a.H + begin;
    float* sums = a.sums + a.places[r] / a.k * a.H + begin;
    for_each_vector(end - begin,
                    [&](int64_t i, auto n) { store(sums + i, fma(factor, load(row + i, n), load(sums + i, n)), n); });
  }
}

template <class T>
void round_elements(const float* sums, T* out, int64_t count) {
  for_each_vector(count, [&](int64_t i, auto n) { store(out + i, load(sums + i, n), n); });
}

void round_sums(const float* sums, void* out, DType dtype, int64_t begin, int64_t end) {
  if (dtype == DType::f32) round_elements(sums + begin, (float*)out + begin, end - begin);
  if (dtype == DType::bf16) round_elements(sums + begin, (bf16*)out + begin, end - begin);
  if (dtype == DType::f16) round_elements(sums + begin, (f16*)out + begin, end - begin);
}

constexpr ExpertKernels expert_kernels = {add_rows, round_sums};

}  // namespace
}  // namespace llmrt
