// Entry point of kv_append: see ops/kv_append.py for what it means. A copy of rows needs no kernel of its own.
#include "kv_append.h"

namespace llmrt {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;  // per thread, below which a second thread costs more than it saves

CacheSlots checked_positions(const Tensor& positions, int64_t S, int64_t capacity) {
  check_dtype(positions, ScalarType::Long, "positions");
  check_shape(positions, {S}, "positions");
  CacheSlots to{0, (const int64_t*)positions.const_data_ptr(), positions.stride(0), true, nullptr};
  for (int64_t s = 0; s < S; s++) {
    STD_TORCH_CHECK(0 <= to(s) && to(s) < capacity, "positions has value ", to(s), "; valid: 0 to ", capacity - 1);
    if (s && to(s) <= to(s - 1)) to.increasing = false;
  }
  return to;
}

int64_t* checked_counter(const Tensor& counter) {
  check_dtype(counter, ScalarType::Long, "counter");
  STD_TORCH_CHECK(counter.numel() == 1, "counter has shape ", shape_text(counter), "; expected one element");
  return (int64_t*)counter.mutable_data_ptr();
}

}  // namespace

CacheSlots check_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
                        int64_t position, int64_t every, const OptionalTensor& positions,
                        const OptionalTensor& counter) {
  float_dtype(key, "key");
  check_shape(key_cache, {-1, -1, -1, -1}, "key_cache");
  check_stored(key_cache, key.scalar_type(), "key_cache");
  check_dtype(value_cache, key_cache.scalar_type(), "value_cache");
  check_dtype(value, key.scalar_type(), "value");
  const int64_t rows = key_cache.size(0), heads = key_cache.size(1), capacity = key_cache.size(2);
  check_shape(value_cache, {rows, heads, capacity, -1}, "value_cache");
  check_stored(value_cache, key.scalar_type(), "value_cache");
  check_shape(key, {-1, -1, heads, row_width(key_cache)}, "key");
  check_shape(value, {key.size(0), key.size(1), heads, row_width(value_cache)}, "value");
  check_last_dense(key_cache, "key_cache");
  check_last_dense(value_cache, "value_cache");
  STD_TORCH_CHECK(key.size(0) <= rows, "key has ", key.size(0), " rows; key_cache holds ", rows);
  STD_TORCH_CHECK(every >= 1, "every is ", every, "; expected at least 1");
  const char* name = positions ? "positions" : counter ? "counter" : "position";
  STD_TORCH_CHECK(!(positions && counter), "positions and counter are given; valid: one of them");
  STD_TORCH_CHECK(position == 0 || !(positions || counter), "position is ", position, "; expected 0, as ", name,
                  " says where the tokens go");
  const int64_t S = key.size(1);
  if (positions) return checked_positions(*positions, S, capacity);
  int64_t* const stored = counter ? checked_counter(*counter) : nullptr;
  if (stored) position = *stored;
  STD_TORCH_CHECK(position >= 0 && position <= capacity - S, name, " ", position, " and ", S,
                  " tokens do not fit into the cache's capacity of ", capacity, " tokens");
  return {position, nullptr, 0, true, stored};
}

namespace {

void kv_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& key, const Tensor& value,
               int64_t position, int64_t every, const OptionalTensor& positions, const OptionalTensor& counter) {
  const CacheSlots slot = check_append(key_cache, value_cache, key, value, position, every, positions, counter);
  const int64_t S = key.size(1), heads = key.size(2), rows = (key.size(0) + every - 1) / every;
  const Tensor dense_key = last_dense(key), dense_value = last_dense(value);
  const CacheHalf keys(key_cache, dense_key), values(value_cache, dense_value);
  const int64_t unit = slot.increasing ? 1 : S;  // tokens of one head that one thread must write
  if (S == 0) return;
  const int64_t grain = 1 + kGrainBytes / (unit * (keys.bytes + values.bytes) + 1);
  parallel_ranges(rows * heads * S / unit, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * unit; i < end * unit;) {
      const int64_t b = i / (heads * S) * every, h = i / S % heads, left = end * unit - i;
      for (int64_t s = i % S, s1 = left < S - s ? s + left : S; s < s1; s++, i++) {
        keys.copy(b, h, s, slot(s));
        values.copy(b, h, s, slot(s));
      }
    }
  });
  slot.count(S);
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(kv_append) { library.impl("kv_append", TORCH_BOX(&llmrt::kv_append)); }
