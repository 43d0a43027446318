// From tensors to the arguments of the rope kernels, for the entry points that rotate.
#pragma once
#include "rope.h"
#include "tensor.h"

namespace llmrt {

// What says how query and key are rotated.
struct RopeCall {
  Tensor query, key, cos, sin;
  OptionalTensor position_ids;
  int64_t rotary_dim;
  bool interleaved;
  OptionalTensor query_weight, key_weight;
  double eps, offset;

  // Checks everything and fills in all arguments but the outputs; they point into this call's tensors.
  RopeArgs arguments();

  // Elements of one token, and the tokens below which a second thread costs more than it saves.
  int64_t per_token() const { return (query.size(2) + key.size(2)) * query.size(3); }
  int64_t grain() const { return 1 + 16384 / (per_token() + 1); }

  auto kernel() const {
    return (interleaved ? tier().rope.interleaved : tier().rope.halves)[(int)float_dtype(query, "query")];
  }
};

// Lets the heads go to token `first` and those after it of a tensor [rows, heads, tokens, D] or, transposed,
// [rows, tokens, heads, D].
inline void set_output(RopeHeads& heads, const Tensor& out, int tokens_dim, int64_t first) {
  heads.out_b = out.stride(0), heads.out_s = out.stride(tokens_dim), heads.out_h = out.stride(3 - tokens_dim);
  heads.out = (char*)out.mutable_data_ptr() + first * heads.out_s * size_of(float_dtype(out, "output"));
}

}  // namespace llmrt
