#pragma once
#include "peaks.h"
#include "vec.h"

#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace llmrt {
namespace {

// Enough for 6 cycles of latency at 2 instructions per cycle, few enough that the 16 registers of AVX2 hold them all.
constexpr int kChains = 12;

// Inline assembly in the steps keeps the compiler from seeing that all chains are equal; the sums have names because
// gcc 12 keeps an array of them on the stack.
template <class Vector, class Step>
inline double run_chains(int64_t iterations, Vector zero, double operations, Step step) {
  Vector a = zero, b = zero, c = zero, d = zero, e = zero, f = zero;
  Vector g = zero, h = zero, i = zero, j = zero, k = zero, l = zero;
  for (int64_t n = 0; n < iterations; n++) {
    step(a), step(b), step(c), step(d), step(e), step(f);
    step(g), step(h), step(i), step(j), step(k), step(l);
  }
  return (double)iterations * kChains * operations;
}

#if defined(__AMX_INT8__)

// 4 accumulators of 16 x 16, to which a step adds products of depth 64 (int8) or 32 (bf16). The factors are zero.
template <class Step>
inline double run_tiles(int64_t iterations, double depth, Step step) {
  const TileRegisters registers(2 * kRegisterRows, kRegisterRowBytes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < iterations; n++) step();
  return (double)iterations * 4 * 2 * 16 * 16 * depth;
}
double int8_chains(int64_t iterations) {
  return run_tiles(iterations, 64, [] {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  });
}
double bf16_chains(int64_t iterations) {
  return run_tiles(iterations, 32, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

#elif defined(__AVX512F__)

double int8_chains(int64_t iterations) {
  const __m512i x = _mm512_set1_epi8(1);
  return run_chains(iterations, _mm512_setzero_si512(), 128, [x](__m512i& sum) {
    __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

#endif

#if defined(__AVX512F__)

double fp32_chains(int64_t iterations) {
  const __m512 x = _mm512_set1_ps(1);
  return run_chains(iterations, _mm512_setzero_ps(), 32, [x](__m512& sum) {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}

#else

#if defined(__AVXVNNI__)
double int8_chains(int64_t iterations) {
  const __m256i x = _mm256_set1_epi8(1);
  return run_chains(iterations, _mm256_setzero_si256(), 64, [x](__m256i& sum) {
    __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(x));
  });
}
#else
// vpmaddubsw adds pairs of u8 x s8 products to int16, vpmaddwd pairs of those to int32. Counted are the 32
// multiply-adds of the dot product, not the multiplications by one.
double int8_chains(int64_t iterations) {
  const __m256i x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  return run_chains(iterations, _mm256_setzero_si256(), 64, [x, ones](__m256i& sum) {
    __m256i pairs;
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(sum), "=&x"(pairs)
                     : "x"(x), "x"(ones));
  });
}
#endif
double fp32_chains(int64_t iterations) {
  const __m256 x = _mm256_set1_ps(1);
  return run_chains(iterations, _mm256_setzero_ps(), 16, [x](__m256& sum) {
    __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(x));
  });
}

#endif

#if defined(__AMX_INT8__)  // above
#elif defined(__AVX512BF16__)
double bf16_chains(int64_t iterations) {
  const __m512i x = _mm512_set1_epi16(0x3f80);  // 1
  return run_chains(iterations, _mm512_setzero_ps(), 64, [x](__m512& sum) {
    __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
}
#else
constexpr double (*bf16_chains)(int64_t) = nullptr;
#endif

int64_t read_bytes(const void* bytes, int64_t count) {
  const char *p = (const char*)bytes, *end = p + count;
#if defined(__AVX512F__)
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (; p < end; p += 256) {
    a = _mm512_add_epi64(a, _mm512_loadu_si512(p));
    b = _mm512_add_epi64(b, _mm512_loadu_si512(p + 64));
    c = _mm512_add_epi64(c, _mm512_loadu_si512(p + 128));
    d = _mm512_add_epi64(d, _mm512_loadu_si512(p + 192));
  }
  return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
#else
  const auto load = [](const char* q) { return _mm256_loadu_si256((const __m256i*)q); };
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (; p < end; p += 128) {
    a = _mm256_add_epi64(a, load(p));
    b = _mm256_add_epi64(b, load(p + 32));
    c = _mm256_add_epi64(c, load(p + 64));
    d = _mm256_add_epi64(d, load(p + 96));
  }
  int64_t lane[4];
  _mm256_storeu_si256((__m256i*)lane, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
  return lane[0] + lane[1] + lane[2] + lane[3];
#endif
}

constexpr PeakKernels peak_kernels = {int8_chains, bf16_chains, fp32_chains, read_bytes};

}  // namespace
}  // namespace llmrt
