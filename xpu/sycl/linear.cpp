// Linear layer over a packed weight (ops/linear.py: tiles of 32 outputs x 128 inputs) for few rows. A sub-group of 16
// sweeps the tiles of a block of 32 outputs: lane l has outputs l and 16 + l, so that every read of a weight is 64
// contiguous bytes; the sub-groups of a work-group share the tiles of their block. A lane reads inputs 8 l .. + 7 of a
// tile; the others get them by broadcast from a lane known at compile time. CODING: what codes are (csrc/coding.h).
// ROWS: of inputs that share a reading of the
// weight. INT8: whether inputs are rounded to 8 bits per segment and multiplied as integers.
#include "element.hpp"

namespace linear {

enum Coding { nibbles, bytes, book, e4m3, e5m2 };
enum Epilogue { none, relu, silu, gelu, gelu_tanh, add, mul, silu_mul, gelu_mul, gelu_tanh_mul };
constexpr int kBits = CODING == nibbles || CODING == book ? 4 : 8;
constexpr int kLanes = 16, kGroups = 16;  // items of a sub-group; most sub-groups of a work-group
using Sum = std::conditional_t<INT8, int, float>;

struct Shape {
  int rows, outputs, inputs, x_stride, tiles, tile_bytes, group,
      padded_group;  // sizes below 2^31, offsets made of them are not
  int segment, scale_kind, x_kind;
  bool asymmetric, round_to_bf16;
  float unit;  // of the look-up's values
};

// The meaning of one code: an integer less its middle (8 or 128), or a value. `entry` is a lane's value of the look-up.
inline Sum decode(uint32_t word, int shift, Sum entry, sycl::sub_group sg) {
  if constexpr (CODING == nibbles) {
    return static_cast<int>(word << (28 - shift)) >> 28;
  } else if constexpr (CODING == bytes) {
    return static_cast<int>(word << (24 - shift)) >> 24;
  } else if constexpr (CODING == book) {
    return sycl::select_from_group(sg, entry, word >> shift & 15);
  } else {
    const uint32_t byte = word >> shift & 255;
    const uint16_t half = CODING == e5m2 ? byte << 8 : (byte & 0x80) << 8 | (byte & 0x7f) << 7;
    return static_cast<float>(sycl::bit_cast<sycl::half>(half)) *
           (CODING == e5m2 ? 1.f : 256.f);  // exponent bias 7, not 15
  }
}

inline uint32_t centered(uint32_t word) {
  return CODING == nibbles ? word ^ 0x88888888u : CODING == bytes ? word ^ 0x80808080u : word;
}

inline float scale_of(const uint8_t* scales, int kind, int i) {
  if (kind == 3) {
    const uint32_t exponent = scales[i];  // of a power of two
    return sycl::bit_cast<float>(exponent ? exponent << 23 : 0x00400000u);
  }
  return load_kind(scales, kind, i);
}

template <int M>
struct Rows {
  float x[M][8];   // this lane's inputs of the tile
  float scale[M];  // INT8: of this lane's segment
  Sum x_sum[M];    // asymmetric: sum of the segment's inputs
  Sum sum[M][2];   // of the segment, for outputs l and 16 + l
  float total[M][2];
};

// Reads a tile's inputs and, for INT8, rounds them as ops.linear.quantize_activations does.
template <int M>
inline void read_inputs(Rows<M>& r, const void* x, int m0, int tile, const Shape& s, sycl::sub_group sg) {
  const int position = tile * 128 + sg.get_local_linear_id() * 8;
  const int group = position / s.padded_group, within = position - group * s.padded_group, k = group * s.group + within;
  const int left = sycl::max(0, sycl::min(s.group - within, s.inputs - k));
#pragma unroll
  for (int m = 0; m < M; m++) {
    const int64_t row = static_cast<int64_t>(sycl::min(m0 + m, s.rows - 1)) * s.x_stride + k;
    float x8[8], factor = 1.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float v = i < left ? load_kind(x, s.x_kind, row + i) : 0.f;
      x8[i] = s.round_to_bf16 ? static_cast<float>(bfloat16(v)) : v;
    }
    if constexpr (INT8) {
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) largest = sycl::fmax(largest, sycl::fabs(x8[i]));
      for (int d = 1; d < s.segment / 8; d *= 2)
        largest = sycl::fmax(largest, sycl::permute_group_by_xor(sg, largest, d));
      factor = largest == 0.f ? 0.f : 127.f / largest;
      r.scale[m] = largest / 127.f;
    }
    Sum sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if constexpr (INT8)
        r.x[m][i] = static_cast<int>(sycl::fmin(sycl::fmax(sycl::rint(x8[i] * factor), -127.f), 127.f));
      else
        r.x[m][i] = x8[i];
      sum += r.x[m][i];
    }
    if (s.asymmetric) {
      for (int d = 1; d < s.segment / 8; d *= 2) sum += sycl::permute_group_by_xor(sg, sum, d);
      r.x_sum[m] = sum;
    }
  }
}

// Adds the sums of a segment, times its scales, to the totals.
template <int M>
inline void end_segment(Rows<M>& r, const uint8_t* tile, int segment, const Shape& s, sycl::sub_group sg) {
  const uint8_t* scales = tile + 32 * 128 * kBits / 8;
  const uint8_t* zeros = scales + 128 / s.segment * 32 * (s.scale_kind == 3 ? 1 : s.scale_kind == 0 ? 4 : 2);
  const int lane = sg.get_local_linear_id(), source = segment * s.segment / 8;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int at = segment * 32 + half * 16 + lane;
    const float scale = scale_of(scales, s.scale_kind, at) * s.unit;
    const Sum zero = s.asymmetric ? static_cast<Sum>(static_cast<int>(zeros[at]) - (kBits == 4 ? 8 : 128)) : Sum(0);
#pragma unroll
    for (int m = 0; m < M; m++) {
      Sum sum = r.sum[m][half];
      if (s.asymmetric) sum -= zero * sycl::select_from_group(sg, r.x_sum[m], source);
      const float one = INT8 ? scale * sycl::select_from_group(sg, r.scale[m], source) : scale;
      r.total[m][half] += one * static_cast<float>(sum);
      r.sum[m][half] = 0;
    }
  }
}

// Reads 8 rows of a tile, 512 bytes, in one message: word r of a lane is its dword of row r.
inline sycl::vec<uint32_t, 8> read_words(const uint32_t* words, sycl::sub_group sg) {
  sycl::vec<uint32_t, 8> out;
  const auto from = syclex::static_address_cast<sycl::access::address_space::global_space>(words);
  syclex::group_load(sg, from, out,
                     syclex::properties{syclex::data_placement_striped, syclex::contiguous_memory, syclex::full_group});
  return out;
}

template <int M>
inline void multiply_tile(Rows<M>& r, const uint8_t* tile, Sum entry, const Shape& s, sycl::sub_group sg) {
  constexpr int kStep = 16 / kBits;  // lanes whose inputs are in 8 rows
  const int lane = sg.get_local_linear_id();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(tile);
#pragma unroll 1
  for (int done = 0; done < kLanes;) {
    const auto eight = read_words(words, sg);
    words += 8 * kLanes;
#pragma unroll
    for (int row = 0; row < 8; row++) {
      const uint32_t word = centered(eight[row]);
      const int half = row % 2, k8 = kBits == 4 ? row / 2 : row / 4, first = kBits == 4 ? 0 : row / 2 % 2 * 4;
#pragma unroll
      for (int i = 0; i < 32 / kBits; i++) {
        const Sum w = decode(word, i % 4 * 8 + i / 4 * 4, entry, sg);
#pragma unroll
        for (int m = 0; m < M; m++) r.sum[m][half] += sycl::group_broadcast(sg, r.x[m][first + i], k8) * w;
      }
    }
    // The inputs move on, so that broadcasts are from lanes known at compile time: a register, not a message.
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int i = 0; i < 8; i++) r.x[m][i] = sycl::select_from_group(sg, r.x[m][i], (lane + kStep) % kLanes);
    }
    done += kStep;
    if (done * 8 % s.segment == 0) end_segment(r, tile, (done * 8 - 1) / s.segment, s, sg);
  }
}

inline float activate(float v, int epilogue) {
  switch (epilogue) {
    case relu:
      return sycl::fmax(v, 0.f);
    case Epilogue::silu:
    case silu_mul:
      return ::silu(v);
    case Epilogue::gelu:
    case gelu_mul:
      return ::gelu(v);
    case Epilogue::gelu_tanh:
    case gelu_tanh_mul:
      return ::gelu_tanh(v);
    default:
      return v;
  }
}

// Writes one output of one row, or with a gated epilogue the one of a gate (v0) and its factor (v1).
inline void finish(float v0, float v1, const void* bias, const void* other, void* out, int64_t m, int64_t block,
                   int lane, int epilogue, int bias_kind, const Shape& s) {
  const float v[2] = {v0, v1};
  float y[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int n = block * 32 + half * 16 + lane;
    y[half] = v[half] + (bias && (epilogue >= silu_mul || n < s.outputs) ? load_kind(bias, bias_kind, n) : 0.f);
  }
  if (epilogue >= silu_mul) {
    const int n = block * 16 + lane;
    if (n < s.outputs)
      store_kind(out, s.x_kind, static_cast<int64_t>(m) * s.outputs + n, activate(y[0], epilogue) * y[1]);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int n = block * 32 + half * 16 + lane;
    if (n >= s.outputs) continue;
    const int64_t at = static_cast<int64_t>(m) * s.outputs + n;
    float one = activate(y[half], epilogue);
    if (epilogue == add) one += load_kind(other, s.x_kind, at);
    if (epilogue == mul) one *= load_kind(other, s.x_kind, at);
    store_kind(out, s.x_kind, at, one);
  }
}

// What the sub-groups of a work-group have summed. (sycl::group_local_memory would do, but SYCL's CPU compiler 2026.2
// dies of it.)
template <int M>
struct Parts {
  float sum[kGroups][M][2][kLanes];
};
template <int M>
syclex::work_group_static<Parts<M>> parts_of;

template <int M>
inline void run(const void* x, const uint8_t* weight, const void* bias, const void* other, const float* values,
                void* out, const Shape& s, int epilogue, int bias_kind) {
  const auto it = item();
  const auto sg = it.get_sub_group();
  const int part = it.get_local_id(1), parts = it.get_local_range(1), lane = sg.get_local_linear_id();
  const int block = it.get_group(0), m0 = it.get_group(2) * M;  // groups of one block run side by side
  const Sum entry = CODING == book ? static_cast<Sum>(values[lane]) : Sum(0);
  Rows<M> r{};
  const uint8_t* tile = weight + (static_cast<int64_t>(block) * s.tiles + part) * s.tile_bytes;
  for (int t = part; t < s.tiles; t += parts, tile += parts * s.tile_bytes) {
    read_inputs(r, x, m0, t, s, sg);
    multiply_tile(r, tile, entry, s, sg);
  }
  auto& shared = static_cast<Parts<M>&>(parts_of<M>).sum;
#pragma unroll
  for (int m = 0; m < M; m++) shared[part][m][0][lane] = r.total[m][0], shared[part][m][1][lane] = r.total[m][1];
  sycl::group_barrier(it.get_group());
  for (int m = part; m < M && m0 + m < s.rows; m += parts) {
    float v0 = 0.f, v1 = 0.f;
    for (int p = 0; p < parts; p++) v0 += shared[p][m][0][lane], v1 += shared[p][m][1][lane];
    finish(v0, v1, bias, other, out, m0 + m, block, lane, epilogue, bias_kind, s);
  }
}

}  // namespace linear

KERNEL(16)
void quant_linear(const void* x, const uint8_t* weight, const void* bias, const void* other, const float* values,
                  void* out, int64_t rows, int64_t outputs, int64_t inputs, int64_t x_stride, int64_t tiles,
                  int64_t tile_bytes, int64_t group, int64_t padded_group, int64_t segment, int64_t scale_kind,
                  int64_t x_kind, int64_t bias_kind, int64_t asymmetric, int64_t round_to_bf16, int64_t epilogue,
                  float unit) {
  const linear::Shape s{int(rows),       int(outputs),    int(inputs),        int(x_stride), int(tiles),
                        int(tile_bytes), int(group),      int(padded_group),  int(segment),  int(scale_kind),
                        int(x_kind),     asymmetric != 0, round_to_bf16 != 0, unit};
  linear::run<ROWS>(x, weight, bias, other, values, out, s, epilogue, bias_kind);
}
