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
constexpr int kWord = D ? 4 / int(sizeof(KV)) : 1;    // dimensions that a lane reads at once, of values
constexpr int kChunk = D ? 16 / int(sizeof(KV)) : 1;  // of keys
constexpr int kSlice = kLanes * kWord;
constexpr int kTurns = (kValuesWidest + kSlice * kSubs - 1) / (kSlice * kSubs);  // slices of a sub-group
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

template <int ROWS>
struct Shared {
  float query[ROWS][kWidest];
  union {
    float weight[2][ROWS][kTile];
    float sum[ROWS * 2 * kTile];  // of the parts of the keys but the first
  };
  float highest[ROWS][kSubs], total[ROWS][kSubs];
};
template <int ROWS>
syclex::work_group_static<Shared<ROWS>> shared_of;

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

// N dimensions from i on, a multiple of those of a dword; one without D.
template <int N>
inline void read(const Call& c, const char* row, int i, float* v) {
  if constexpr (D != 0) {
    const auto* words = reinterpret_cast<const uint32_t*>(row + i * sizeof(KV));
#pragma unroll
    for (int w = 0; w < N / kWord; w++) unpack<KV>(words[w], v + w * kWord);
  } else {
    v[0] = c.codes() ? *reinterpret_cast<const int8_t*>(row + i) : load_kind(row, c.kind, i);
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
inline int64_t row_of(const Call& c, int64_t b, int64_t t) {
  if (!c.rows) return b;
  const int64_t row = c.rows[b * c.rows_row + t];
  return row < c.cache_rows ? row : -1;
}

template <int ROWS>
struct Group {
  const Call& c;
  Shared<ROWS>& shared;
  sycl::sub_group sub;
  int lane, id, width, value_width, count;
  int64_t b, k, first;  // row and head of the cache, the first query row

  // Adds to x what is added to the scores of key t; of hidden ones it becomes none.
  inline bool visible(int64_t t, float (&x)[ROWS]) const {
    bool any = false;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int64_t row = first + r, s = row / c.per(), h = k * c.per() + row % c.per();
      const int64_t distance = t - (c.length - c.tokens + s);
      bool sees = r < count && !(c.causal && distance > 0) && !(c.window > 0 && distance <= -c.window);
      float bias = c.slopes && r < count ? c.slopes[h] * distance : 0.f;
      if (c.mask && sees) {
        const int64_t at = b * c.mask_row + h * c.mask_head + s * c.mask_token + t * c.mask_column;
        if (c.mask_kind == kBytes) {
          sees = c.mask[at] != 0;
        } else {
          const float added = load_kind(c.mask, c.mask_kind, at);
          bias += added, sees = added != kNone;
        }
      }
      x[r] = sees ? bias : kNone;
      any |= sees;
    }
    return any;
  }

  // The scores of key t, one of each lane; `factor` becomes the scale of its value.
  inline void score(int64_t t, bool inside, float (&x)[ROWS], float& factor) const {
    const bool sees = visible(t, x) && inside;
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = sees ? x[r] : kNone;
    if (!sycl::any_of_group(sub, sees)) return;
    const int64_t row = row_of(c, b, t), known = row < 0 ? 0 : row;
    const char* key = c.key + (known * c.key_row + k * c.key_head + t * c.key_token) * c.bytes();
    float s[ROWS] = {};
#pragma unroll 2
    for (int i = 0; i < width; i += kChunk) {
      float v[kChunk];
      read<kChunk>(c, key, i, v);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int e = 0; e < kChunk; e++) s[r] += shared.query[r][i + e] * v[e];
      }
    }
    const float key_factor = scale_of(c, key, width);
    if (c.codes() && sees)
      factor = scale_of(c, c.value + (known * c.value_row + k * c.value_head + t * c.value_token), value_width);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float v = s[r] * key_factor;
      if (c.softcap > 0.f) v = c.softcap * sycl::tanh(v / c.softcap);
      v = row < 0 ? std::numeric_limits<float>::quiet_NaN() : v + x[r];
      x[r] = x[r] == kNone ? kNone : v;
    }
  }

  // Adds the values of a tile's keys from t0 on, those of `part` of `parts`, in the dimensions of a slice.
  template <int TURNS>
  inline void add_values(int buffer, int64_t t0, int64_t end, int part, int parts, int slice,
                         float (&sum)[ROWS][TURNS * kWord]) const {
    for (int batch = part; batch < kSubs && t0 + batch * kLanes < end; batch += parts) {
      float weight[ROWS];
      bool live = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        weight[r] = shared.weight[buffer][r][batch * kLanes + lane];
        live |= weight[r] != 0.f;
      }
      const int64_t t = sycl::min(t0 + batch * kLanes + lane, end - 1), row = row_of(c, b, t);
      const int64_t at = ((row < 0 ? 0 : row) * c.value_row + k * c.value_head + t * c.value_token) * c.bytes();
      const auto add = [&](int j) {
        const char* value = c.value + sycl::group_broadcast(sub, at, j);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
          const int i = ((slice + turn * kSubs) * kLanes + lane) * kWord;
          float v[kWord] = {};
          if (i < value_width) read<kWord>(c, value, i, v);
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            const float w = sycl::group_broadcast(sub, weight[r], j);
#pragma unroll
            for (int e = 0; e < kWord; e++) sum[r][turn * kWord + e] += w * v[e];
          }
        }
      };
      if (sycl::all_of_group(sub, live)) {
#pragma unroll
        for (int j = 0; j < kLanes; j++) add(j);
      } else {  // what no row sees may be anything
#pragma unroll 1
        for (int j = 0; j < kLanes; j++)
          if (sycl::group_broadcast(sub, live, j)) add(j);
      }
    }
  }
};

// Writes dimensions of one row: the sum over the keys, or with several splits this one's part.
inline void finish(const Call& c, float* partial, T* out, int64_t h, int i, const float* sum, float highest,
                   float total) {
  if (partial) {
#pragma unroll
    for (int e = 0; e < kWord; e++) partial[i + e] = sum[e];
    return;
  }
  float factor = 1.f;
  if (c.sinks) {
    const float sink = load_kind(c.sinks, c.sinks_kind, h), most = sycl::fmax(highest, sink);
    factor = highest == kNone ? 0.f : exponential(highest - most);
    total = total * factor + (sink == kNone ? 0.f : exponential(sink - most));
  }
  factor = total == 0.f ? 0.f : factor / total;
#pragma unroll
  for (int e = 0; e < kWord; e++) store(out + i + e, sum[e] * factor);
}

template <int ROWS>
inline void run(const Call& c) {
  const auto it = item();
  const auto group = it.get_group();
  const auto sub = it.get_sub_group();
  auto& shared = static_cast<Shared<ROWS>&>(shared_of<ROWS>);
  const int lane = sub.get_local_linear_id(), id = sub.get_group_linear_id();
  const int width = D ? D : c.width, value_width = DV ? DV : c.value_width;
  const int64_t pair = it.get_group(2), per = c.per(), all = c.tokens * per, first = it.get_group(1) * ROWS;
  const int count = sycl::min<int64_t>(ROWS, all - first);
  const Group<ROWS> g{c, shared, sub, lane, id, width, value_width, count, pair / c.kv_heads, pair % c.kv_heads, first};
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int64_t s = (first + r) / per, h = g.k * per + (first + r) % per;
    const T* from = c.query + g.b * c.query_row + s * c.query_token + h * c.query_head;
    for (int i = id * kLanes + lane; i < width; i += kTile)
      shared.query[r][i] = r < count ? load(from + i) * c.scale : 0.f;
  }
  sycl::group_barrier(group);

  // Of what any of the rows may see, the tiles of this split.
  const int64_t position = c.length - c.tokens + first / per, last = c.length - c.tokens + (first + count - 1) / per;
  const int64_t low = c.window > 0 ? sycl::max<int64_t>(0, position - c.window + 1) : 0;
  const int64_t high = c.causal ? sycl::min(c.length, last + 1) : c.length;
  const int64_t splits = it.get_group_range(0), split = it.get_group(0);
  const int64_t tiles = high > low ? (high - low + kTile - 1) / kTile : 0, share = (tiles + splits - 1) / splits;
  const int64_t begin = low + split * share * kTile, end = sycl::min(high, begin + share * kTile);

  const int slices = (value_width + kSlice - 1) / kSlice;
  const int parts = sycl::max(1, sycl::min(kSubs / slices, 2 * kTile / value_width + 1));
  const int slice = slices < kSubs ? id % slices : id, part = slices < kSubs ? id / slices : 0;
  float highest[ROWS], total[ROWS] = {}, sum[ROWS][kTurns * kWord] = {};
#pragma unroll
  for (int r = 0; r < ROWS; r++) highest[r] = kNone;
  int buffer = 0;
  for (int64_t t0 = begin; t0 < end; t0 += kTile, buffer ^= 1) {
    const int64_t t = t0 + id * kLanes + lane;
    float x[ROWS], factor = 1.f;
    g.score(sycl::min(t, end - 1), t < end, x, factor);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float most = sycl::reduce_over_group(sub, x[r], sycl::maximum<float>());
      if (lane == 0) shared.highest[r][id] = most;
    }
    sycl::group_barrier(group);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float most = highest[r];
#pragma unroll
      for (int i = 0; i < kSubs; i++) most = sycl::fmax(most, shared.highest[r][i]);
      const float base = most == kNone ? 0.f : most;
      const float change = exponential(highest[r] - base), weight = exponential(x[r] - base);
      highest[r] = most;
      total[r] = total[r] * change + weight;
#pragma unroll
      for (int i = 0; i < kTurns * kWord; i++) sum[r][i] *= change;
      shared.weight[buffer][r][id * kLanes + lane] = weight * factor;
    }
    sycl::group_barrier(group);
    if (part < parts) g.template add_values<kTurns>(buffer, t0, end, part, parts, slice, sum);
  }

  sycl::group_barrier(group);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float one = sycl::reduce_over_group(sub, total[r], sycl::plus<float>());
    if (lane == 0) shared.total[r][id] = one;
    if (part > 0 && part < parts) {  // one turn only
      const int i = (slice * kLanes + lane) * kWord;
#pragma unroll
      for (int e = 0; e < kWord; e++)
        if (i < value_width) shared.sum[((part - 1) * ROWS + r) * value_width + i + e] = sum[r][e];
    }
  }
  sycl::group_barrier(group);
  if (part > 0) return;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r >= count) continue;
    const int64_t row = first + r, s = row / per, h = g.k * per + row % per;
    float* partial =
        splits == 1 ? nullptr : c.partial + ((split * it.get_group_range(2) + pair) * all + row) * (value_width + 2);
    T* out = c.out + ((g.b * c.tokens + s) * c.heads + h) * value_width;
    float all_weights = 0.f;
#pragma unroll
    for (int i = 0; i < kSubs; i++) all_weights += shared.total[r][i];
    if (partial && id == 0 && lane == 0) partial[value_width] = highest[r], partial[value_width + 1] = all_weights;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      const int i = ((slice + turn * kSubs) * kLanes + lane) * kWord;
      if (i >= value_width) continue;
      for (int p = 1; p < parts; p++)
#pragma unroll
        for (int e = 0; e < kWord; e++)
          sum[r][turn * kWord + e] += shared.sum[((p - 1) * ROWS + r) * value_width + i + e];
      finish(c, partial, out, h, i, &sum[r][turn * kWord], highest[r], all_weights);
    }
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
void attention_1(PARAMETERS) { attention::run<1>(CALL); }

KERNEL(16)
void attention_4(PARAMETERS) { attention::run<4>(CALL); }

KERNEL(16)
void attention_8(PARAMETERS) { attention::run<8>(CALL); }

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
