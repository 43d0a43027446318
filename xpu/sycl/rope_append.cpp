// Rotary position embedding of new tokens on their way into a key/value cache; one sub-group per token and head, of a
// token's queries first, then of its keys, then of its values.
#include "kv_rows.hpp"
#include "rope.hpp"

KERNEL(16)
void rope_append(const T* query, const T* key, const T* value, const void* cos, const void* sin,
                 const int64_t* position_ids, const void* query_weight, const void* key_weight, T* out, void* key_cache,
                 void* value_cache, const int64_t* positions, int64_t* counter, int* ticket, int64_t rows,
                 int64_t tokens, int64_t query_heads, int64_t key_heads, int64_t width, int64_t value_width,
                 int64_t half, int64_t interleaved, int64_t query_row, int64_t query_token, int64_t query_head,
                 int64_t key_row, int64_t key_token, int64_t key_head, int64_t value_row, int64_t value_token,
                 int64_t value_head, int64_t angle_kind, int64_t angle_row, int64_t angle_token, int64_t angle_column,
                 int64_t ids_row, int64_t ids_token, int64_t table_rows, int64_t query_weight_kind,
                 int64_t key_weight_kind, int64_t capacity, int64_t every, int64_t position, int64_t position_stride,
                 int64_t cache_kind, int64_t key_cache_row, int64_t key_cache_head, int64_t key_cache_token,
                 int64_t value_cache_row, int64_t value_cache_head, int64_t value_cache_token, float eps,
                 float offset) {
  const auto it = item();
  const auto sub = it.get_sub_group();
  const kv_rows::Places places{tokens, capacity, position, positions, position_stride, counter};
  const int64_t unit = it.get_group(2) * sub.get_group_linear_range() + sub.get_group_linear_id();
  const int64_t heads = query_heads + 2 * key_heads, token = unit / heads;
  const bool some = token < rows * tokens;
  const int64_t b = some ? token / tokens : 0, s = some ? token % tokens : 0;
  const int64_t h = unit % heads, k = h - query_heads, v = k - key_heads;
  const int64_t place = some && k >= 0 && b % every == 0 ? places(sub, s) : -1;
  if (v >= 0 && place >= 0) {
    const T* x = value + b * value_row + s * value_token + v * value_head;
    const kv_rows::Cache cache{value_cache, cache_kind, value_cache_row, value_cache_head, value_cache_token};
    kv_rows::store_row(sub, [=](int i) { return load(x + i); }, value_width, cache.at(b, v, place), cache_kind);
  } else if (some && v < 0 && (k < 0 || place >= 0)) {
    const rope::Angles angles{cos,          sin,          angle_kind, angle_row, angle_token,
                              angle_column, position_ids, ids_row,    ids_token, table_rows};
    const rope::Form form{static_cast<int>(width), static_cast<int>(half), interleaved != 0, eps, offset};
    const T* x = k < 0 ? query + b * query_row + s * query_token + h * query_head
                       : key + b * key_row + s * key_token + k * key_head;
    const rope::Head head(sub, x, angles, angles.begin(b, s), form, k < 0 ? query_weight : key_weight,
                          k < 0 ? query_weight_kind : key_weight_kind);
    const kv_rows::Cache cache{key_cache, cache_kind, key_cache_row, key_cache_head, key_cache_token};
    if (k < 0) {
      head.store_to(sub, out + (token * query_heads + h) * width);
    } else {
      kv_rows::store_row(sub, head, form.width, cache.at(b, k, place), cache_kind);
    }
  }
  kv_rows::count(counter, ticket, places);
}
