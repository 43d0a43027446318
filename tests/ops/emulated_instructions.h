// Instructions that most CPUs lack, in plain C++ after Intel's manual (volume 2), in place of their intrinsics:
// included before a tier file by force, it makes that file run on any CPU with the rest of its instructions. What a CPU
// would answer with an exception ends the process.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {
namespace emulated {

inline void demand(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "emulated instruction: %s\n", what);
  abort();
}

// VPDPBUSD ymm: sums wrap around.
inline __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
  uint32_t c[8];
  uint8_t a[32];
  int8_t b[32];
  memcpy(c, &sum, 32), memcpy(a, &u, 32), memcpy(b, &s, 32);
  for (int i = 0; i < 32; i++) c[i / 4] += (uint32_t)(a[i] * b[i]);
  memcpy(&sum, c, 32);
  return sum;
}

struct Tile {
  int rows = 0, row_bytes = 0;  // 0: not configured
  uint8_t data[16][64];
};
struct Registers {
  bool configured = false;
  Tile tile[8];
};
inline Registers& registers() {
  static thread_local Registers r;
  return r;
}
inline Tile& tile(int i) {
  demand(registers().configured, "a tile register without LDTILECFG");
  demand(0 <= i && i < 8, "no such tile register");
  demand(registers().tile[i].rows > 0, "a tile register without a shape");
  return registers().tile[i];
}

inline void loadconfig(const void* memory) {
  const uint8_t* p = (const uint8_t*)memory;
  demand(p[0] == 1, "palette");
  for (int i = 1; i < 16; i++) demand(p[i] == 0, "start_row or a reserved byte is not 0");
  Registers& r = registers();
  r = Registers();
  r.configured = true;
  for (int i = 0; i < 16; i++) {
    uint16_t bytes;
    memcpy(&bytes, p + 16 + 2 * i, 2);
    const int rows = p[48 + i];
    demand(bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0), "shape of a tile register");
    demand(i < 8 || rows == 0, "shape of a ninth tile register");
    if (i < 8) r.tile[i].rows = rows, r.tile[i].row_bytes = bytes, memset(r.tile[i].data, 0, sizeof(r.tile[i].data));
  }
}
inline void release() { registers() = Registers(); }
inline void zero(int i) { memset(tile(i).data, 0, sizeof(Tile::data)); }
inline void loadd(int i, const void* base, int64_t stride) {
  Tile& t = tile(i);
  memset(t.data, 0, sizeof(t.data));
  for (int r = 0; r < t.rows; r++) memcpy(t.data[r], (const char*)base + r * stride, t.row_bytes);
}
inline void stored(int i, void* base, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; r++) memcpy((char*)base + r * stride, t.data[r], t.row_bytes);
}
inline void demand_product(int c, int a, int b) {
  demand(c != a && c != b && a != b, "a tile register twice in a product");
  demand(tile(c).rows == tile(a).rows && tile(c).row_bytes == tile(b).row_bytes, "sizes of a product");
  demand(tile(a).row_bytes == 4 * tile(b).rows && tile(c).row_bytes % 4 == 0, "depth of a product");
}

// TDPBSUD: signed bytes of the left factor, unsigned ones of the right.
inline void dpbsud(int c, int a, int b) {
  demand_product(c, a, b);
  const Tile &x = tile(a), &w = tile(b);
  Tile& y = tile(c);
  for (int m = 0; m < y.rows; m++) {
    uint32_t row[16];
    memcpy(row, y.data[m], 64);
    for (int k = 0; k < w.rows; k++)
      for (int n = 0; n < y.row_bytes; n++) row[n / 4] += (uint32_t)((int8_t)x.data[m][4 * k + n % 4] * w.data[k][n]);
    memcpy(y.data[m], row, y.row_bytes);
  }
}

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
inline float bf16_at(const uint8_t* p) {
  const uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
  float x;
  memcpy(&x, &bits, 4);
  return flush(x);
}

// TDPBF16PS: even and odd products are summed apart, each by fused multiply-adds; subnormal numbers count as 0.
inline void dpbf16ps(int c, int a, int b) {
  demand_product(c, a, b);
  const Tile &x = tile(a), &w = tile(b);
  Tile& y = tile(c);
  for (int m = 0; m < y.rows; m++)
    for (int n = 0; n < y.row_bytes; n += 4) {
      float even = 0, odd = 0, before;
      for (int k = 0; k < w.rows; k++) {
        even = flush(fmaf(bf16_at(x.data[m] + 4 * k), bf16_at(w.data[k] + n), even));
        odd = flush(fmaf(bf16_at(x.data[m] + 4 * k + 2), bf16_at(w.data[k] + n + 2), odd));
      }
      memcpy(&before, y.data[m] + n, 4);
      const float after = flush(flush(before) + flush(even + odd));
      memcpy(y.data[m] + n, &after, 4);
    }
}

}  // namespace emulated
}  // namespace

#if defined(EMULATE_AVX_VNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#endif

#if defined(EMULATE_AMX)
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::loadconfig
#define _tile_release emulated::release
// Statements, as gcc has them.
#define _tile_loadd(i, base, stride)   \
  do emulated::loadd(i, base, stride); \
  while (0)
#define _tile_stored(i, base, stride)   \
  do emulated::stored(i, base, stride); \
  while (0)
#define _tile_zero(i)   \
  do emulated::zero(i); \
  while (0)
#define _tile_dpbsud(c, a, b)   \
  do emulated::dpbsud(c, a, b); \
  while (0)
#define _tile_dpbf16ps(c, a, b)   \
  do emulated::dpbf16ps(c, a, b); \
  while (0)
#endif
