// What the codes of a weight are.
#pragma once

namespace llmrt {

// Integers of 4 and 8 bits; indices of a table of 16 values; floats of 8 bits, with 4 bits of exponent or 5.
enum class Coding : int { nibbles, bytes, book, e4m3, e5m2 };

constexpr bool is_integer(Coding c) { return c == Coding::nibbles || c == Coding::bytes; }
constexpr bool is_float8(Coding c) { return c == Coding::e4m3 || c == Coding::e5m2; }
constexpr int bits_of(Coding c) { return c == Coding::nibbles || c == Coding::book ? 4 : 8; }

}  // namespace llmrt
