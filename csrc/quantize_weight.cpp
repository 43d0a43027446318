// Entry point of quantize_weight: see ops/quantize_weight.py for what it means.
#include "quantize_weight.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "layout.h"

namespace llmrt {
namespace {

// See thresholds_of in ops/formats.py.
void set_midpoints(QuantizeArgs& a, const Format& f) {
  int codes[16], count = 0;
  for (int i = 0; i < 16; i++)
    if (std::find(f.book, f.book + i, f.book[i]) == f.book + i) codes[count++] = i;  // one zero of two
  std::sort(codes, codes + count, [&](int i, int j) { return f.book[i] < f.book[j]; });
  a.first_code = codes[0], a.midpoints = count - 1;
  for (int i = 0; i < count - 1; i++) {
    a.midpoint[i] = (f.book[codes[i + 1]] + f.book[codes[i]]) / 2;
    a.step[i] = codes[i + 1] - codes[i];
  }
}

std::tuple<Tensor, Tensor, Tensor> quantize_weight(const Tensor& weight, const std::string& layout, bool fullrange) {
  const Layout l = parse_layout(layout);
  const DType dtype = float_dtype(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight has ", weight.dim(), " dimensions; expected [N, K]");
  const Format& format = *l.format;
  STD_TORCH_CHECK(!fullrange || (is_integer(format.coding) && !l.asymmetric), "fullrange is True for the layout ",
                  layout, "; valid for symmetric integers only");
  const Rows rows = rows_of(weight, "weight");
  const Geometry g = geometry(l, rows.K);
  QuantizeArgs a{rows.data, dtype, rows.K, rows.stride, g.group, g.groups};
  a.coding = format.coding, a.absmax = format.absmax;
  if (format.coding == Coding::book) set_midpoints(a, format);
  a.bits = l.bits, a.zero = l.zero, a.asymmetric = l.asymmetric, a.fullrange = fullrange, a.scale_dtype = l.scale;
  a.row_bytes = (a.K * l.bits + 7) / 8;
  const auto matrix = [&](int64_t columns, ScalarType t) {
    return torch::stable::new_empty(rows.tensor, {rows.M, columns}, t);
  };
  Tensor codes = matrix(a.row_bytes, ScalarType::Byte), scales = matrix(g.groups, scalar_type(l.scale));
  Tensor zeros = matrix(l.asymmetric ? g.groups : 0, ScalarType::Byte);
  a.codes = (uint8_t*)codes.mutable_data_ptr(), a.scales = scales.mutable_data_ptr();
  a.zeros = l.asymmetric ? (uint8_t*)zeros.mutable_data_ptr() : nullptr;
  std::atomic<bool> finite{true};
  parallel_ranges(rows.M, 1 + (1 << 15) / a.K, [&](int64_t n0, int64_t n1) {
    std::vector<uint8_t> buffer(a.K + kQuantizeSlack);
    if (!tier().quantize.rows(a, n0, n1, buffer.data())) finite = false;
  });
  STD_TORCH_CHECK(finite, "weight has NaN or infinite values");
  return {codes, scales, zeros};
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(quantize_weight) { library.impl("quantize_weight", TORCH_BOX(&llmrt::quantize_weight)); }
