// What every kernel source starts with: names and conversions. The headers it needs, not sycl.hpp, which takes twice as
// long to compile.
#pragma once
#include <cstdint>
#include <limits>
#include <sycl/atomic_ref.hpp>
#include <sycl/bit_cast.hpp>
#include <sycl/builtins.hpp>
#include <sycl/ext/oneapi/experimental/address_cast.hpp>
#include <sycl/ext/oneapi/experimental/group_load_store.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/ext/oneapi/work_group_static.hpp>
#include <sycl/group_algorithm.hpp>
#include <sycl/group_barrier.hpp>
#include <sycl/half_type.hpp>

namespace syclex = sycl::ext::oneapi::experimental;

// The upper half of a float. SYCL's own type calls a library that its CPU compiler (2026.2) dies of, and that older
// GPUs emulate likewise.
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float v) {
    const uint32_t b = sycl::bit_cast<uint32_t>(v);
    bits = static_cast<uint16_t>(v != v ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16);  // to nearest even
  }
  explicit operator float() const { return sycl::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// A kernel over work-groups in three dimensions whose sub-groups have SG items.
#define KERNEL(SG) SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclex::nd_range_kernel<3>)) [[sycl::reqd_sub_group_size(SG)]]

inline sycl::nd_item<3> item() { return sycl::ext::oneapi::this_work_item::get_nd_item<3>(); }

template <typename T>
inline float load(const T* p) {
  return static_cast<float>(*p);
}
template <typename T>
inline void store(T* p, float v) {
  *p = static_cast<T>(v);
}

// Elements whose dtype is an argument: 0 float, 1 bfloat16, 2 half (`KINDS` of bundle.py); 4 are bytes, which the
// kernels that take them read themselves.
constexpr int kBytes = 4;
inline int size_of(int kind) { return kind == 0 ? 4 : kind == kBytes ? 1 : 2; }
inline float load_kind(const void* p, int kind, int64_t i) {
  if (kind == 0) return static_cast<const float*>(p)[i];
  if (kind == 1) return load(static_cast<const bfloat16*>(p) + i);
  return load(static_cast<const sycl::half*>(p) + i);
}
inline void store_kind(void* p, int kind, int64_t i, float v) {
  if (kind == 0)
    static_cast<float*>(p)[i] = v;
  else if (kind == 1)
    store(static_cast<bfloat16*>(p) + i, v);
  else
    store(static_cast<sycl::half*>(p) + i, v);
}

// What storing v as a tensor's element of type T leaves of it.
template <typename T>
inline float rounded(float v) {
  return static_cast<float>(static_cast<T>(v));
}

inline float silu(float x) { return x / (1.f + sycl::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.f + sycl::erf(x * 0.70710678118654752f)); }
inline float gelu_tanh(float x) {
  return 0.5f * x * (1.f + sycl::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
