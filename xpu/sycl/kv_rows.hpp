// Rows of a key/value cache: where a token goes, and how the elements of one head are stored (see ops/kv_rows.py). The
// items of a sub-group share a row.
#pragma once
#include "element.hpp"

namespace kv_rows {

constexpr float kSmallest = 1e-30f;  // rows whose largest magnitude is not above this are stored as zeros

// Which tokens go where, and the order to count them.
struct Places {
  int64_t tokens, capacity, position;
  const int64_t* positions;  // null: position + s
  int64_t stride;            // of positions
  const int64_t* counter;    // null: position

  // The place of token s in the cache, or -1: it is outside, or a later token has the same place.
  inline int64_t operator()(sycl::sub_group sub, int64_t s) const {
    if (!positions) {
      const int64_t first = counter ? *counter : position;
      return first >= 0 && first + tokens <= capacity ? first + s : -1;
    }
    const int64_t place = positions[s * stride];
    bool replaced = false;
    for (int64_t i = s + 1 + sub.get_local_linear_id(); i < tokens; i += sub.get_local_linear_range())
      replaced |= positions[i * stride] == place;
    return place < 0 || place >= capacity || sycl::any_of_group(sub, replaced) ? -1 : place;
  }
};

// Adds the tokens to a counter once every work-group has read it: the last one does. ticket: a zero, left as a zero.
inline void count(int64_t* counter, int* ticket, const Places& places) {
  const auto it = item();
  sycl::group_barrier(it.get_group());
  if (!counter || it.get_local_linear_id() != 0) return;
  sycl::atomic_ref<int, sycl::memory_order::acq_rel, sycl::memory_scope::device,
                   sycl::access::address_space::global_space>
      done(*ticket);
  if (done.fetch_add(1) + 1 != static_cast<int>(it.get_group().get_group_linear_range())) return;
  done.store(0, sycl::memory_order::relaxed);
  if (*counter >= 0 && *counter + places.tokens <= places.capacity) *counter += places.tokens;
}

// A cache [R, Hk, C, width], and int8 width + 4. Strides are in elements.
struct Cache {
  void* data;
  int64_t kind, row, head, token;
  inline void* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<char*>(data) + (b * row + h * head + t * token) * size_of(kind);
  }
};

// Stores element(0) .. element(width - 1).
template <typename F>
inline void store_row(sycl::sub_group sub, const F& element, int width, void* row, int kind) {
  const int first = sub.get_local_linear_id(), step = sub.get_local_linear_range();
  if (kind != kBytes) {
    for (int i = first; i < width; i += step) store_kind(row, kind, i, element(i));
    return;
  }
  float largest = 0.f;
  for (int i = first; i < width; i += step) largest = sycl::fmax(largest, sycl::fabs(element(i)));
  largest = sycl::reduce_over_group(sub, largest, sycl::maximum<float>());
  const bool some = largest > kSmallest;
  const float inverse = some ? 127.f / largest : 0.f;
  auto* codes = static_cast<int8_t*>(row);
  for (int i = first; i < width; i += step)
    codes[i] = static_cast<int8_t>(sycl::clamp(sycl::rint(element(i) * inverse), -127.f, 127.f));
  const uint32_t scale = sycl::bit_cast<uint32_t>(some ? largest / 127.f : 0.f);
  for (int i = first; i < 4; i += step) codes[width + i] = static_cast<int8_t>(scale >> 8 * i);
}

}  // namespace kv_rows
