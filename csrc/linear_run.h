// A product with a packed weight from inside an entry point: what linear.cpp shares with the others.
#pragma once
#include <string>
#include <vector>

#include "layout.h"
#include "linear.h"

namespace llmrt {

Compute parse_compute(const std::string& text, const Format& format);

// data: [blocks][tiles][tile_bytes] of the geometry.
PackedWeight packed_weight(const void* data, int64_t blocks, const Layout& layout, const Geometry& g, Compute compute);

// Runs M > 0 rows on all threads. Of prepare x, dtype, stride and K are read, the rest follows from the geometry.
void run_linear(PrepareArgs prepare, MultiplyArgs a, int64_t M, const Geometry& g);

// One row of inputs by one of several weights that have the same form.
struct RowProduct {
  int64_t input;       // which of the inputs
  const void* weight;  // in place of a.weight.data
  void* out;           // [width], in place of a.out
};

// Runs products of single rows side by side on all threads; each has the bits of `run_linear` with one row.
void run_rows(PrepareArgs prepare, MultiplyArgs a, const std::vector<const void*>& inputs,
              const std::vector<RowProduct>& products, const Geometry& g);

}  // namespace llmrt
