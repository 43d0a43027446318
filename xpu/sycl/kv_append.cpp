// Writes new tokens into a key/value cache; one sub-group per token and head, of the keys first, then of the values.
#include "kv_rows.hpp"

KERNEL(16)
void kv_append(void* key_cache, void* value_cache, const T* key, const T* value, const int64_t* positions,
               int64_t* counter, int* ticket, int64_t rows, int64_t tokens, int64_t heads, int64_t key_width,
               int64_t value_width, int64_t capacity, int64_t every, int64_t position, int64_t position_stride,
               int64_t kind, int64_t key_cache_row, int64_t key_cache_head, int64_t key_cache_token,
               int64_t value_cache_row, int64_t value_cache_head, int64_t value_cache_token, int64_t key_row,
               int64_t key_token, int64_t key_head, int64_t value_row, int64_t value_token, int64_t value_head) {
  const auto it = item();
  const auto sub = it.get_sub_group();
  const kv_rows::Places places{tokens, capacity, position, positions, position_stride, counter};
  const int64_t unit = it.get_group(2) * sub.get_group_linear_range() + sub.get_group_linear_id();
  if (unit < 2 * rows * tokens * heads) {
    const int64_t h = unit % heads, s = unit / heads % tokens, b = unit / heads / tokens % rows * every;
    const bool values = unit / heads / tokens / rows != 0;
    const int64_t place = places(sub, s);
    if (place >= 0) {
      const T* from = values ? value + b * value_row + s * value_token + h * value_head
                             : key + b * key_row + s * key_token + h * key_head;
      const kv_rows::Cache cache =
          values ? kv_rows::Cache{value_cache, kind, value_cache_row, value_cache_head, value_cache_token}
                 : kv_rows::Cache{key_cache, kind, key_cache_row, key_cache_head, key_cache_token};
      kv_rows::store_row(
          sub, [=](int i) { return load(from + i); }, values ? value_width : key_width, cache.at(b, h, place), kind);
    }
  }
  kv_rows::count(counter, ticket, places);
}
