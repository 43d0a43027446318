// Integer vectors and dot products of one ISA tier, for linears.
#pragma once
#include "vec.h"

namespace llmrt {
namespace {

#if defined(__AVX512F__)

constexpr int64_t kBlockRows = 12;  // 12 rows x 2 vectors = 24 accumulators of 32 registers

struct I32 {
  __m512i v;
  static I32 zero() { return {_mm512_setzero_si512()}; }
  static I32 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
};
inline I32 load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_words(void* p, I32 x) { _mm512_storeu_si512(p, x.v); }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int bits>
inline I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, bits)};
}
template <int bits>
inline I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, bits)};
}
template <int bits>
inline I32 shift_right_signed(I32 a) {
  return {_mm512_srai_epi32(a.v, bits)};
}
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 dot16(I32 a, I32 b) { return {_mm512_madd_epi16(a.v, b.v)}; }  // of 2 signed 16-bit numbers per lane
inline I32 round_to_int(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I32 bits_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
inline int32_t sum(I32 a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t max_of(I32 a) { return _mm512_reduce_max_epi32(a.v); }
inline I32 load_bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline void store_saturated(int8_t* p, I32 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }

// acc + for each lane the dot product of 4 unsigned and 4 signed bytes. Inline assembly for gcc, which otherwise copies
// and spills the accumulators of the larger tiles.
template <bool wide>
inline void dot(I32& acc, I32 w, I32 a) {
#if defined(__clang__)
  acc.v = _mm512_dpbusd_epi32(acc.v, w.v, a.v);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a.v));
#endif
}
#if defined(__AVX512BF16__)
constexpr bool kBf16Products = true;
inline void dot_bf16(F32& acc, I32 w, I32 a) {
#if defined(__clang__)
  acc.v = _mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)a.v);
#else
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a.v));
#endif
}
// (code - zero) * scale in bf16 of two 4-bit codes per lane, in the low bits of its halves; the bits above do not
// matter.
struct PairTable {
  __m512i values;
  PairTable(int zero, int scale) {
    const F32 low = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    const F32 v = mul(sub(low, F32::set1((float)zero)), F32::set1((float)scale));
    values = _mm512_broadcast_i64x4(to_bf16(v));
  }
};
inline I32 value_of(I32 codes, const PairTable& t) { return {_mm512_permutexvar_epi16(codes.v, t.values)}; }
#endif
inline F32 as_float(I32 a) { return {_mm512_castsi512_ps(a.v)}; }

// The 16 values of 4-bit codes; the bits of a lane above the code do not matter.
struct CodeTable {
  __m512 values;
  explicit CodeTable(int zero)
      : values(_mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                             _mm512_set1_ps((float)zero))) {}
};
inline F32 value_of(I32 codes, const CodeTable& t) { return {_mm512_permutexvar_ps(codes.v, t.values)}; }

#else  // AVX2

#if defined(__AVXVNNI__)
constexpr int64_t kBlockRows = 6;  // 12 accumulators, 2 vectors of weights and a broadcast: 15 of 16 registers
#else
constexpr int64_t kBlockRows = 4;  // 8 accumulators, as the dot product takes registers too
#endif

struct I32 {
  __m256i v;
  static I32 zero() { return {_mm256_setzero_si256()}; }
  static I32 set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
};
inline I32 load_words(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
inline void store_words(void* p, I32 x) { _mm256_storeu_si256((__m256i*)p, x.v); }
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int bits>
inline I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.v, bits)};
}
template <int bits>
inline I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.v, bits)};
}
template <int bits>
inline I32 shift_right_signed(I32 a) {
  return {_mm256_srai_epi32(a.v, bits)};
}
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 dot16(I32 a, I32 b) { return {_mm256_madd_epi16(a.v, b.v)}; }  // of 2 signed 16-bit numbers per lane
inline I32 round_to_int(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
inline I32 bits_of(F32 a) { return {_mm256_castps_si256(a.v)}; }
inline int32_t sum(I32 a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline int32_t max_of(I32 a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline I32 load_bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
inline void store_saturated(int8_t* p, I32 a) {
  __m128i x = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(x, x));
}

#if defined(__AVXVNNI__)
// acc + for each lane the dot product of 4 unsigned and 4 signed bytes.
template <bool wide>
inline void dot(I32& acc, I32 w, I32 a) {
#if defined(__clang__) || defined(_mm256_dpbusd_avx_epi32)  // a macro in its place: tests emulate the instruction
  acc.v = _mm256_dpbusd_avx_epi32(acc.v, w.v, a.v);
#else
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.v) : "x"(w.v), "x"(a.v));
#endif
}
#else
// Inline assembly for gcc, which otherwise copies and spills the sums.
inline void add_to(I32& acc, __m256i x) {
#if defined(__clang__)
  acc.v = _mm256_add_epi32(acc.v, x);
#else
  __asm__("vpaddd %1, %0, %0" : "+x"(acc.v) : "x"(x));
#endif
}

// vpmaddubsw saturates at 16 bits: never for 4-bit codes (2 * 15 * 127); 8-bit codes (`wide`) go as two nibbles.
template <bool wide>
inline void dot(I32& acc, I32 w, I32 a) {
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  if (wide) {
    __m256i l = _mm256_maddubs_epi16(_mm256_and_si256(w.v, low), a.v);
    __m256i h = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w.v, 4), low), a.v);
    add_to(acc, _mm256_madd_epi16(l, ones));
    add_to(acc, _mm256_madd_epi16(h, _mm256_set1_epi16(16)));
  } else {
    add_to(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w.v, a.v), ones));
  }
}
#endif
inline F32 as_float(I32 a) { return {_mm256_castsi256_ps(a.v)}; }

struct CodeTable {
  I32 zero;
  explicit CodeTable(int z) : zero(I32::set1(z)) {}
};
inline F32 value_of(I32 codes, const CodeTable& t) { return to_float((codes & I32::set1(15)) - t.zero); }

#endif

#if !defined(__AVX512BF16__)
constexpr bool kBf16Products = false;
inline void dot_bf16(F32&, I32, I32) {}  // never called: the entry point asks for f32 then
struct PairTable {
  PairTable(int, int) {}
};
inline I32 value_of(I32 codes, const PairTable&) { return codes; }
#endif

constexpr int64_t kHalves = 16 / F32::lanes;  // passes over a tile: two vectors of outputs at a time
constexpr int64_t kHalfN = kTileN / kHalves;  // outputs of one pass
constexpr int64_t kVectorBytes = 4 * F32::lanes;

inline I32 low_nibbles(I32 w) { return w & I32::set1(0x0f0f0f0f); }
inline I32 high_nibbles(I32 w) { return shift_right<4>(w) & I32::set1(0x0f0f0f0f); }
// High nibbles as factors of a dot product that is shifted right by kHighShift later: in place where nothing saturates.
#if defined(__AVX512F__) || defined(__AVXVNNI__)
constexpr int kHighShift = 4;
inline I32 high_in_place(I32 w) { return w & I32::set1((int32_t)0xf0f0f0f0); }
#else
constexpr int kHighShift = 0;
inline I32 high_in_place(I32 w) { return high_nibbles(w); }
#endif
inline I32 broadcast(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return I32::set1(x);
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Asks for the line as owner, which __builtin_prefetch does only where a compiler flag allows it; a no-op on CPUs
// without.
inline void prefetch_to_write(const void* p) { __asm__ volatile("prefetchw (%0)" : : "r"(p)); }

}  // namespace
}  // namespace llmrt
