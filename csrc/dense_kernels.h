// Products of a few rows with a row-major weight, bound by the reading of the weight: dots of R weight rows with C rows
// of x in registers, 16 or 8 outputs at a time. Every dot is one chain of vector sums over k, whatever R and C are, so
// results depend neither on the number of threads nor on the rows beside them.
#pragma once
#include "dense.h"
#include "epilogue_kernels.h"
#include "linear.h"
#include "linear_vec.h"
#include "row.h"

namespace llmrt {
namespace {

// One step along a row, as registers that enter a dot product; `count` elements of it at the end of a row.
template <class T>
struct Step {
  static constexpr int64_t size = F32::lanes;
  F32 v;
  static Step of(const T* p) { return {load(p)}; }
  static Step of(const T* p, int64_t count) { return {load(p, count)}; }
};
template <class T>
inline void dot(F32& acc, Step<T> w, Step<T> x) {
  acc = fma(w.v, x.v, acc);
}

// bf16: words of two elements, which need no order in a dot product.
#if defined(__AVX512F__)
inline I32 load_pairs(const bf16* p, int64_t count) {
  return {_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p)};
}
#else
inline I32 load_pairs(const bf16* p, int64_t count) {
  bf16 lane[2 * F32::lanes] = {};
  memcpy(lane, p, 2 * count);
  return load_words(lane);
}
#endif
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int64_t size = 2 * F32::lanes;
  I32 pairs;
  static Step of(const bf16* p) { return {load_words(p)}; }
  static Step of(const bf16* p, int64_t count) { return {load_pairs(p, count)}; }
};
inline void dot(F32& acc, Step<bf16> w, Step<bf16> x) { dot_bf16(acc, w.pairs, x.pairs); }
#else
template <>
struct Step<bf16> {
  static constexpr int64_t size = 2 * F32::lanes;
  F32 even, odd;
  static Step of(I32 x) { return {as_float(shift_left<16>(x)), as_float(x & I32::set1((int32_t)0xffff0000))}; }
  static Step of(const bf16* p) { return of(load_words(p)); }
  static Step of(const bf16* p, int64_t count) { return of(load_pairs(p, count)); }
};
inline void dot(F32& acc, Step<bf16> w, Step<bf16> x) { acc = fma(w.odd, x.odd, fma(w.even, x.even, acc)); }
#endif

constexpr int64_t kDenseBlock = F32::lanes;  // outputs that are finished at a time
// Rows of x in registers: with up to kFew of them 8 weight rows, else 4 (32 or 16 registers hold R * C sums).
constexpr int kFew = sizeof(F32) == 64 ? 2 : 1, kTogether = sizeof(F32) == 64 ? 4 : 2;
constexpr int64_t kDenseRows = 64, kDenseBytes = 512 << 10;  // of x per sweep over the weight: they stay in L2
// The R weight rows to come are prefetched into L2 while those before are read: R streams of one page each are too
// short for the hardware's prefetcher. Rows so long that they would fill L2 are streams that it follows, with a little
// help.
constexpr int64_t kAheadBytes = 128 << 10, kAheadInRow = 2048;

template <class T>
struct DotArgs {
  const T *weight, *x;
  int64_t ldw, ldx, K;
  float* y;    // [C][kDenseBlock]
  bool first;  // to read these weight rows
};

// y[c][r] = weight[r] . x[c] for r < R; rows from `last` on are the last one again.
template <class T, int R, int C, bool prefetch>
inline __attribute__((always_inline)) void dots(const DotArgs<T>& a, int64_t last) {
  constexpr int64_t size = Step<T>::size;
  const T *w[R], *x[C];
  F32 acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) w[r] = a.weight + (r < last ? r : last) * a.ldw;
#pragma GCC unroll 4
  for (int c = 0; c < C; c++) x[c] = a.x + c * a.ldx;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = F32::zero();
  const int64_t block = R * a.ldw * (int64_t)sizeof(T), ahead = block <= kAheadBytes ? block : kAheadInRow;
  int64_t k = 0;
  for (; k + size <= a.K; k += size) {
    Step<T> s[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) s[c] = Step<T>::of(x[c] + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Step<T> t = Step<T>::of(w[r] + k);
      if (prefetch) __builtin_prefetch((const char*)(w[r] + k) + ahead, 0, 2);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) dot(acc[r][c], t, s[c]);
    }
  }
  if (k < a.K) {
    Step<T> s[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) s[c] = Step<T>::of(x[c] + k, a.K - k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Step<T> t = Step<T>::of(w[r] + k, a.K - k);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) dot(acc[r][c], t, s[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) a.y[c * kDenseBlock + r] = sum(acc[r][c]);
}

template <class T, int R, int C>
__attribute__((noinline)) void dots_of(const DotArgs<T>& a, int64_t last) {
  if (a.first)
    dots<T, R, C, true>(a, last);
  else
    dots<T, R, C, false>(a, last);
}

// By R == 4 and by C.
constexpr int kThree = kTogether < 3 ? kTogether : 3;  // no more exist
template <class T>
constexpr void (*kDots[2][5])(const DotArgs<T>&, int64_t) = {
    {nullptr, dots_of<T, 8, 1>, dots_of<T, 8, kFew>},
    {nullptr, dots_of<T, 4, 1>, dots_of<T, 4, 2>, dots_of<T, 4, kThree>, dots_of<T, 4, kTogether>}};

// y[m][j] = weight[n + j] . x[m0 + m] for j < count.
template <class T>
void dot_block(const DenseArgs& a, const DenseArgs::Linear& l, int64_t n, int64_t count, int64_t m0, int64_t rows,
               float* y) {
  const bool many = rows > kFew;
  const int64_t R = many ? 4 : 8;
  for (int64_t j = 0; j < count; j += R)
    for (int64_t m = 0; m < rows; m += kTogether) {
      const DotArgs<T> d{(const T*)l.weight + (n + j) * l.ld,
                         (const T*)a.x + (m0 + m) * a.ldx,
                         l.ld,
                         a.ldx,
                         a.K,
                         y + m * kDenseBlock + j,
                         m == 0};
      kDots<T>[many][rows - m < kTogether ? rows - m : kTogether](d, count - j - 1);
    }
}

template <class T, class Count>
inline F32 apply(const DenseArgs& a, F32 y, int64_t m, int64_t n, Count count) {
  if (a.epilogue == Epilogue::add) return y + load((const T*)a.other + m * a.ldo + n, count);
  if (a.epilogue == Epilogue::mul) return y * load((const T*)a.other + m * a.ldo + n, count);
  return activate(y, a.epilogue);
}

template <class T>
void dense_multiply(const DenseArgs& a, int64_t n0, int64_t n1) {
  float y[kDenseRows * kDenseBlock], u[kDenseRows * kDenseBlock];
  const bool gated = a.epilogue >= Epilogue::silu_mul;
  int64_t chunk = kDenseBytes / ((a.K + !a.K) * (int64_t)sizeof(T)) / kTogether * kTogether;
  chunk = chunk < kTogether ? kTogether : chunk > kDenseRows ? kDenseRows : chunk;
  for (int64_t m0 = 0; m0 < a.M; m0 += chunk) {
    const int64_t rows = a.M - m0 < chunk ? a.M - m0 : chunk;
    for (int64_t n = n0; n < n1; n += kDenseBlock) {
      const int64_t count = n1 - n < kDenseBlock ? n1 - n : kDenseBlock;
      F32 b = F32::zero(), bu = F32::zero();
      dot_block<T>(a, a.linear, n, count, m0, rows, y);
      if (a.linear.bias) b = load((const T*)a.linear.bias + n, count);
      if (gated) dot_block<T>(a, a.up, n, count, m0, rows, u);
      if (gated && a.up.bias) bu = load((const T*)a.up.bias + n, count);
      for (int64_t m = 0; m < rows; m++) {
        F32 v = apply<T>(a, load(y + m * kDenseBlock, count) + b, m0 + m, n, count);
        if (gated) v = v * (load(u + m * kDenseBlock, count) + bu);
        store((T*)a.out + (m0 + m) * a.N + n, v, count);
      }
    }
  }
}

template <class T>
void dense_finish(const DenseArgs& a, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; m++) {
    T* out = (T*)a.out + m * a.N;
    for_each_vector(
        a.N, [&](int64_t n, auto count) { store(out + n, apply<T>(a, load(out + n, count), m, n, count), count); });
  }
}

constexpr DenseKernels dense_kernels = {{dense_multiply<float>, dense_multiply<bf16>, dense_multiply<f16>},
                                        {dense_finish<float>, dense_finish<bf16>, dense_finish<f16>}};

}  // namespace
}  // namespace llmrt
