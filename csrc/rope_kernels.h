#pragma once
#include "norm_kernels.h"
#include "rope.h"

namespace llmrt {
namespace {

// Interleaved pairs lie side by side in a vector, so each cosine is needed twice side by side.
#if defined(__AVX512F__)
inline F32 each_twice(F32 a) {  // a0 a0 a1 a1 .. a7 a7
  return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v)};
}
inline F32 swap_pairs(F32 a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline F32 multiply_subtract_add(F32 a, F32 b, F32 c) { return {_mm512_fmaddsub_ps(a.v, b.v, c.v)}; }
#else
inline F32 each_twice(F32 a) { return {_mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))}; }
inline F32 swap_pairs(F32 a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
inline F32 multiply_subtract_add(F32 a, F32 b, F32 c) { return {_mm256_fmaddsub_ps(a.v, b.v, c.v)}; }
#endif

// One token's rows of cos and sin.
struct Angles {
  const void *cos, *sin;
  DType dtype;
  F32 cosines(int64_t i, int64_t n) const { return load(cos, dtype, i, n); }
  F32 sines(int64_t i, int64_t n) const { return load(sin, dtype, i, n); }
};

// One token of the query or of the key.
template <class T>
struct TokenHeads {
  const T* in;
  T* out;
  int64_t heads, stride, out_stride;
  TokenHeads(const RopeHeads& x, int64_t b, int64_t s, int64_t slot)
      : in((const T*)x.in + b * x.stride_b + s * x.stride_s),
        out((T*)x.out + b * x.out_b + slot * x.out_s),
        heads(x.heads),
        stride(x.stride_h),
        out_stride(x.out_h) {}
  bool in_place() const { return in == out; }
};

// Normalizes every head into the output, from where it is rotated in place.
template <class T>
inline void normalize_heads(TokenHeads<T>& x, const RopeHeads& a, int64_t D, float eps, float offset) {
  if (!a.weight) return;
  for (int64_t h = 0; h < x.heads; h++)
    rms_row(x.in + h * x.stride, a.weight, a.weight_dtype, D, eps, offset, x.out + h * x.out_stride);
  x.in = x.out, x.stride = x.out_stride;
}

// Rotates the vector of pairs (i, i + half) of every head.
template <class T, class N>
inline void rotate_halves(const TokenHeads<T>& x, int64_t half, int64_t i, N n, F32 cos, F32 sin) {
  const F32 minus_sin = F32::zero() - sin;
  const T* in = x.in + i;
  T* out = x.out + i;
  for (int64_t h = 0; h < x.heads; h++, in += x.stride, out += x.out_stride) {
    const F32 a = load(in, n), b = load(in + half, n);
    store(out, fma(b, minus_sin, a * cos), n);
    store(out + half, fma(a, sin, b * cos), n);
  }
}

// Rotates the vector of elements from i on, pairs (i, i + 1), of every head.
template <class T, class N>
inline void rotate_interleaved(const TokenHeads<T>& x, int64_t i, N n, F32 cos, F32 sin) {
  const T* in = x.in + i;
  T* out = x.out + i;
  for (int64_t h = 0; h < x.heads; h++, in += x.stride, out += x.out_stride) {
    const F32 a = load(in, n);
    store(out, multiply_subtract_add(a, cos, swap_pairs(a) * sin), n);
  }
}

// Copies the elements behind the rotated ones.
template <class T>
inline void copy_rest(const TokenHeads<T>& x, int64_t D, int64_t R) {
  const int64_t bytes = (D - R) * (int64_t)sizeof(T);
  if (!bytes || x.in_place()) return;
  for (int64_t h = 0; h < x.heads; h++) {
    const char* in = (const char*)(x.in + h * x.stride + R);
    char* out = (char*)(x.out + h * x.out_stride + R);
    if (bytes < 32) {
      memcpy(out, in, bytes);
      continue;
    }
    for (int64_t i = 0;; i = i + 64 <= bytes ? i + 32 : bytes - 32) {
      _mm256_storeu_si256((__m256i*)(out + i), _mm256_loadu_si256((const __m256i*)(in + i)));
      if (i + 32 == bytes) break;
    }
  }
}

// Calls f(i, n) for vectors that cover [0, count). The last one overlaps its neighbour instead of being partial, unless
// outputs are inputs: then an element may be done once only.
template <class Function>
inline void cover(int64_t count, bool in_place, Function f) {
  constexpr int64_t L = F32::lanes;
  if (in_place) return for_each_vector(count, f);
  if (count < L) return f(0, count);
  for (int64_t i = 0;; i = i + 2 * L <= count ? i + L : count - L) {
    f(i, Whole{});
    if (i + L == count) break;
  }
}
inline int64_t lanes_of(Whole) { return F32::lanes; }
inline int64_t lanes_of(int64_t n) { return n; }

template <class T, bool interleaved>
void rotate_tokens(const RopeArgs& a, int64_t token0, int64_t token1) {
  const int64_t size = size_of(a.table_dtype);
  const RopeSlots& slots = a.key_slots;
  for (int64_t token = token0; token < token1; token++) {
    const int64_t b = token / a.S, s = token % a.S;
    TokenHeads<T> query(a.query, b, s, s), key(a.key, b, s, slots.slots ? slots.slots[s * slots.stride] : s);
    if (slots.every > 1 && b % slots.every) key.heads = 0;
    normalize_heads(query, a.query, a.D, a.eps, a.offset);
    normalize_heads(key, a.key, a.D, a.eps, a.offset);
    const int64_t row = a.positions ? a.positions[b * a.positions_b + s * a.positions_s] : s;
    const Angles angles{(const char*)a.cos.data + (b * a.cos.stride_b + row * a.cos.stride_s) * size,
                        (const char*)a.sin.data + (b * a.sin.stride_b + row * a.sin.stride_s) * size, a.table_dtype};
    if constexpr (interleaved) {
      cover(2 * a.half, query.in_place(), [&](int64_t i, auto n) {
        const F32 cos = each_twice(angles.cosines(i / 2, lanes_of(n) / 2));
        const F32 sin = each_twice(angles.sines(i / 2, lanes_of(n) / 2));
        rotate_interleaved(query, i, n, cos, sin);
        rotate_interleaved(key, i, n, cos, sin);
      });
    } else {
      cover(a.half, query.in_place(), [&](int64_t i, auto n) {
        const F32 cos = angles.cosines(i, lanes_of(n)), sin = angles.sines(i, lanes_of(n));
        rotate_halves(query, a.half, i, n, cos, sin);
        rotate_halves(key, a.half, i, n, cos, sin);
      });
    }
    copy_rest(query, a.D, 2 * a.half);
    copy_rest(key, a.D, 2 * a.half);
  }
}

constexpr RopeKernels rope_kernels = {
    {rotate_tokens<float, false>, rotate_tokens<bf16, false>, rotate_tokens<f16, false>},
    {rotate_tokens<float, true>, rotate_tokens<bf16, true>, rotate_tokens<f16, true>}};

}  // namespace
}  // namespace llmrt
