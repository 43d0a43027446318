// Where new tokens go in a key/value cache, for the entry points that write to one.
#pragma once
#include <string.h>

#include "tensor.h"

namespace llmrt {

// Token s goes to slots[s * stride], or without slots to position + s.
struct CacheSlots {
  int64_t position;
  const int64_t* slots;
  int64_t stride;
  bool increasing;   // no two tokens go to one place, so their order of writing is free
  int64_t* counter;  // of the tokens that are stored; or null
  int64_t operator()(int64_t s) const { return slots ? slots[s * stride] : position + s; }
  void count(int64_t tokens) const {
    if (counter) *counter += tokens;
  }
};

// Checks all arguments of kv_append.
CacheSlots check_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                        int64_t position, int64_t every, const OptionalTensor& positions,
                        const OptionalTensor& counter);

// What a cache stores: the tokens' dtype, another floating one, or int8 rows of D codes and a scale.
inline DType cache_dtype(const Tensor& t, const char* name) {
  return t.scalar_type() == ScalarType::Char ? DType::i8 : float_dtype(t, name);
}
inline int64_t row_width(const Tensor& cache) {
  return cache.size(cache.dim() - 1) - (cache.scalar_type() == ScalarType::Char ? kScaleBytes : 0);
}
inline void check_stored(const Tensor& cache, ScalarType tokens, const char* name) {
  const ScalarType t = cache.scalar_type();
  STD_TORCH_CHECK(t == tokens || t == ScalarType::Char || t == ScalarType::Half || t == ScalarType::Float, name,
                  " has dtype ", dtype_text(t), "; valid with ", dtype_text(tokens),
                  " tokens: ", tokens == ScalarType::Half ? std::string() : dtype_text(tokens) + std::string(", "),
                  "float16, int8");
  STD_TORCH_CHECK(t != ScalarType::Char || cache.size(cache.dim() - 1) >= kScaleBytes, name, " has rows of ",
                  cache.size(cache.dim() - 1), " bytes; expected D codes and a scale of ", kScaleBytes);
}

// One of key and value: a cache [R, Hk, C, D] and new tokens [B, S, Hk, D], strides in bytes.
struct CacheHalf {
  char* cache;
  const char* tokens;
  DType type, stored;
  int64_t width, bytes, cache_r, cache_h, cache_t, token_b, token_s, token_h;
  CacheHalf(const Tensor& to, const Tensor& from)
      : type(float_dtype(from, "tokens")), stored(cache_dtype(to, "cache")) {
    int64_t element = size_of(stored);
    width = from.size(3), bytes = to.size(3) * element;
    cache_r = to.stride(0) * element, cache_h = to.stride(1) * element, cache_t = to.stride(2) * element;
    element = size_of(type);
    token_b = from.stride(0) * element, token_s = from.stride(1) * element, token_h = from.stride(2) * element;
    cache = (char*)to.mutable_data_ptr(), tokens = (const char*)from.const_data_ptr();
  }
  void copy(int64_t b, int64_t h, int64_t s, int64_t slot) const {
    char* to = cache + b * cache_r + h * cache_h + slot * cache_t;
    const char* from = tokens + b * token_b + h * token_h + s * token_s;
    if (type == stored) return (void)memcpy(to, from, bytes);
    tier().attention.store_row(from, type, width, to, stored);
  }
};

}  // namespace llmrt
