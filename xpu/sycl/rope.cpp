// Rotary position embedding; one sub-group per token and head, of a token's queries first, then of its keys.
#include "rope.hpp"

KERNEL(16)
void rope_heads(const T* query, const T* key, const void* cos, const void* sin, const int64_t* positions,
                const void* query_weight, const void* key_weight, T* query_out, T* key_out, int64_t rows,
                int64_t tokens, int64_t query_heads, int64_t key_heads, int64_t width, int64_t half,
                int64_t interleaved, int64_t query_row, int64_t query_token, int64_t query_head, int64_t key_row,
                int64_t key_token, int64_t key_head, int64_t angle_kind, int64_t angle_row, int64_t angle_token,
                int64_t angle_column, int64_t positions_row, int64_t positions_token, int64_t table_rows,
                int64_t query_weight_kind, int64_t key_weight_kind, float eps, float offset) {
  const auto it = item();
  const auto sub = it.get_sub_group();
  const int64_t unit = it.get_group(2) * sub.get_group_linear_range() + sub.get_group_linear_id();
  const int64_t heads = query_heads + key_heads, token = unit / heads;
  if (token >= rows * tokens) return;
  const int64_t b = token / tokens, s = token % tokens, h = unit % heads, k = h - query_heads;
  const rope::Angles angles{cos,          sin,       angle_kind,    angle_row,       angle_token,
                            angle_column, positions, positions_row, positions_token, table_rows};
  const rope::Form form{static_cast<int>(width), static_cast<int>(half), interleaved != 0, eps, offset};
  const T* x = k < 0 ? query + b * query_row + s * query_token + h * query_head
                     : key + b * key_row + s * key_token + k * key_head;
  const rope::Head head(sub, x, angles, angles.begin(b, s), form, k < 0 ? query_weight : key_weight,
                        k < 0 ? query_weight_kind : key_weight_kind);
  head.store_to(sub, k < 0 ? query_out + (token * query_heads + h) * width : key_out + (token * key_heads + k) * width);
}
