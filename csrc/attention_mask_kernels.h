// Which tokens a query sees: causality, the window and the mask.
#pragma once
#include "attention.h"

namespace llmrt {
namespace {

constexpr int64_t kBlockTokens = 128;  // upper bound of the blocks of both kernels

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One folded query row: the tokens that causality and the window leave it, its mask row and where its result goes.
struct QueryRow {
  int64_t first, end, position, batch, token, head;
  const char* mask;
  float slope;
};

inline const char* mask_row(const AttentionArgs& a, int64_t b, int64_t h, int64_t s) {
  const int64_t element = a.mask_kind == MaskKind::boolean ? 1 : size_of(a.mask_dtype);
  return (const char*)a.mask + (b * a.mask_b + h * a.mask_h + s * a.mask_s) * element;
}

inline QueryRow query_row(const AttentionArgs& a, const AttentionTask& t, int64_t row) {
  QueryRow q;
  q.batch = t.sample * a.beams + row / (a.S * a.G), q.token = row / a.G % a.S, q.head = t.kv_head * a.G + row % a.G;
  q.position = a.length - a.S + q.token;
  q.first = a.window > 0 ? larger(0, q.position - a.window + 1) : 0;
  q.end = a.causal ? q.position + 1 : a.length;
  q.mask = mask_row(a, q.batch, q.head, q.token);
  q.slope = a.slopes ? a.slopes[q.head] : 0.f;
  return q;
}
inline const char* query_of(const AttentionArgs& a, const QueryRow& q) {
  return (const char*)a.query + (q.batch * a.query_b + q.token * a.query_s + q.head * a.query_h) * size_of(a.dtype);
}

// Whether `count` elements of a mask are all the one that hides a token.
template <class Element>
inline bool hides(const Element* mask, int64_t count, Element hidden) {
  Element different = 0;
  for (int64_t j = 0; j < count; j++) different |= mask[j] ^ hidden;
  return !different;
}

// Returns f(row, hidden) with a row of the mask as unsigned integers and the one that hides a token: false or -inf.
template <class Function>
inline auto with_mask(const AttentionArgs& a, const char* row, Function f) {
  if (a.mask_kind == MaskKind::boolean) return f((const uint8_t*)row, (uint8_t)0);
  if (a.mask_dtype == DType::f32) return f((const uint32_t*)row, 0xff800000u);
  return f((const uint16_t*)row, (uint16_t)(a.mask_dtype == DType::bf16 ? 0xff80 : 0xfc00));
}

// The first token from `first` on that a row of the mask shows, at most kBlockTokens - 1 too low, or `end`.
template <class Element>
inline int64_t shown_from(const Element* mask, Element hidden, int64_t first, int64_t end) {
  while (first < end) {
    const int64_t count = smaller(kBlockTokens, end - first);
    if (!hides(mask + first, count, hidden)) break;
    first += count;
  }
  return first;
}
// Likewise the end of what it shows before `end`.
template <class Element>
inline int64_t shown_before(const Element* mask, Element hidden, int64_t first, int64_t end) {
  while (first < end) {
    const int64_t count = smaller(kBlockTokens, end - first);
    if (!hides(mask + end - count, count, hidden)) break;
    end -= count;
  }
  return end;
}

// Narrows [first, end) to where any row of the mask shows a token.
inline void mask_range(const AttentionArgs& a, int64_t& first, int64_t& end) {
  int64_t low = end, high = first;
  for (int64_t b = 0; b < (a.mask_b ? a.B : 1); b++)
    for (int64_t h = 0; h < (a.mask_h ? a.H : 1); h++)
      for (int64_t s = 0; s < (a.mask_s ? a.S : 1); s++)
        with_mask(a, mask_row(a, b, h, s), [&](auto mask, auto hidden) {
          low = shown_from(mask, hidden, first, low), high = shown_before(mask, hidden, high, end);
        });
  first = low, end = larger(low, high);
}

// Narrows the tokens of a row to those between the first and the last that the mask shows; returns whether it is a bool
// mask that hides none of these.
inline bool narrow_row(const AttentionArgs& a, QueryRow& q) {
  return with_mask(a, q.mask, [&](auto mask, auto hidden) {
    q.first = shown_from(mask, hidden, q.first, q.end), q.end = shown_before(mask, hidden, q.first, q.end);
    while (q.first < q.end && mask[q.first] == hidden) q.first++;
    while (q.first < q.end && mask[q.end - 1] == hidden) q.end--;
    if (a.mask_kind != MaskKind::boolean) return false;
    uint8_t least = 255;
    for (int64_t t = q.first; t < q.end; t++) least = mask[t] < least ? mask[t] : least;
    return least > 0;
  });
}

// Sets `first` and `end` to the tokens that some row of a task sees, as far as causality, the window and the ends of
// the mask say, and narrows the rows to their parts of it. Returns whether that says all: no row needs the mask, nor
// does a token in between that nobody sees (the cache may hold NaN there).
inline bool narrow_rows(const AttentionArgs& a, const AttentionTask& t, QueryRow* rows, int64_t& first, int64_t& end) {
  const int64_t n = t.row1 - t.row0;
  int64_t last_first = 0, first_end = a.length, empty = 0;
  bool whole = true;
  first = a.length, end = 0;
  for (int64_t i = 0; i < n; i++) {
    QueryRow& q = rows[i];
    q.first = larger(q.first, t.token0), q.end = smaller(q.end, t.token1);
    if (a.mask_kind != MaskKind::none) {
      if (i && q.mask == rows[i - 1].mask && q.position == rows[i - 1].position)
        q.first = rows[i - 1].first, q.end = rows[i - 1].end;
      else
        whole &= narrow_row(a, q);
    }
    if (q.first >= q.end) {
      q.first = a.length, q.end = 0, empty++;
      continue;
    }
    first = smaller(first, q.first), end = larger(end, q.end);
    last_first = larger(last_first, q.first), first_end = smaller(first_end, q.end);
  }
  if (a.beams > 1) return whole && !empty && first == last_first && end == first_end;
  return whole && last_first < first_end;
}

// Marks those of the tokens [t0, t0 + count) that some query token in [s0, s1) of logical row b sees, in some head of
// the unit; adds to `seen`.
inline void mark_seen(const AttentionArgs& a, int64_t b, int64_t s0, int64_t s1, int64_t kv_head, int64_t t0,
                      int64_t count, uint8_t* seen) {
  const int64_t heads = a.mask_h ? a.G : 1, rows = a.mask_s ? s1 - s0 : 1, position = a.length - a.S - t0;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t oldest = position + s0 + i, newest = a.mask_s ? oldest : position + s1 - 1;
    const int64_t begin = a.window > 0 ? larger(0, oldest - a.window + 1) : 0;
    const int64_t end = a.causal ? smaller(count, newest + 1) : count;
    for (int64_t g = 0; g < heads; g++)
      with_mask(a, mask_row(a, b, kv_head * a.G + g, s0 + i), [&](auto mask, auto hidden) {
        for (int64_t j = begin; j < end; j++) seen[j] |= mask[t0 + j] != hidden;
      });
  }
}
// Whether the mask hides none of the tokens from any query of logical row b; only said of padding masks.
inline bool unmasked(const AttentionArgs& a, int64_t b, int64_t t0, int64_t count) {
  if (a.mask_kind == MaskKind::none) return true;
  if (a.mask_kind != MaskKind::boolean || a.mask_s || a.mask_h) return false;
  const uint8_t* m = (const uint8_t*)a.mask + b * a.mask_b + t0;
  uint8_t all = 1;
  for (int64_t j = 0; j < count; j++) all &= m[j];
  return all;
}
inline AttentionArgs without_mask(AttentionArgs a) {
  a.mask_kind = MaskKind::none;
  return a;
}
inline bool any_seen(const uint8_t* seen, int64_t count) { return !hides(seen, count, (uint8_t)0); }

}  // namespace
}  // namespace llmrt
