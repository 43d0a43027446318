// Entry point of rope_append: see ops/rope_append.py for what it means. The kernels are those of rope, which write the
// keys straight to a cache of their dtype.
#include "kv_append.h"
#include "rope_call.h"

namespace llmrt {
namespace {

Tensor rope_append(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
                   const Tensor& key_cache, const Tensor& value_cache, int64_t position, int64_t every,
                   const OptionalTensor& positions, const OptionalTensor& position_ids, int64_t rotary_dim,
                   bool interleaved, const OptionalTensor& query_weight, const OptionalTensor& key_weight, double eps,
                   double offset, const OptionalTensor& counter) {
  RopeCall call{query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset};
  RopeArgs a = call.arguments();
  const CacheSlots slot = check_append(key_cache, value_cache, key, value, position, every, positions, counter);
  Tensor out = empty(query, query.sizes());
  set_output(a.query, out, 1, 0);
  const bool in_place = key_cache.scalar_type() == key.scalar_type();
  const Tensor rotated = in_place ? key : empty(key, key.sizes());  // converted from here
  if (in_place)
    set_output(a.key, key_cache, 2, slot.position), a.key_slots = {slot.slots, slot.stride, every};
  else
    set_output(a.key, rotated, 1, 0), a.key_slots = {nullptr, 0, every};
  const Tensor dense_value = last_dense(value);
  const CacheHalf keys(key_cache, rotated), values(value_cache, dense_value);
  const int64_t B = query.size(0), heads = value.size(2);
  if (B * a.S == 0) {
    slot.count(a.S);
    return out;
  }
  const auto kernel = call.kernel();
  const int64_t unit = slot.increasing ? 1 : a.S;  // tokens of one row that one thread must write
  parallel_ranges(B * a.S / unit, (call.grain() + unit - 1) / unit, [&](int64_t begin, int64_t end) {
    kernel(a, begin * unit, end * unit);
    for (int64_t token = begin * unit; token < end * unit; token++) {
      const int64_t b = token / a.S, s = token % a.S;
      if (b % every) continue;
      for (int64_t h = 0; h < heads; h++) {
        if (!in_place) keys.copy(b, h, s, slot(s));
        values.copy(b, h, s, slot(s));
      }
    }
  });
  slot.count(a.S);
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(rope_append) { library.impl("rope_append", TORCH_BOX(&llmrt::rope_append)); }
