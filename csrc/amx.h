// The tile registers of AMX: their shapes, which last until they are released. Included by tier files only.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace llmrt {
namespace {

constexpr int kRegisterRows = 16;      // most rows of a tile register
constexpr int kRegisterRowBytes = 64;  // most bytes of a row

struct alignas(64) TileShapes {  // what ldtilecfg reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Accumulators 0 and 1 are the first 16 of R rows, 2 and 3 the other ones, each 16 outputs wide; 4 and 5 are those rows
// of the left factor, `line` bytes long; 6 and 7 the right factor, four bytes of an output's column per row.
class TileRegisters {
 public:
  TileRegisters(int64_t R, int64_t line) {
    TileShapes shapes;
    const auto set = [&](int tile, int64_t rows, int64_t bytes) {
      if (rows > 0) shapes.rows[tile] = (uint8_t)rows, shapes.row_bytes[tile] = (uint16_t)bytes;
    };
    const int64_t first = R < kRegisterRows ? R : kRegisterRows, second = R - first;
    set(0, first, kRegisterRowBytes), set(1, first, kRegisterRowBytes), set(2, second, kRegisterRowBytes),
        set(3, second, kRegisterRowBytes);
    set(4, first, line), set(5, second, line), set(6, line / 4, kRegisterRowBytes), set(7, line / 4, kRegisterRowBytes);
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // gcc 12 believes that ldtilecfg reads 8 bytes
    _tile_loadconfig(&shapes);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

}  // namespace
}  // namespace llmrt
