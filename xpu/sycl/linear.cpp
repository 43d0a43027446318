// Linear layer over a packed weight (ops/linear.py: tiles of 32 outputs x 128 inputs) for few rows. A sub-group of 16
// sweeps the tiles of a block of 32 outputs: lane l has outputs l and 16 + l, so that every read of a weight is 64
// contiguous bytes; the sub-groups of a work-group share the tiles of their block. The rows of a work-group share every
// reading of the weight.
//
// Registers bound the number of rows. On Arc a lane has 64 numbers of 32 bits: the totals of 8 rows take 16, the words
// of a step 8, addresses and what is computed the rest. So inputs are in local memory, and a step has them spread over
// the lanes, a number for 16 of them, and takes each by broadcast from a lane known at compile time: that is a region
// of a register and costs nothing. With INT8 inputs are rounded to 8 bits per segment, once for a tile, and a number
// has 4 of them, which are multiplied by 4 codes at once (dp4a); the integers of a step are summed, and scaled right
// away. Without it a weight is scaled before it is multiplied, so that there are no sums but the totals. What is equal
// for all lanes is made known to be: its addresses and conditions then take a 16th.
//
// CODING: what codes are (csrc/coding.h). INT8: whether products are of integers. ROWS: most rows of a work-group.
#include "element.hpp"

namespace linear {

enum Coding { nibbles, bytes, book, e4m3, e5m2 };
enum Epilogue { none, relu, silu, gelu, gelu_tanh, add, mul, silu_mul, gelu_mul, gelu_tanh_mul };
constexpr int kBits = CODING == nibbles || CODING == book ? 4 : 8;
constexpr bool kIntegers = CODING == nibbles || CODING == bytes;
constexpr int kLanes = 16, kGroups = 16;          // items of a sub-group; most sub-groups of a work-group
constexpr int kInputs = 128 / kBits;              // of a step, whose weight is 8 words of each lane
constexpr int kPerWord = INT8 ? 4 : 1;            // inputs in a word of local memory
constexpr int kWords = kInputs / kPerWord;        // of a row and a step
constexpr int kSteps = INT8 ? 128 / kInputs : 1;  // whose inputs are in local memory at once
// By how much products are too large: nibbles are multiplied by 16, e4m3 is read with the exponent bias of half.
constexpr float kUnit = INT8 && CODING == nibbles ? 1.f / 16 : CODING == e4m3 ? 256.f : 1.f;

struct Shape {
  int rows, outputs, inputs, x_stride, tiles, tile_bytes, group,
      padded_group;  // sizes below 2^31, offsets made of them are not
  int segment_bits;  // a segment is 2^segment_bits inputs
  int zeros_at;      // of a tile's bytes
  int scale_kind, x_kind;
  bool asymmetric, round_to_bf16;
  bool whole_words;  // inputs of 16 bits: even ones of a row are at multiples of 4 bytes
  float unit;        // of the look-up's values
};

// Numbers of a lane that the inputs of M rows and a step are.
template <int M>
constexpr int kNumbers = (kWords * M + kLanes - 1) / kLanes;

template <int M>
struct Inputs {
  uint32_t x[kSteps][kNumbers<M> * kLanes];  // [kWords][M]
  float scale[4][M], sum[4][M];              // INT8, of a segment: the unit; the sum, if the layout is asymmetric
};

// Inputs of the sub-groups of a work-group, and later what they have summed. (sycl::group_local_memory would do, but
// SYCL's CPU compiler 2026.2 dies of it.)
template <int M>
union Local {
  Inputs<M> inputs[kGroups];
  float sum[kGroups][M][2][kLanes];
};
template <int M>
syclex::work_group_static<Local<M>> local_of;

// The first of a lane's inputs, and the end of its group's.
struct Place {
  int k, end;
};

// Of position first + offset of the padded row: first is equal for all lanes, and so its division takes few registers.
inline Place place_of(int first, int offset, const Shape& s) {
  if (s.padded_group == s.group) return {first + offset, s.inputs};
  int group = first / s.padded_group, within = first - group * s.padded_group + offset;
#pragma unroll
  for (int i = 1; i < 128 / 32; i++) {  // a tile has parts of 4 groups or fewer
    const bool next = within >= s.padded_group;
    group += next, within -= next ? s.padded_group : 0;
  }
  return {group * s.group + within, sycl::min(s.inputs, (group + 1) * s.group)};
}

// Reads N inputs of a row.
template <int N>
inline void read_inputs(float (&x)[N], const void* from, int row, Place place, const Shape& s) {
  const int k = place.k, end = place.end;
  const int64_t at = static_cast<int64_t>(row) * s.x_stride + k;
  if (s.x_kind == 0) {
    const float* p = static_cast<const float*>(from) + at;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = k + i < end ? p[i] : 0.f;
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from) + at;
    uint16_t bits[N];
    if (N > 1 && s.whole_words && k + N <= end) {
#pragma unroll
      for (int i = 0; i < N; i++) bits[i] = reinterpret_cast<const uint32_t*>(p)[i / 2] >> i % 2 * 16;
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) bits[i] = k + i < end ? p[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
      x[i] = s.x_kind == 1 ? sycl::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16)
                           : static_cast<float>(sycl::bit_cast<sycl::half>(bits[i]));
  }
  if (s.round_to_bf16) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = static_cast<float>(bfloat16(x[i]));
  }
}

// Rounds a tile's inputs as ops.linear.quantize_activations does, 8 of a row in each lane.
template <int M>
inline void round_tile(Inputs<M>& to, const void* from, int m0, int rows, int tile, const Shape& s,
                       sycl::sub_group sg) {
  const int lane = sg.get_local_linear_id(), lane_bits = s.segment_bits - 3;
  const Place place = place_of(tile * 128, lane * 8, s);
#pragma unroll 1
  for (int m = 0; m < rows; m++) {
    float x[8], largest = 0.f;
    read_inputs(x, from, m0 + m, place, s);
#pragma unroll
    for (int i = 0; i < 8; i++) largest = sycl::fmax(largest, sycl::fabs(x[i]));
    for (int d = 1; d >> lane_bits == 0; d *= 2)
      largest = sycl::fmax(largest, sycl::permute_group_by_xor(sg, largest, d));
    const float factor = largest < 0x1p-118f ? 0.f : 127.f / largest, scale = largest / 127.f;
    uint32_t words[2] = {0, 0};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int one = static_cast<int>(sycl::rint(x[i] * factor));
      words[i / 4] |= (one & 255u) << (8 * (i % 4));
      sum += one;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) to.x[(lane * 2 + i) / kWords][(lane * 2 + i) % kWords * M + m] = words[i];
    if (s.asymmetric) {
      for (int d = 1; d >> lane_bits == 0; d *= 2) sum += sycl::permute_group_by_xor(sg, sum, d);
    }
    const int segment = lane >> lane_bits;
    if (segment << lane_bits == lane) to.scale[segment][m] = scale, to.sum[segment][m] = scale * sum;
  }
}

// Reads a step's inputs.
template <int M>
inline void read_step(Inputs<M>& to, const void* from, int m0, int rows, int position, const Shape& s, int lane) {
  constexpr int kEach = kInputs / kLanes;
  const Place place = place_of(position, lane * kEach, s);
#pragma unroll 1
  for (int m = 0; m < rows; m++) {
    float x[kEach];
    read_inputs(x, from, m0 + m, place, s);
#pragma unroll
    for (int i = 0; i < kEach; i++) to.x[0][(lane * kEach + i) * M + m] = sycl::bit_cast<uint32_t>(x[i]);
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

inline float scale_of(const uint8_t* scales, int kind, int i) {
  if (kind == 3) {
    const uint32_t exponent = scales[i];  // of a power of two
    return sycl::bit_cast<float>(exponent ? exponent << 23 : 0x00400000u);
  }
  return load_kind(scales, kind, i);
}

// Of a lane's two outputs: a weight is code * scale + shift, the code being what `decode` returns. With INT8 it is what
// `integers` returns, and the shift is that of an asymmetric layout alone.
struct Segment {
  float scale[2], shift[2];
};

inline Segment read_segment(const uint8_t* tile, int segment, const Shape& s, int lane) {
  constexpr int kMiddle = kBits == 4 ? 8 : 128;
  Segment out;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int at = segment * 32 + half * 16 + lane;
    const float scale = scale_of(tile + 32 * 128 * kBits / 8, s.scale_kind, at) * s.unit;
    const int zero = (s.asymmetric ? tile[s.zeros_at + at] : kMiddle) - (INT8 ? kMiddle : 0);
    out.scale[half] = scale * kUnit;
    out.shift[half] = kIntegers ? -scale * static_cast<float>(zero) : 0.f;
  }
  return out;
}

using Bytes = int8_t __attribute__((ext_vector_type(4)));

// c + a . b of 4 signed bytes each. Intel's compiler makes one instruction (dp4a) of this form; shifts instead of a
// vector's elements would have it gather the bytes again, and arithmetic of whole vectors takes the CPU device twice as
// long to compile.
inline int dot(uint32_t a, uint32_t b, int c) {
  const Bytes x = sycl::bit_cast<Bytes>(a), y = sycl::bit_cast<Bytes>(b);
#pragma unroll
  for (int i = 0; i < 4; i++) c += x[i] * y[i];
  return c;
}

// The 4 integers of a word's bytes, or of their low (part 0) or high nibbles (part 1), as bytes; those of nibbles times
// 16. `entry` is a lane's value of the look-up.
inline uint32_t integers(uint32_t word, int part, float entry, sycl::sub_group sg) {
  if constexpr (CODING == nibbles) {
    return ((part ? word : word << 4) ^ 0x80808080u) & 0xf0f0f0f0u;
  } else if constexpr (CODING == bytes) {
    return word ^ 0x80808080u;
  } else {
    // A byte, but not known as one to the compiler, which would keep four of them in registers of their own.
    const uint32_t value = static_cast<int>(entry) + 128;
    uint32_t out = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) out |= sycl::select_from_group(sg, value, word >> (8 * i + 4 * part) & 15) << 8 * i;
    return out ^ 0x80808080u;
  }
}

// The code of byte `i` or of its nibble `part`, or the value that it stands for times 1 / kUnit.
inline float decode(uint32_t word, int i, int part, float entry, sycl::sub_group sg) {
  const uint32_t code = word >> (8 * i + 4 * part) & (kBits == 4 ? 15 : 255);
  if constexpr (kIntegers) {
    return static_cast<float>(static_cast<int>(code));
  } else if constexpr (CODING == book) {
    return sycl::select_from_group(sg, entry, code);
  } else {
    const uint16_t half = CODING == e5m2 ? code << 8 : (code & 0x80) << 8 | (code & 0x7f) << 7;
    return static_cast<float>(sycl::bit_cast<sycl::half>(half));
  }
}

template <int M>
using Totals = float[M][2];

// Adds the products of a step. given: its inputs, [kWords][M]; factor: with INT8 the unit of the inputs of row = lane.
template <int M>
inline void multiply(Totals<M>& total, const sycl::vec<uint32_t, 8>& words, const uint32_t* given, const Segment& now,
                     float factor, float entry, sycl::sub_group sg) {
  constexpr int kParts = 8 / kBits;
  const int lane = sg.get_local_linear_id();
  uint32_t x[kNumbers<M>];
#pragma unroll
  for (int i = 0; i < kNumbers<M>; i++) x[i] = given[i * kLanes + lane];
  const auto input = [&](int m, int i) __attribute__((always_inline)) {
    const int at = i * M + m;
    return sycl::group_broadcast(sg, x[at / kLanes], at % kLanes);
  };
  if constexpr (INT8) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t w[kWords];
#pragma unroll
      for (int i = 0; i < kWords; i++) w[i] = integers(words[i / kParts * 2 + half], i % kParts, entry, sg);
#pragma unroll
      for (int m = 0; m < M; m++) {
        int sum = 0;
#pragma unroll
        for (int i = 0; i < kWords; i++) sum = dot(w[i], input(m, i), sum);
        total[m][half] += now.scale[half] * sycl::group_broadcast(sg, factor, m) * static_cast<float>(sum);
      }
    }
  } else {
#pragma unroll
    for (int row = 0; row < 8; row++) {
#pragma unroll
      for (int i = 0; i < 4 * kParts; i++) {
        const int half = row % 2;
        const float code = decode(words[row], i % 4, i / 4, entry, sg);
        const float w = kIntegers ? sycl::fma(code, now.scale[half], now.shift[half]) : code * now.scale[half];
#pragma unroll
        for (int m = 0; m < M; m++) total[m][half] += sycl::bit_cast<float>(input(m, row / 2 * 4 * kParts + i)) * w;
      }
    }
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

template <int M>
inline void run(const void* x, const uint8_t* weight, const void* bias, const void* other, const float* values,
                void* out, const Shape& s, int epilogue, int bias_kind) {
  const auto it = item();
  const auto sg = it.get_sub_group();
  const int part = sycl::group_broadcast(sg, static_cast<int>(it.get_local_id(1)), 0);  // now known to be equal for all
  const int parts = it.get_local_range(1), lane = sg.get_local_linear_id();
  const int block = it.get_group(0), m0 = it.get_group(2) * M;  // groups of one block run side by side
  const int rows = sycl::min(M, s.rows - m0);
  const float entry = CODING == book ? values[lane] : 0.f;
  auto& local = static_cast<Local<M>&>(local_of<M>);
  Inputs<M>& inputs = local.inputs[part];
  Totals<M> total{};
  const uint8_t* tile = weight + (static_cast<int64_t>(block) * s.tiles + part) * s.tile_bytes;
  for (int t = part; t < s.tiles; t += parts, tile += parts * s.tile_bytes) {
    if constexpr (INT8) {
      sycl::group_barrier(sg);
      round_tile(inputs, x, m0, rows, t, s, sg);
      sycl::group_barrier(sg);
    }
    Segment now;
    float factor = 0.f;
#pragma unroll 1
    for (int step = 0; step < 128 / kInputs; step++) {
      const auto words = read_words(reinterpret_cast<const uint32_t*>(tile) + step * 8 * kLanes, sg);
      if constexpr (!INT8) {
        sycl::group_barrier(sg);
        read_step(inputs, x, m0, rows, t * 128 + step * kInputs, s, lane);
        sycl::group_barrier(sg);
      }
      const int segment = step * kInputs >> s.segment_bits;
      if (segment << s.segment_bits == step * kInputs) {
        now = read_segment(tile, segment, s, lane);
        if constexpr (INT8) {
          factor = inputs.scale[segment][lane % M];
          if (s.asymmetric) {
            const float sum = inputs.sum[segment][lane % M];
#pragma unroll
            for (int m = 0; m < M; m++) {
              const float one = sycl::group_broadcast(sg, sum, m);
              total[m][0] += now.shift[0] * one, total[m][1] += now.shift[1] * one;
            }
          }
        }
      }
      multiply<M>(total, words, inputs.x[INT8 ? step : 0], now, factor, entry, sg);
    }
  }
  sycl::group_barrier(it.get_group());  // sums go where inputs were
#pragma unroll
  for (int m = 0; m < M; m++) local.sum[part][m][0][lane] = total[m][0], local.sum[part][m][1][lane] = total[m][1];
  sycl::group_barrier(it.get_group());
  for (int m = part; m < rows; m += parts) {
    float v0 = 0.f, v1 = 0.f;
    for (int p = 0; p < parts; p++) v0 += local.sum[p][m][0][lane], v1 += local.sum[p][m][1][lane];
    finish(v0, v1, bias, other, out, m0 + m, block, lane, epilogue, bias_kind, s);
  }
}

}  // namespace linear

// One row has a kernel of its own, without the registers and the local memory of many.
#define ARGUMENTS                                                                                                      \
  const void *x, const uint8_t *weight, const void *bias, const void *other, const float *values, void *out,           \
      int64_t rows, int64_t outputs, int64_t inputs, int64_t x_stride, int64_t tiles, int64_t tile_bytes,              \
      int64_t group, int64_t padded_group, int64_t segment_bits, int64_t zeros_at, int64_t scale_kind, int64_t x_kind, \
      int64_t bias_kind, int64_t asymmetric, int64_t round_to_bf16, int64_t whole_words, int64_t epilogue, float unit
#define SHAPE                                                                                               \
  {int(rows),       int(outputs),       int(inputs),       int(x_stride), int(tiles),      int(tile_bytes), \
   int(group),      int(padded_group),  int(segment_bits), int(zeros_at), int(scale_kind), int(x_kind),     \
   asymmetric != 0, round_to_bf16 != 0, whole_words != 0,  unit}

KERNEL(16)
void quant_linear_row(ARGUMENTS) { linear::run<1>(x, weight, bias, other, values, out, SHAPE, epilogue, bias_kind); }

KERNEL(16)
void quant_linear_rows(ARGUMENTS) {
  linear::run<ROWS>(x, weight, bias, other, values, out, SHAPE, epilogue, bias_kind);
}
