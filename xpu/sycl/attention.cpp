// Attention over a key/value cache. A work-group handles up to ROWS query rows (a token of a query head each) of one
// key/value head, which are read once for all of them. T: dtype of queries and result. KV, D, DV: dtype of the cache
// and head dimensions; where D is 0 they are arguments, and any alignment will do.
//
// The work-group goes through the keys by tiles of 128. First a lane has one key and computes its scores for all rows;
// weights go through local memory; then a sub-group has a slice of the dimensions of the values and a part of the keys.
#include "element.hpp"

namespace attention {

constexpr int kLanes = 16, kSubs = 8, kTile = kLanes * kSubs;
constexpr int kWidest = D ? D : 256, kValuesWidest = DV ? DV : 256;
constexpr int kWord = D ? 4 / int(sizeof(KV)) : 1;         // dimensions that a lane reads at once, of values
constexpr int kChunk = D ? (sizeof(KV) == 2 ? 8 : 4) : 1;  // of keys
constexpr int kSlice = kLanes * kWord;
constexpr int kTurns = (kValuesWidest + kSlice * kSubs - 1) / (kSlice * kSubs);  // slices of a sub-group
constexpr int kStep = ROWS < 8 ? 4 : 2;                                          // keys whose values are read at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Call {
  const T* query;
  const char *key, *value;
  T* out;
  float* partial;  // of each split, pair and row: the weighted sum, the highest score, the sum of weights
  const char* mask;
  const float* slopes;
  const void* sinks;
  const int32_t* rows;
  int64_t kind, width, value_width, tokens, heads, kv_heads, length, cache_rows, causal, window, mask_kind, sinks_kind;
  int64_t query_row, query_token, query_head, key_row, key_head, key_token, value_row, value_head, value_token;
  int64_t mask_row, mask_head, mask_token, mask_column, rows_row;
  float scale, softcap;

  inline int bytes() const { return D ? sizeof(KV) : size_of(kind); }
  inline bool codes() const { return D ? sizeof(KV) == 1 : kind == kBytes; }
  inline int64_t per() const { return heads / kv_heads; }
};

struct Shared {
  float query[ROWS][kWidest];
  float score[ROWS][kTile];  // each item its key's: what is added to it, then the score
  int token[ROWS], head[ROWS];
  union {
    struct {
      float weight[2][kTile][ROWS];
      int64_t at[2][kTile];  // where the values of a key are; below 0 where no row sees any of a sub-group's keys
    };
    float sum[ROWS * 2 * kTile];  // of the weighted values, by parts of the keys
  };
  float highest[ROWS][kSubs], part[ROWS][kTile];   // of a tile by sub-groups; sums of weights by items
  float most[2][ROWS], change[ROWS], total[ROWS];  // highest scores before and after a tile; what that makes of sums
};
syclex::work_group_static<Shared> shared_of;

inline float exponential(float x) { return sycl::exp2(x * 1.4426950408889634f); }

// Dimensions of a dword of the cache.
template <typename E>
inline void unpack(uint32_t word, float* v) {
  if constexpr (sizeof(E) == 4) {
    v[0] = sycl::bit_cast<float>(word);
  } else if constexpr (sizeof(E) == 1) {
#pragma unroll
    for (int e = 0; e < 4; e++) v[e] = static_cast<int8_t>(word >> 8 * e);
  } else {
#pragma unroll
    for (int e = 0; e < 2; e++) v[e] = static_cast<float>(sycl::bit_cast<E>(static_cast<uint16_t>(word >> 16 * e)));
  }
}

// N dimensions from i on, a multiple of N; one without D.
template <int N>
inline void read(const Call& c, const char* row, int i, float* v) {
  if constexpr (D == 0) {
    v[0] = c.codes() ? *reinterpret_cast<const int8_t*>(row + i) : load_kind(row, c.kind, i);
  } else if constexpr (N * sizeof(KV) < 4) {
    const uint32_t word = *reinterpret_cast<const uint16_t*>(row + i);
    v[0] = static_cast<int8_t>(word), v[1] = static_cast<int8_t>(word >> 8);
  } else {
    constexpr int kPer = 4 / sizeof(KV);
    const auto* words = reinterpret_cast<const uint32_t*>(row + i * sizeof(KV));
#pragma unroll
    for (int w = 0; w < N / kPer; w++) unpack<KV>(words[w], v + w * kPer);
  }
}

// What the codes of a row are to be multiplied by: the float behind them.
inline float scale_of(const Call& c, const char* row, int width) {
  if (!c.codes()) return 1.f;
  uint32_t bits = 0;
  if constexpr (D != 0) {
    bits = *reinterpret_cast<const uint32_t*>(row + width);
  } else {
    for (int i = 0; i < 4; i++) bits |= static_cast<uint32_t>(static_cast<uint8_t>(row[width + i])) << 8 * i;
  }
  return sycl::bit_cast<float>(bits);
}

// The row of the cache that holds token t of row b; -1 for an entry outside the cache.
inline int64_t row_of(const Call& c, int64_t b, int t) {
  if (!c.rows) return b;
  const int64_t row = c.rows[b * c.rows_row + t];
  return row < c.cache_rows ? row : -1;
}

struct Group {
  const Call& c;
  Shared& shared;
  sycl::sub_group sub;
  int lane, id, width, value_width, count;
  int64_t b, k;  // row and head of the cache

  // Puts what is added to the scores of key t where the scores go, none where the key is hidden; whether any row sees
  // it.
  inline bool visible(int t, bool inside) const {
    bool any = false;
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
      const int s = shared.token[r], h = shared.head[r], distance = t - (int(c.length) - int(c.tokens) + s);
      bool sees = inside && r < count && !(c.causal && distance > 0) && !(c.window > 0 && -distance >= c.window);
      float bias = c.slopes && sees ? c.slopes[h] * distance : 0.f;
      if (c.mask && sees) {
        const int64_t at = b * c.mask_row + h * c.mask_head + s * c.mask_token + t * c.mask_column;
        if (c.mask_kind == kBytes) {
          sees = c.mask[at] != 0;
        } else {
          const float added = load_kind(c.mask, c.mask_kind, at);
          bias += added, sees = added != kNone;
        }
      }
      shared.score[r][id * kLanes + lane] = sees ? bias : kNone;
      any |= sees;
    }
    return any;
  }

  // Scores of key t, one of each lane; returns what its value is to be multiplied by.
  inline float score(int t, bool inside, int buffer) const {
    const int mine = id * kLanes + lane;
    const bool sees = visible(t, inside);
    if (!sycl::any_of_group(sub, sees)) {
      shared.at[buffer][mine] = -1;
      return 1.f;
    }
    const int64_t row = row_of(c, b, t), known = row < 0 ? 0 : row;
    const char* key = c.key + (known * c.key_row + k * c.key_head + t * c.key_token) * c.bytes();
    float s[ROWS] = {};
#pragma unroll(D && sizeof(KV) > 1 && ROWS < 8 ? 2 : 1)
    for (int i = 0; i < width; i += kChunk) {
      float v[kChunk];
      read<kChunk>(c, key, i, v);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int e = 0; e < kChunk; e++) s[r] += shared.query[r][i + e] * v[e];
      }
    }
    const float factor = row < 0 ? std::numeric_limits<float>::quiet_NaN() : scale_of(c, key, width);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float v = s[r] * factor;
      if (c.softcap > 0.f) v = c.softcap - 2.f * c.softcap / (1.f + exponential(2.f * v / c.softcap));  // tanh
      const float bias = shared.score[r][mine];
      shared.score[r][mine] = bias == kNone ? kNone : v + bias;
    }
    // The values of a key that no row sees may be anything: its weight of zero goes to those of another one.
    const int64_t at = (known * c.value_row + k * c.value_head + t * c.value_token) * c.bytes();
    const int other = sycl::reduce_over_group(sub, sees ? lane : kLanes, sycl::minimum<int>());
    const int64_t instead = sycl::select_from_group(sub, at, other);
    shared.at[buffer][mine] = sees ? at : instead;
    return sees ? scale_of(c, c.value + at, value_width) : 1.f;
  }

  // Adds the weighted values of a tile's keys, those of `part` of `parts`, in the dimensions of a slice.
  inline void add_values(int buffer, int part, int parts, int slice, float (&sum)[ROWS][kTurns * kWord]) const {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < kTurns * kWord; i++) sum[r][i] *= shared.change[r];
    }
    // Without a branch around the sums, of which each would cost copies: lanes beyond the dimensions add what nobody
    // reads.
#pragma unroll 1
    for (int batch = part < parts ? part : kSubs; batch < kSubs; batch += parts) {
      const int start = batch * kLanes, stop = shared.at[buffer][start] < 0 ? start : start + kLanes;
#pragma unroll 1
      for (int j0 = start; j0 < stop; j0 += kStep) {
#pragma unroll
        for (int j = j0; j < j0 + kStep; j++) {
          const char* value = c.value + shared.at[buffer][j];
#pragma unroll
          for (int turn = 0; turn < kTurns; turn++) {
            const int i = ((slice + turn * kSubs) * kLanes + lane) * kWord;
            float v[kWord];
            read<kWord>(c, value, sycl::min(i, value_width - kWord), v);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
              const float weight = shared.weight[buffer][j][r];
#pragma unroll
              for (int e = 0; e < kWord; e++) sum[r][turn * kWord + e] += weight * v[e];
            }
          }
        }
      }
    }
  }

  // Writes a row of the result, or with several splits of the keys this one's part of it.
  inline void finish(int r, int parts, float* partial, T* out) const {
    const float highest = shared.most[0][r];
    float total = shared.total[r], factor = 1.f;
    if (partial) {
      if (lane == 0) partial[value_width] = highest, partial[value_width + 1] = total;
    } else {
      if (c.sinks) {
        const float sink = load_kind(c.sinks, c.sinks_kind, shared.head[r]), most = sycl::fmax(highest, sink);
        factor = highest == kNone ? 0.f : exponential(highest - most);
        total = total * factor + (sink == kNone ? 0.f : exponential(sink - most));
      }
      factor = total == 0.f ? 0.f : factor / total;
    }
    for (int i = lane; i < value_width; i += kLanes) {
      float v = 0.f;
      for (int p = 0; p < parts; p++) v += shared.sum[(p * ROWS + r) * value_width + i];
      if (partial) {
        partial[i] = v;
      } else {
        store(out + i, v * factor);
      }
    }
  }
};

inline void run(const Call& c) {
  const auto it = item();
  const auto group = it.get_group();
  const auto sub = it.get_sub_group();
  auto& shared = static_cast<Shared&>(shared_of);
  const int lane = sub.get_local_linear_id();
  const int id = sycl::group_broadcast(sub, int(sub.get_group_linear_id()), 0);  // the compiler sees that lanes agree
  const int width = D ? D : c.width, value_width = DV ? DV : c.value_width;
  const int pair = it.get_group(2), kv_heads = c.kv_heads, per = int(c.heads) / kv_heads;
  const int all = c.tokens * per, first = it.get_group(1) * ROWS, count = sycl::min(ROWS, all - first);
  const Group g{c, shared, sub, lane, id, width, value_width, count, pair / kv_heads, pair % kv_heads};
#pragma unroll 1
  for (int r = id; r < ROWS; r += kSubs) {
    const int s = (first + r) / per, h = g.k * per + (first + r) % per;
    const T* from = c.query + g.b * c.query_row + s * c.query_token + h * c.query_head;
    for (int i = lane; i < width; i += kLanes) shared.query[r][i] = r < count ? load(from + i) * c.scale : 0.f;
    for (int i = lane; i < kTile; i += kLanes) shared.part[r][i] = 0.f;
    if (lane == 0) shared.token[r] = s, shared.head[r] = h, shared.most[0][r] = kNone;
  }
  sycl::group_barrier(group);

  // Of what any of the rows may see, the tiles of this split.
  const int length = c.length, past = length - int(c.tokens), window = sycl::min<int64_t>(c.window, c.length);
  const int low = window > 0 ? sycl::max(0, past + first / per - window + 1) : 0;
  const int high = c.causal ? sycl::min(length, past + (first + count - 1) / per + 1) : length;
  const int splits = it.get_group_range(0), split = it.get_group(0);
  const int tiles = high > low ? (high - low + kTile - 1) / kTile : 0, share = (tiles + splits - 1) / splits;
  const int begin = low + split * share * kTile, end = sycl::min(high, begin + share * kTile);

  const int slices = (value_width + kSlice - 1) / kSlice;
  const int parts = sycl::max(1, sycl::min(kSubs / slices, 2 * kTile / value_width));
  const int slice = slices < kSubs ? id % slices : id, part = slices < kSubs ? id / slices : 0;
  float sum[ROWS][kTurns * kWord] = {};
  const int mine = id * kLanes + lane;
  int buffer = 0;
  for (int t0 = begin; t0 < end; t0 += kTile, buffer ^= 1) {
    const float factor = g.score(sycl::min(t0 + mine, end - 1), t0 + mine < end, buffer);
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
      const float most = sycl::reduce_over_group(sub, shared.score[r][mine], sycl::maximum<float>());
      if (lane == 0) shared.highest[r][id] = most;
    }
    sycl::group_barrier(group);
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
      const float before = shared.most[buffer][r];
      float most = before;
#pragma unroll
      for (int i = 0; i < kSubs; i++) most = sycl::fmax(most, shared.highest[r][i]);
      const float base = most == kNone ? 0.f : most;
      const float change = exponential(before - base), weight = exponential(shared.score[r][mine] - base);
      shared.most[buffer ^ 1][r] = most, shared.change[r] = change;  // every item writes the same
      shared.part[r][mine] = shared.part[r][mine] * change + weight;
      shared.weight[buffer][mine][r] = weight * factor;
    }
    sycl::group_barrier(group);
    g.add_values(buffer, part, parts, slice, sum);
  }

  sycl::group_barrier(group);
#pragma unroll 1
  for (int r = id; r < ROWS; r += kSubs) {
    float total = 0.f;
    for (int i = lane; i < kTile; i += kLanes) total += shared.part[r][i];
    total = sycl::reduce_over_group(sub, total, sycl::plus<float>());
    if (lane == 0) shared.total[r] = total, shared.most[0][r] = shared.most[buffer][r];
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int i = 0; i < kTurns * kWord; i++) {
      const int at = ((slice + i / kWord * kSubs) * kLanes + lane) * kWord + i % kWord;
      if (part < parts && at < value_width) shared.sum[(part * ROWS + r) * value_width + at] = sum[r][i];
    }
  }
  sycl::group_barrier(group);
#pragma unroll 1
  for (int r = id; r < count; r += kSubs) {
    float* partial = c.partial + ((static_cast<int64_t>(split) * it.get_group_range(2) + pair) * all + first + r) *
                                     (value_width + 2);
    T* out = c.out + ((g.b * c.tokens + shared.token[r]) * c.heads + shared.head[r]) * value_width;
    g.finish(r, parts, splits == 1 ? nullptr : partial, out);
  }
}

}  // namespace attention

#define PARAMETERS                                                                                                   \
  const T *query, const void *key, const void *value, T *out, float *partial, const void *mask, const float *slopes, \
      const void *sinks, const int32_t *rows, int64_t kind, int64_t width, int64_t value_width, int64_t tokens,      \
      int64_t heads, int64_t kv_heads, int64_t length, int64_t cache_rows, int64_t causal, int64_t window,           \
      int64_t mask_kind, int64_t sinks_kind, int64_t query_row, int64_t query_token, int64_t query_head,             \
      int64_t key_row, int64_t key_head, int64_t key_token, int64_t value_row, int64_t value_head,                   \
      int64_t value_token, int64_t mask_row, int64_t mask_head, int64_t mask_token, int64_t mask_column,             \
      int64_t rows_row, float scale, float softcap
#define CALL                                                                                                    \
  attention::Call {                                                                                             \
    query, static_cast<const char*>(key), static_cast<const char*>(value), out, partial,                        \
        static_cast<const char*>(mask), slopes, sinks, rows, kind, width, value_width, tokens, heads, kv_heads, \
        length, cache_rows, causal, window, mask_kind, sinks_kind, query_row, query_token, query_head, key_row, \
        key_head, key_token, value_row, value_head, value_token, mask_row, mask_head, mask_token, mask_column,  \
        rows_row, scale, softcap                                                                                \
  }

KERNEL(16)
void attention_rows(PARAMETERS) { attention::run(CALL); }

// Joins the splits of the keys; one sub-group per row of the result.
KERNEL(16)
void attention_join(const float* partial, T* out, const void* sinks, int64_t sinks_kind, int64_t splits, int64_t pairs,
                    int64_t kv_heads, int64_t per, int64_t tokens, int64_t width) {
  const auto it = item();
  const auto sub = it.get_sub_group();
  const int64_t rows = tokens * per, all = pairs * rows;
  const int64_t at = it.get_group(2) * sub.get_group_linear_range() + sub.get_group_linear_id();
  if (at >= all) return;
  const int64_t pair = at / rows, s = at % rows / per, h = pair % kv_heads * per + at % rows % per;
  const float sink = sinks ? load_kind(sinks, sinks_kind, h) : attention::kNone;
  float most = sink;
  for (int64_t i = 0; i < splits; i++) most = sycl::fmax(most, partial[(i * all + at) * (width + 2) + width]);
  const float base = most == attention::kNone ? 0.f : most;
  float total = attention::exponential(sink - base);
  for (int64_t i = 0; i < splits; i++) {
    const float* one = partial + (i * all + at) * (width + 2) + width;
    total += one[1] * attention::exponential(one[0] - base);
  }
  out += ((pair / kv_heads * tokens + s) * kv_heads * per + h) * width;
  for (int d = sub.get_local_linear_id(); d < width; d += attention::kLanes) {
    float sum = 0.f;
    for (int64_t i = 0; i < splits; i++) {
      const float* one = partial + (i * all + at) * (width + 2);
      sum += one[d] * attention::exponential(one[width] - base);
    }
    store(out + d, total == 0.f ? 0.f : sum / total);
  }
}
