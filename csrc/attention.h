// Attention over a cache: arguments of the kernels. Strides are in elements; the last dimension of every operand is
// contiguous.
//
// A unit of work is one sample (a.beams logical rows) and one key/value head. Its query rows are folded:
// row = (beam * S + s) * G + g for query head kv_head * G + g, so that all of them meet each key that is read.
#pragma once
#include <stdint.h>

#include "dtype.h"

namespace llmrt {

enum class MaskKind : int { none, boolean, floating };

struct AttentionArgs {
  const void* query;                      // [B, S, H, D]
  const void* key;                        // [R, Hk, C, D]
  const void* value;                      // [R, Hk, C, Dv]
  void* out;                              // [B, S, H, Dv] contiguous
  DType dtype, cache_dtype;               // of query and out; of key and value, whose int8 rows end with their scale
  int64_t B, S, H, Hk, G, D, Dv, length;  // G = H / Hk; tokens 0..length-1 of the cache are valid
  int64_t query_b, query_s, query_h, key_r, key_h, key_t, value_r, value_h,
      value_t;           // of key and value in their elements
  float scale, softcap;  // softcap 0: none
  bool causal;
  int64_t window;  // 0: none
  MaskKind mask_kind;
  DType mask_dtype;  // of a floating mask
  const void* mask;  // [B, H, S, length], strides 0 where it is broadcast
  int64_t mask_b, mask_h, mask_s;
  const float* slopes;  // [H] or null
  const void* sinks;    // [H] or null
  DType sinks_dtype;
  const int32_t* rows;  // [B, length] or null: the cache row of each token; row b itself
  int64_t rows_b;
  int64_t beams;
};

// Query rows [row0, row1) of one unit over the cached tokens [token0, token1).
struct AttentionTask {
  int64_t sample, kv_head, row0, row1, token0, token1;
  float* state;  // null: write to out; else leave the unnormalized result here, for `merge`
};

struct AttentionKernels {
  // Few rows per key (S * G): reads keys and values straight from the cache, memory-bound.
  int64_t (*most_decode_rows)(const AttentionArgs&);              // above, packing pays
  int64_t (*decode_scratch)(const AttentionArgs&, int64_t rows);  // bytes, 64-byte aligned
  void (*decode)(const AttentionArgs&, const AttentionTask&, char* scratch);
  // Many rows per key: packs blocks of keys and values, compute-bound.
  int64_t (*prefill_scratch)(const AttentionArgs&, int64_t rows);
  void (*prefill)(const AttentionArgs&, const AttentionTask&, char* scratch);
  // Combines the states of `splits` tasks over the same rows, `stride` floats apart, and writes to out.
  int64_t (*state_floats)(const AttentionArgs&, int64_t rows);
  void (*merge)(const AttentionArgs&, const AttentionTask& first, int64_t splits, int64_t stride);
  bool (*rows_in_range)(const int32_t* rows, int64_t count, int64_t limit);
  // Narrows [first, end) to the tokens that the mask shows to any query, give or take a block.
  void (*mask_range)(const AttentionArgs&, int64_t& first, int64_t& end);
  // One token's elements of one head, converted to what a cache stores.
  void (*store_row)(const void* from, DType type, int64_t n, void* to, DType stored);
};

}  // namespace llmrt
