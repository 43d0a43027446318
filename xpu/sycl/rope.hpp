// One head under rotary position embedding, with a norm before it if it has a weight.
#pragma once
#include "element.hpp"

namespace rope {

// Cosines and sines: of each row and token, or with positions a table of `rows` rows. Strides are in elements.
struct Angles {
  const void *cos, *sin;
  int64_t kind, row, token, column;
  const int64_t* positions;
  int64_t positions_row, positions_token, rows;

  // Where those of token s of row b begin, or -1: its position is outside the table.
  inline int64_t begin(int64_t b, int64_t s) const {
    if (!positions) return b * row + s * token;
    const int64_t place = positions[b * positions_row + s * positions_token];
    return place < 0 || place >= rows ? -1 : place * token;
  }
};

// What does not differ between heads.
struct Form {
  int width, half;  // D, R / 2
  bool interleaved;
  float eps, offset;
};

struct Head {
  const T* x;
  Angles angles;
  int64_t begin;
  Form form;
  const void* weight;
  int weight_kind;
  float scale = 1.f;

  inline Head(sycl::sub_group sub, const T* x, const Angles& angles, int64_t begin, const Form& form,
              const void* weight, int weight_kind)
      : x(x), angles(angles), begin(begin), form(form), weight(weight), weight_kind(weight_kind) {
    if (!weight) return;
    float total = 0.f;
    for (int i = sub.get_local_linear_id(); i < form.width; i += sub.get_local_linear_range())
      total += load(x + i) * load(x + i);
    scale = 1.f / sycl::sqrt(sycl::reduce_over_group(sub, total, sycl::plus<float>()) / form.width + form.eps);
  }

  inline float normed(int i) const {
    const float v = load(x + i);
    return weight ? rounded<T>(v * scale * (load_kind(weight, weight_kind, i) + form.offset)) : v;
  }

  // Element i of the result; not a number where the position is outside the table.
  inline float operator()(int i) const {
    const int half = form.half;
    if (i >= 2 * half) return normed(i);
    const bool first = form.interleaved ? i % 2 == 0 : i < half;
    const int pair = form.interleaved ? i / 2 : first ? i : i - half;
    const int distance = form.interleaved ? 1 : half;
    if (begin < 0) return std::numeric_limits<float>::quiet_NaN();
    const float cos = load_kind(angles.cos, angles.kind, begin + pair * angles.column);
    const float sin = load_kind(angles.sin, angles.kind, begin + pair * angles.column);
    const float v = normed(i), other = normed(first ? i + distance : i - distance);
    return rounded<T>(first ? v * cos - other * sin : v * cos + other * sin);
  }

  inline void store_to(sycl::sub_group sub, T* out) const {
    for (int i = sub.get_local_linear_id(); i < form.width; i += sub.get_local_linear_range())
      store(out + i, (*this)(i));
  }
};

}  // namespace rope
