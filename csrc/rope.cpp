// Entry point of rope: see ops/rope.py for what it means.
#include "rope.h"

#include "rope_call.h"

namespace llmrt {
namespace {

int64_t rotated_elements(int64_t rotary_dim, int64_t D) {
  const int64_t R = rotary_dim == 0 ? D : rotary_dim;
  STD_TORCH_CHECK(0 < R && R <= D && R % 2 == 0, "rotary_dim is ", R, "; valid: even, 2 to ", D, " (0 means all ", D,
                  ")");
  return R;
}

void check_broadcast(const Tensor& t, int64_t B, const char* name) {
  STD_TORCH_CHECK(t.size(0) == 1 || t.size(0) == B, name, " has ", t.size(0), " rows; valid: 1 or ", B, ", as query");
}

int64_t batch_stride(const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); }

// An id outside the table would be a wild read in the kernel.
void check_positions(const RopeArgs& a, int64_t rows, int64_t P) {
  for (int64_t b = 0; b < rows; b++)
    for (int64_t s = 0; s < a.S; s++) {
      const int64_t p = a.positions[b * a.positions_b + s * a.positions_s];
      STD_TORCH_CHECK(0 <= p && p < P, "position_ids has value ", p, "; valid: 0 to ", P - 1);
    }
}

// Fills in the tables' pointers and strides; cos and sin have the same, checked, shape and contiguous rows.
void set_tables(RopeArgs& a, const Tensor& cos, const Tensor& sin, const OptionalTensor& position_ids) {
  a.table_dtype = float_dtype(cos, "cos");
  if (!position_ids) {
    a.cos = {cos.const_data_ptr(), batch_stride(cos), cos.stride(1)};
    a.sin = {sin.const_data_ptr(), batch_stride(sin), sin.stride(1)};
    return;
  }
  a.cos = {cos.const_data_ptr(), 0, cos.stride(0)};
  a.sin = {sin.const_data_ptr(), 0, sin.stride(0)};
  a.positions = (const int64_t*)position_ids->const_data_ptr();
  a.positions_b = batch_stride(*position_ids), a.positions_s = position_ids->stride(1);
  check_positions(a, position_ids->size(0), cos.size(0));
}

void check_tables(const Tensor& cos, const Tensor& sin, const OptionalTensor& position_ids, int64_t B, int64_t S,
                  int64_t R) {
  if (position_ids) {
    check_dtype(*position_ids, ScalarType::Long, "position_ids");
    check_shape(*position_ids, {-1, S}, "position_ids");
    check_broadcast(*position_ids, B, "position_ids");
    check_shape(cos, {-1, -1}, "cos");
  } else {
    check_shape(cos, {-1, S, -1}, "cos");
    check_broadcast(cos, B, "cos");
  }
  const int64_t columns = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(columns == R || columns == R / 2, "cos has ", columns, " columns; valid: ", R / 2, " or ", R);
  check_same_shape(sin, cos, "sin");
}

void set_heads(RopeHeads& heads, const Tensor& in, const OptionalTensor& weight) {
  heads.in = in.const_data_ptr(), heads.heads = in.size(2);
  heads.stride_b = in.stride(0), heads.stride_s = in.stride(1), heads.stride_h = in.stride(2);
  if (weight) heads.weight = weight->const_data_ptr(), heads.weight_dtype = float_dtype(*weight, "weight");
}

void check_weight(OptionalTensor& weight, int64_t D, const char* name) {
  if (!weight) return;
  float_dtype(*weight, name);
  check_shape(*weight, {D}, name);
  weight = dense(*weight);
}

}  // namespace

RopeArgs RopeCall::arguments() {
  float_dtype(query, "query");
  check_dtype(key, query.scalar_type(), "key");
  float_dtype(cos, "cos");
  check_dtype(sin, cos.scalar_type(), "sin");
  check_shape(query, {-1, -1, -1, -1}, "query");
  const int64_t B = query.size(0), S = query.size(1), D = query.size(3);
  check_shape(key, {B, S, -1, D}, "key");
  const int64_t R = rotated_elements(rotary_dim, D);
  check_tables(cos, sin, position_ids, B, S, R);
  STD_TORCH_CHECK(!query_weight == !key_weight, query_weight ? "key_weight" : "query_weight",
                  " is missing; valid: query_weight and key_weight, or none of them");
  check_weight(query_weight, D, "query_weight");
  check_weight(key_weight, D, "key_weight");

  query = last_dense(query), key = last_dense(key), cos = last_dense(cos), sin = last_dense(sin);
  RopeArgs a{};
  set_heads(a.query, query, query_weight);
  set_heads(a.key, key, key_weight);
  a.key_slots.every = 1;
  a.S = S, a.D = D, a.half = R / 2, a.eps = (float)eps, a.offset = (float)offset;
  set_tables(a, cos, sin, position_ids);
  return a;
}

namespace {

std::tuple<Tensor, Tensor> rope(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                const OptionalTensor& position_ids, int64_t rotary_dim, bool interleaved,
                                const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                                double offset) {
  RopeCall call{query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset};
  RopeArgs a = call.arguments();
  Tensor query_out = empty(query, query.sizes()), key_out = empty(key, key.sizes());
  set_output(a.query, query_out, 1, 0);
  set_output(a.key, key_out, 1, 0);
  const auto kernel = call.kernel();
  parallel_ranges(query.size(0) * a.S, call.grain(), [&](int64_t t0, int64_t t1) { kernel(a, t0, t1); });
  return {query_out, key_out};
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(rope) { library.impl("rope", TORCH_BOX(&llmrt::rope)); }
