// Entry point of attention: see ops/attention.py for what it means.
#include "attention.h"

#include <stdlib.h>

#include <atomic>
#include <memory>

#include "kv_append.h"

namespace llmrt {
namespace {

constexpr int64_t kSharedRows = 128;   // most query rows per key for which sharing reads between beams beats packing
constexpr int64_t kSplitTokens = 256;  // fewest tokens of a split
constexpr int64_t kScannedMask = 1 << 18;   // largest mask that one thread looks through first: 10 us
constexpr int64_t kThreadBytes = 64 << 10;  // keys and values below which a second thread costs more than it saves
constexpr int64_t kTaskFloats = 32 << 10;   // output of a prefill task: it stays in the second cache level
constexpr int64_t kMostTaskRows = 504, kFewestTaskRows = 96, kTaskRowsUnit = 12;  // whole register tiles of every tier

// Memory that a thread keeps between calls.
struct Buffer {
  char* data = nullptr;
  int64_t bytes = 0;
  char* at_least(int64_t wanted) {  // null where there is no memory: exceptions may not leave a parallel region
    if (wanted <= bytes) return data;
    free(data);
    bytes = (wanted + 4095) / 4096 * 4096;
    data = (char*)aligned_alloc(64, bytes);
    if (!data) bytes = 0;
    return data;
  }
  ~Buffer() { free(data); }
};
thread_local Buffer scratch_buffer, state_buffer;

// What the tensors must be kept alive for while the kernels run.
struct Operands {
  Tensor query, key, value;
  OptionalTensor mask, slopes, sinks, rows;
};

void set_operands(AttentionArgs& a, Operands& o, int64_t length, bool causal, int64_t window, double softcap,
                  int64_t beams) {
  a.dtype = float_dtype(o.query, "query");
  check_shape(o.query, {-1, -1, -1, -1}, "query");
  a.B = o.query.size(0), a.S = o.query.size(1), a.H = o.query.size(2), a.D = o.query.size(3);
  check_shape(o.key, {-1, -1, -1, -1}, "key");
  check_stored(o.key, o.query.scalar_type(), "key");
  check_dtype(o.value, o.key.scalar_type(), "value");
  a.cache_dtype = cache_dtype(o.key, "key");
  check_shape(o.key, {-1, -1, -1, a.D + (a.cache_dtype == DType::i8 ? kScaleBytes : 0)}, "key");
  const int64_t cache_rows = o.key.size(0), capacity = o.key.size(2);
  a.Hk = o.key.size(1);
  check_shape(o.value, {cache_rows, a.Hk, capacity, -1}, "value");
  check_stored(o.value, o.query.scalar_type(), "value");
  a.Dv = row_width(o.value);
  check_last_dense(o.key, "key");
  check_last_dense(o.value, "value");
  STD_TORCH_CHECK(a.Hk > 0 && a.H % a.Hk == 0, "query has ", a.H, " heads; expected a multiple of the ", a.Hk,
                  " key heads");
  a.G = a.H / a.Hk, a.length = length, a.causal = causal, a.window = window, a.softcap = (float)softcap,
  a.beams = beams;
  STD_TORCH_CHECK(length >= 0 && length <= capacity, "length is ", length, "; expected 0 to ", capacity,
                  ", the tokens that key holds");
  STD_TORCH_CHECK(!causal || a.S <= length, "query has ", a.S, " tokens and length is ", length,
                  "; causal attention counts the query's tokens in length");
  STD_TORCH_CHECK(window >= 0, "window is ", window, "; expected 0 (none) or more");
  STD_TORCH_CHECK(softcap >= 0, "softcap is ", softcap, "; expected 0 (none) or more");
  STD_TORCH_CHECK(beams >= 1 && a.B % beams == 0, "beams is ", beams, "; expected a divisor of the ", a.B,
                  " rows of query");
  STD_TORCH_CHECK(o.rows || cache_rows >= a.B, "key has ", cache_rows, " rows; expected at least ", a.B, ", or rows");
  o.query = last_dense(o.query);
  a.query = o.query.const_data_ptr(), a.key = o.key.const_data_ptr(), a.value = o.value.const_data_ptr();
  a.query_b = o.query.stride(0), a.query_s = o.query.stride(1), a.query_h = o.query.stride(2);
  a.key_r = o.key.stride(0), a.key_h = o.key.stride(1), a.key_t = o.key.stride(2);
  a.value_r = o.value.stride(0), a.value_h = o.value.stride(1), a.value_t = o.value.stride(2);
}

void set_mask(AttentionArgs& a, OptionalTensor& mask) {
  if (!mask) return;
  const int64_t d = mask->dim();
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  bool fits = d > 0 && mask->size(d - 1) >= a.length;
  if (d == 2) {
    fits = fits && boolean && mask->size(0) == a.B;
  } else {
    fits = fits && d == 4 && (mask->size(0) == 1 || mask->size(0) == a.B) &&
           (mask->size(1) == 1 || mask->size(1) == a.H) && (mask->size(2) == 1 || mask->size(2) == a.S);
    if (!boolean) a.mask_dtype = float_dtype(*mask, "mask");
  }
  STD_TORCH_CHECK(fits, "mask has shape ", shape_text(*mask), " and dtype ", dtype_text(mask->scalar_type()),
                  "; expected bool [", a.B, ", >= ", a.length, "], or bool or floating [", a.B, " or 1, ", a.H,
                  " or 1, ", a.S, " or 1, >= ", a.length, "]");
  mask = last_dense(*mask);
  a.mask_kind = boolean ? MaskKind::boolean : MaskKind::floating, a.mask = mask->const_data_ptr();
  a.mask_b = mask->size(0) == 1 ? 0 : mask->stride(0);
  if (d == 2) return;
  a.mask_h = mask->size(1) == 1 ? 0 : mask->stride(1);
  a.mask_s = mask->size(2) == 1 ? 0 : mask->stride(2);
}

void set_rows(AttentionArgs& a, OptionalTensor& rows, int64_t cache_rows) {
  if (!rows) return;
  check_dtype(*rows, ScalarType::Int, "rows");
  STD_TORCH_CHECK(rows->dim() == 2 && rows->size(0) == a.B && rows->size(1) >= a.length, "rows has shape ",
                  shape_text(*rows), "; expected [", a.B, ", >= ", a.length, "]");
  rows = last_dense(*rows);
  a.rows = (const int32_t*)rows->const_data_ptr(), a.rows_b = rows->stride(0);
  for (int64_t b = 0; b < a.B; b++) {
    const int32_t* row = a.rows + b * a.rows_b;
    if (tier().attention.rows_in_range(row, a.length, cache_rows)) continue;
    for (int64_t t = 0; t < a.length; t++)
      STD_TORCH_CHECK(row[t] >= 0 && row[t] < cache_rows, "rows has the entry ", row[t], "; expected 0 to ",
                      cache_rows - 1);
  }
}

void set_head_vectors(AttentionArgs& a, OptionalTensor& slopes, OptionalTensor& sinks) {
  if (slopes) {
    check_dtype(*slopes, ScalarType::Float, "slopes");
    check_shape(*slopes, {a.H}, "slopes");
    slopes = dense(*slopes), a.slopes = (const float*)slopes->const_data_ptr();
  }
  if (sinks) {
    a.sinks_dtype = float_dtype(*sinks, "sinks");
    check_shape(*sinks, {a.H}, "sinks");
    sinks = dense(*sinks), a.sinks = sinks->const_data_ptr();
  }
}

// How the work is cut: samples x kv heads x pieces of the query rows x splits of the tokens.
struct Plan {
  bool decode;
  int64_t samples, rows, piece_rows, pieces, first, end, splits, split_tokens, tasks;
  AttentionTask task(const AttentionArgs& a, int64_t i) const {
    const int64_t split = i % splits, unit = i / splits % (samples * a.Hk);
    const int64_t piece = pieces - 1 - i / splits / (samples * a.Hk);  // the newest tokens, which see most, first
    const int64_t row1 = (piece + 1) * piece_rows, token1 = first + (split + 1) * split_tokens;
    return {unit / a.Hk,
            unit % a.Hk,
            piece * piece_rows,
            row1 < rows ? row1 : rows,
            first + split * split_tokens,
            token1 < end ? token1 : end,
            nullptr};
  }
};

// Elements of the mask that are not copies of others; above any limit where there is no mask.
int64_t mask_elements(const AttentionArgs& a) {
  if (a.mask_kind == MaskKind::none) return INT64_MAX;
  return (a.mask_b ? a.B : 1) * (a.mask_h ? a.H : 1) * (a.mask_s ? a.S : 1) * a.length;
}

Plan make_plan(AttentionArgs& a, int64_t threads) {
  Plan p{};
  p.decode = a.S * a.G <= tier().attention.most_decode_rows(a) || (a.beams > 1 && a.rows && a.S * a.G <= kSharedRows);
  if (!p.decode || !a.rows) a.beams = 1;  // nothing to share
  p.samples = a.B / a.beams, p.rows = p.piece_rows = a.beams * a.S * a.G;
  const int64_t units = p.samples * a.Hk;
  if (!p.decode) {
    int64_t wanted = kTaskFloats / (a.Dv + 1);
    const int64_t shared = (p.rows * units + 4 * threads - 1) / (4 * threads);  // four tasks a thread
    if (wanted > shared) wanted = shared > kFewestTaskRows ? shared : kFewestTaskRows;
    if (wanted > kMostTaskRows) wanted = kMostTaskRows;
    wanted = (wanted + kTaskRowsUnit - 1) / kTaskRowsUnit * kTaskRowsUnit;
    if (wanted < p.rows) p.piece_rows = wanted;
  }
  p.pieces = (p.rows + p.piece_rows - 1) / p.piece_rows;
  p.first = a.window > 0 && a.length - a.S - a.window + 1 > 0 ? a.length - a.S - a.window + 1 : 0;
  p.end = a.length;
  if (mask_elements(a) <= kScannedMask) tier().attention.mask_range(a, p.first, p.end);
  const int64_t tokens = p.end - p.first, whole = units * p.pieces;
  p.splits = 1;
  if (whole < 2 * threads && whole % threads) p.splits = (2 * threads + whole - 1) / whole;
  if (p.splits > tokens / kSplitTokens) p.splits = tokens / kSplitTokens;
  if (p.splits < 1) p.splits = 1;
  p.split_tokens = tokens > 0 ? (tokens + p.splits - 1) / p.splits : 1;
  p.tasks = whole * p.splits;
  return p;
}

void run(const AttentionArgs& a, const Plan& p) {
  const AttentionKernels& kernels = tier().attention;
  const int64_t scratch = (p.decode ? kernels.decode_scratch : kernels.prefill_scratch)(a, p.piece_rows);
  const int64_t stride = kernels.state_floats(a, p.piece_rows), groups = p.tasks / p.splits;
  float* states = p.splits > 1 ? (float*)state_buffer.at_least(p.tasks * stride * (int64_t)sizeof(float)) : nullptr;
  STD_TORCH_CHECK(states || p.splits == 1, "attention: no memory for ", p.tasks * stride * 4,
                  " bytes of partial results");
  std::unique_ptr<std::atomic<int64_t>[]> left(p.splits > 1 ? new std::atomic<int64_t>[groups] : nullptr);
  if (left)
    for (int64_t i = 0; i < groups; i++) left[i] = p.splits;
  std::atomic<int64_t> next{0};
  const int64_t bytes =
      (p.end - p.first) * (a.D + a.Dv) * size_of(a.cache_dtype) * a.B * a.Hk * (p.decode ? 1 : a.S) / p.tasks;
  parallel_ranges(p.tasks, 1 + kThreadBytes / (bytes + 1), [&](int64_t, int64_t) {
    char* buffer = scratch_buffer.at_least(scratch);
    if (!buffer) return;  // the other threads take over
    for (int64_t i; (i = next++) < p.tasks;) {
      AttentionTask task = p.task(a, i);
      if (states) task.state = states + i * stride;
      (p.decode ? kernels.decode : kernels.prefill)(a, task, buffer);
      if (!states || --left[i / p.splits]) continue;
      task.state = states + i / p.splits * p.splits * stride;  // the last one to finish combines the splits
      kernels.merge(a, task, p.splits, stride);
    }
  });
  STD_TORCH_CHECK(next >= p.tasks, "attention: no memory for ", scratch, " bytes of scratch");
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, int64_t length, double scale, bool causal,
                 int64_t window, double softcap, const OptionalTensor& mask, const OptionalTensor& slopes,
                 const OptionalTensor& sinks, const OptionalTensor& rows, int64_t beams) {
  AttentionArgs a{};
  Operands o{query, key, value, mask, slopes, sinks, rows};
  set_operands(a, o, length, causal, window, softcap, beams);
  a.scale = (float)scale;
  set_mask(a, o.mask);
  set_head_vectors(a, o.slopes, o.sinks);
  set_rows(a, o.rows, key.size(0));
  Tensor out = empty(query, {a.B, a.S, a.H, a.Dv});
  a.out = out.mutable_data_ptr();
  if (a.B * a.S * a.H * a.Dv > 0) run(a, make_plan(a, omp_in_parallel() ? 1 : omp_get_max_threads()));
  return out;
}

}  // namespace
}  // namespace llmrt

LLMRT_CPU_KERNELS(attention) { library.impl("attention", TORCH_BOX(&llmrt::attention)); }
