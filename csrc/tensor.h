// Checks and accessors for entry points, over torch's stable ABI (one build serves every torch from 2.13 on).
// Kernels see raw pointers only; here every shape, dtype and stride is checked, naming the argument.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "dtype.h"
#include "parallel.h"
#include "tier.h"

// Registers CPU kernels: LLMRT_CPU_KERNELS(norm) { library.impl("rms_norm", TORCH_BOX(&rms_norm)); }
#define LLMRT_CPU_KERNELS(stem)                                               \
  static void register_##stem(torch::stable::detail::StableLibrary& library); \
  STABLE_TORCH_LIBRARY_IMPL(llmrt, CPU, library_##stem) {                     \
    if (llmrt::current_tier()) register_##stem(library_##stem);               \
  }                                                                           \
  static void register_##stem([[maybe_unused]] torch::stable::detail::StableLibrary& library)

namespace llmrt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline DType float_dtype(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_float(t.scalar_type()), name, " has dtype ", dtype_text(t.scalar_type()),
                  "; valid: float32, bfloat16, float16");
  return t.scalar_type() == ScalarType::Float      ? DType::f32
         : t.scalar_type() == ScalarType::BFloat16 ? DType::bf16
                                                   : DType::f16;
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has dtype ", dtype_text(t.scalar_type()), "; expected ",
                  dtype_text(dtype));
}

// A size of -1 stands for any.
inline void check_shape(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  bool same = t.dim() == (int64_t)sizes.size();
  int64_t i = 0;
  for (int64_t s : sizes) {
    if (!same) break;
    same = s < 0 || t.size(i) == s;
    i++;
  }
  if (same) return;
  std::string expected = "[";
  for (int64_t s : sizes)
    expected += (expected.size() > 1 ? ", " : "") + (s < 0 ? std::string("any") : std::to_string(s));
  STD_TORCH_CHECK(false, name, " has shape ", shape_text(t), "; expected ", expected, "]");
}

inline void check_same_shape(const Tensor& t, const Tensor& as, const char* name) {
  const auto a = t.sizes(), b = as.sizes();
  bool same = a.size() == b.size();
  for (size_t i = 0; i < b.size() && same; i++) same = a[i] == b[i];
  STD_TORCH_CHECK(same, name, " has shape ", shape_text(t), "; expected ", shape_text(as));
}

// Whether the elements of the last dimension are contiguous, which is all that most kernels ask of strides.
inline bool is_last_dense(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }
inline Tensor last_dense(const Tensor& t) { return is_last_dense(t) ? t : torch::stable::contiguous(t); }
inline void check_last_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_last_dense(t), name, " has stride ", t.stride(t.dim() - 1), " in its last dimension; expected 1");
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A contiguous CPU tensor in the dtype of `like`. Not by torch::stable::new_empty: its detour through the dispatcher
// takes 0.8 us longer, a third of a small operator call.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::array<int64_t, 16> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "a tensor has ", sizes.size(), " dimensions; valid: at most ",
                  strides.size());
  int64_t stride = 1;
  for (int64_t i = (int64_t)sizes.size() - 1; i >= 0; i--) strides[i] = stride, stride *= sizes[i] > 0 ? sizes[i] : 1;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The index of `text` among the names that an argument may have.
template <size_t count>
int one_of(const char* const (&names)[count], const std::string& text, const char* name) {
  for (size_t i = 0; i < count; i++)
    if (text == names[i]) return (int)i;
  std::string valid;
  for (const char* n : names) valid += (valid.empty() ? "" : ", ") + std::string(n);
  STD_TORCH_CHECK(false, name, " is '", text, "'; valid: ", valid);
  return -1;
}

// [.., K] seen as M rows of K elements with one row stride, without a copy where the strides allow it.
struct Rows {
  Tensor tensor;  // keeps a copy alive
  const void* data;
  int64_t M, K, stride;
};
inline Rows rows_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 1, name, " is a scalar; expected at least one dimension");
  const int64_t d = t.dim(), K = t.size(d - 1);
  int64_t M = 1;
  for (int64_t i = 0; i < d - 1; i++) M *= t.size(i);
  bool uniform = K <= 1 || t.stride(d - 1) == 1;
  int64_t stride = K;
  bool found = false;
  int64_t expected = 0;
  for (int64_t i = d - 2; i >= 0 && uniform; i--) {
    if (t.size(i) == 1) continue;
    if (!found) {
      stride = t.stride(i), found = true;
      uniform = stride >= K;
    } else {
      uniform = t.stride(i) == expected;
    }
    expected = t.stride(i) * t.size(i);
  }
  Tensor kept = uniform ? t : torch::stable::contiguous(t);
  if (!uniform) stride = K;
  return {kept, kept.const_data_ptr(), M, K, stride};
}

}  // namespace llmrt
