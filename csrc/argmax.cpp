// Entry point of argmax: see ops/argmax.py for what it means.
#include "argmax.h"

#include <vector>

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kPiece = 16384;  // elements per thread below which a second thread costs more than it saves

Tensor argmax(const Tensor& x) {
  const auto kernel = tier().argmax.largest[(int)float_dtype(x, "x")];
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x has shape ", shape_text(x),
                  "; expected at least one element per row");
  const Rows rows = rows_of(x, "x");
  Tensor out = torch::stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), ScalarType::Long);
  const int64_t pieces = (rows.K + kPiece - 1) / kPiece, element = size_of(float_dtype(x, "x"));
  std::vector<Largest> found(rows.M * pieces);
  parallel_ranges(rows.M * pieces, 1 + kPiece / (rows.K + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t piece = i % pieces;
      found[i] = kernel((const char*)rows.data + i / pieces * rows.stride * element, rows.K * piece / pieces,
                        rows.K * (piece + 1) / pieces);
    }
  });
  int64_t* index = (int64_t*)out.mutable_data_ptr();
  for (int64_t m = 0; m < rows.M; m++) {
    Largest best = found[m * pieces];
    for (int64_t piece = 1; piece < pieces; piece++)
      if (found[m * pieces + piece].above(best)) best = found[m * pieces + piece];
    index[m] = best.index;
  }
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(argmax) { library.impl("argmax", TORCH_BOX(&llmrt::argmax)); }
