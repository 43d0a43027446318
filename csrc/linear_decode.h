// Packed tiles into panels: what the register tiles of many rows multiply. A panel is [steps][32 n] dwords; a row of 64
// bytes of a tile (16 outputs) gives the same outputs of 2 to 8 steps. One decode per weight format.
#pragma once
#include "linear.h"
#include "linear_vec.h"

namespace llmrt {
namespace {

inline const uint8_t* scales_of(const PackedWeight& w, const uint8_t* tile) { return tile + w.code_bytes; }
inline const uint8_t* zeros_of(const PackedWeight& w, const uint8_t* tile) {
  return tile + w.code_bytes + w.scale_bytes;
}

template <int i>
struct Index {
  static constexpr int value = i;
};
// f(Index<0>), ..., f(Index<n - 1>).
template <int n, int i = 0, class Function>
inline __attribute__((always_inline)) void for_each_index(const Function& f) {
  if constexpr (i < n) {
    f(Index<i>{});
    for_each_index<n, i + 1>(f);
  }
}

// What is subtracted from every code: the zero points of asymmetric weights are what the sums start from.
inline int constant_zero(const PackedWeight& w) { return w.asymmetric ? 0 : w.zero; }

// A code's value as float; i counts the codes of a dword from its low bits.
template <Coding c, int i>
inline F32 value_at(I32 dword, const CodeTable& table, I32 zero) {
  if constexpr (c == Coding::nibbles)
    return value_of(shift_right<4 * i>(dword), table);
  else if constexpr (c == Coding::book)
    return book_value_of(shift_right<4 * i>(dword), table);
  else if constexpr (is_float8(c))
    return float8_at<c, i>(dword);
  else
    return to_float((shift_right<8 * (i & 3)>(dword) & I32::set1(255)) - zero);
}
// Which of the inputs of a dword that code is. Of bf16 pairs it is the first half, the second is two inputs further on.
template <int bits>
constexpr int input_at(int i) {
  return bits == 4 ? i % 2 * 4 + i / 2 : i;
}

// What the bf16 values of the panels and tiles are multiples of.
inline float unit_of_pairs(Coding c) {
  return c == Coding::e4m3   ? Float8Pairs<Coding::e4m3>::unit
         : c == Coding::e5m2 ? Float8Pairs<Coding::e5m2>::unit
                             : 1.f;
}

using Expand = void (*)(const PackedWeight&, const uint8_t* tile, int64_t row0, int64_t row1, uint8_t* panel);

// 4-bit codes, one to a byte, to the factors of int8 products.
template <bool book>
inline I32 factors_of(I32 codes, const Digits& digits) {
  return book ? digits_of(codes, digits) : codes;
}

// Bytes for int8 products: steps of 4 inputs.
template <bool book>
void expand_bytes(const PackedWeight& w, const uint8_t* tile, int64_t row0, int64_t row1, uint8_t* panel) {
  const Digits digits(w.digits);
  for (int64_t row = row0; row < row1; row++)
    for (int64_t j = 0; j < 64; j += kVectorBytes) {
      const I32 x = load_words(tile + row * 64 + j);
      uint8_t* to = panel + row / 2 * 256 + row % 2 * 64 + j;
      store_words(to, factors_of<book>(low_nibbles(x), digits));
      store_words(to + 128, factors_of<book>(high_nibbles(x), digits));
    }
}

// Zero points of asymmetric weights for the outputs of a row of 64 bytes from byte j on.
inline I32 zeros_at(const PackedWeight& w, const uint8_t* tile, int64_t row, int64_t j) {
  const int64_t input = row / 2 * (32 / w.bits);
  return load_bytes(zeros_of(w, tile) + input / w.segment * kTileN + row % 2 * 16 + j / 4);
}

// Floats: steps of one input.
template <Coding c>
void expand_floats(const PackedWeight& w, const uint8_t* tile, int64_t row0, int64_t row1, uint8_t* panel) {
  constexpr int codes = 32 / bits_of(c);
  const CodeTable table(w.book, constant_zero(w));
  const I32 constant = I32::set1(constant_zero(w));
  for (int64_t row = row0; row < row1; row++)
    for (int64_t j = 0; j < 64; j += kVectorBytes) {
      const I32 x = load_words(tile + row * 64 + j);
      uint8_t* to = panel + row / 2 * codes * 128 + row % 2 * 64 + j;
      const F32 zero = w.asymmetric ? to_float(zeros_at(w, tile, row, j)) : F32::zero();
      for_each_index<codes>([&](auto i) {
        store((float*)(to + input_at<bits_of(c)>(i.value) * 128), value_at<c, i.value>(x, table, constant) - zero);
      });
    }
}

// bf16 pairs: the halves of a dword hold inputs two apart.
template <Coding c>
void expand_pairs(const PackedWeight& w, const uint8_t* tile, int64_t row0, int64_t row1, uint8_t* panel) {
  constexpr int bits = bits_of(c), pairs = 16 / bits;  // of a dword; the second code of a pair is so many further on
  const PairTable table(w.book);
  const Float8Pairs<c> float8;
  const CodeTable values(w.book, 0);
  const I32 constant = I32::set1(w.zero), high = I32::set1((int32_t)0xffff0000);
  for (int64_t row = row0; row < row1; row++)
    for (int64_t j = 0; j < 64; j += kVectorBytes) {
      const I32 x = load_words(tile + row * 64 + j);
      uint8_t* to = panel + row / 2 * pairs * 128 + row % 2 * 64 + j;
      const auto integers = [&](auto i, I32 zero) __attribute__((always_inline)) {
        const F32 less = bits == 4 ? to_float(zero) : F32::zero();
        const F32 first = value_at<c, i.value>(x, values, zero), second = value_at<c, i.value + pairs>(x, values, zero);
        return shift_right<16>(bits_of(first - less)) | (bits_of(second - less) & high);
      };
      if (w.asymmetric) {
        const I32 zero = zeros_at(w, tile, row, j);
        for_each_index<pairs>([&](auto i) { store_words(to + i.value * 128, integers(i, zero)); });
      } else {
        for_each_index<pairs>([&](auto i) {
          if constexpr (is_float8(c))
            store_words(to + i.value * 128, pair_of<i.value>(x, float8));
          else if constexpr (bits == 4)
            store_words(to + i.value * 128, value_of(shift_right<4 * i.value>(x), table));
          else
            store_words(to + i.value * 128, integers(i, constant));
        });
      }
    }
}

}  // namespace
}  // namespace llmrt
