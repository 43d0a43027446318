// Entry point of kv_append: see ops/kv_append.py for what it means. A copy of rows needs no kernel of its own.
#include <string.h>

#include "tensor.h"

namespace llmrt {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // per thread, below which a second thread costs more than it saves

// One of key and value: a cache [R, Hk, C, D] and new tokens [B, S, Hk, D], strides in bytes.
struct Half {
  char* cache;
  const char* tokens;
  int64_t bytes, cache_r, cache_h, cache_t, token_b, token_s, token_h;
  Half(const Tensor& to, const Tensor& from, int64_t position, const char* cache_name, const char* name) {
    for (const auto& [t, n] : {std::pair{&to, cache_name}, std::pair{&from, name}})
      STD_TORCH_CHECK(t->size(3) <= 1 || t->stride(3) == 1, n, " has stride ", t->stride(3),
                      " in its last dimension; expected 1");
    const int64_t element = size_of(float_dtype(to, cache_name));
    bytes = from.size(3) * element;
    cache_r = to.stride(0) * element, cache_h = to.stride(1) * element, cache_t = to.stride(2) * element;
    token_b = from.stride(0) * element, token_s = from.stride(1) * element, token_h = from.stride(2) * element;
    cache = (char*)to.mutable_data_ptr() + position * cache_t, tokens = (const char*)from.const_data_ptr();
  }
  void copy(int64_t b, int64_t h, int64_t s0, int64_t s1) const {
    for (int64_t s = s0; s < s1; s++)
      memcpy(cache + b * cache_r + h * cache_h + s * cache_t, tokens + b * token_b + h * token_h + s * token_s, bytes);
  }
};

void check_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                  int64_t position, int64_t every) {
  const ScalarType dtype = key_cache.scalar_type();
  float_dtype(key_cache, "key_cache");
  check_dtype(value_cache, dtype, "value_cache");
  check_dtype(key, dtype, "key");
  check_dtype(value, dtype, "value");
  check_shape(key_cache, {-1, -1, -1, -1}, "key_cache");
  const int64_t rows = key_cache.size(0), heads = key_cache.size(1), capacity = key_cache.size(2);
  check_shape(value_cache, {rows, heads, capacity, -1}, "value_cache");
  check_shape(key, {-1, -1, heads, key_cache.size(3)}, "key");
  check_shape(value, {key.size(0), key.size(1), heads, value_cache.size(3)}, "value");
  STD_TORCH_CHECK(key.size(0) <= rows, "key has ", key.size(0), " rows; key_cache holds ", rows);
  STD_TORCH_CHECK(every >= 1, "every is ", every, "; expected at least 1");
  STD_TORCH_CHECK(position >= 0 && position + key.size(1) <= capacity, "position ", position, " and ", key.size(1),
                  " tokens do not fit into the cache's capacity of ", capacity, " tokens");
}

void kv_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
               int64_t position, int64_t every) {
  check_append(key_cache, value_cache, key, value, position, every);
  const int64_t S = key.size(1), heads = key.size(2), rows = (key.size(0) + every - 1) / every;
  const Half keys(key_cache, key, position, "key_cache", "key"),
      values(value_cache, value, position, "value_cache", "value");
  parallel_ranges(rows * heads * S, 1 + kGrainBytes / (keys.bytes + values.bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / (heads * S) * every, h = i / S % heads, s = i % S, s1 = end - i < S - s ? s + end - i : S;
      keys.copy(b, h, s, s1);
      values.copy(b, h, s, s1);
      i += s1 - s;
    }
  });
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(kv_append) { library.impl("kv_append", TORCH_BOX(&llmrt::kv_append)); }
