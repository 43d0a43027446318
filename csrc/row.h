// Loops over the vectors of one row of K elements, included by tier files only. The callbacks get the index of a
// vector's first element and how much of the vector exists: `Whole`, or at the end a count; load and store take either.
#pragma once
#include "vec.h"

namespace llmrt {
namespace {

struct Whole {};

template <class T>
inline F32 load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline void store(T* p, F32 x, Whole) {
  store(p, x);
}

// Calls f(i, n) for each vector.
template <class Function>
inline void for_each_vector(int64_t K, Function f) {
  int64_t i = 0;
  for (; i + F32::lanes <= K; i += F32::lanes) f(i, Whole{});
  if (i < K) f(i, K - i);
}

// Folds s = f(i, n, s) over the vectors. Four chains, because one would wait for the latency of its additions.
template <class Sums, class Function>
inline Sums fold_vectors(int64_t K, Sums zero, Function f) {
  constexpr int64_t L = F32::lanes;
  Sums a = zero, b = zero, c = zero, d = zero;
  int64_t i = 0;
  for (; i + 4 * L <= K; i += 4 * L) {
    a = f(i, Whole{}, a), b = f(i + L, Whole{}, b);
    c = f(i + 2 * L, Whole{}, c), d = f(i + 3 * L, Whole{}, d);
  }
  for (; i + L <= K; i += L) a = f(i, Whole{}, a);
  if (i < K) b = f(i, K - i, b);
  return (a + b) + (c + d);
}

}  // namespace
}  // namespace llmrt
