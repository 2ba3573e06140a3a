// Attention of one new token over the blocks of its sequence, for one instruction set.

// Queries of one key head that are taken together: four tokens for each fill twelve of the sixteen registers of AVX2.
constexpr int kQueries = 3;
// Tokens between those that are read and those that are fetched. Rows of one head lie apart in a block, and blocks
// anywhere: no hardware prefetcher expects them.
constexpr int64_t kTokensAhead = 8;

inline void fetch_row(const float* row, int64_t numbers) {
  for (int64_t d = 0; d < numbers; d += 16) _mm_prefetch(reinterpret_cast<const char*>(row + d), _MM_HINT_T0);
}

// scores[g, j] = q[g] . keys[j] for kCount queries and four keys; rows of scores are `stride` apart.
template <int kCount>
inline void score_four(const float* q, const float* const* keys, int64_t width, float* scores, int64_t stride) {
  Vec products[kCount][4];
  for (auto& of_query : products)
    for (Vec& product : of_query) product = zero();
  for_each_vector(width, [&](auto read, auto) {
    Vec queries[kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) queries[g] = read(q + g * width);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec key = read(keys[j]);
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) products[g][j] = fma(queries[g], key, products[g][j]);
    }
  });
  for (int g = 0; g < kCount; ++g) sum_of_four(products[g], scores + g * stride);
}

// out[g, d] = sum_i p[g, i] values[places[i] + d] for kCount queries and kVecs vectors from d = 0 on; rows of p are
// `count` apart, those of out `width`.
template <int kCount, int kVecs>
inline void weigh(const float* p, const float* values, const int64_t* places, int64_t count, int64_t width, float* out) {
  Vec sums[kCount][kVecs];
  for (auto& of_query : sums)
    for (Vec& sum : of_query) sum = zero();
  for (int64_t i = 0; i < count; ++i) {
    const float* value = values + places[i];
    fetch_row(values + places[std::min(i + kTokensAhead, count - 1)], kVecs * kLanes);
    Vec weights[kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) weights[g] = set1(p[g * count + i]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec part = load(value + v * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < kCount; ++g) sums[g][v] = fma(weights[g], part, sums[g][v]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kCount; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(out + g * width + v * kLanes, sums[g][v]);
}

// In vectors: a chain of single numbers would take longer than their exponentials.
inline float largest(const float* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Vec most = set1(row[0]);
  for_each_vector(whole, [&](auto read, auto) { most = max(read(row), most); });
  float lanes[kLanes], peak = row[0];
  store(lanes, most);
  for (const float lane : lanes) peak = std::max(peak, lane);
  for (int64_t i = whole; i < count; ++i) peak = std::max(peak, row[i]);
  return peak;
}

inline float total(const float* row, int64_t count) {
  Vec sums = zero();
  for_each_vector(count, [&](auto read, auto) { sums = add(sums, read(row)); });
  return sum(sums);
}

// What `attend` does for kCount of the queries of one key head.
template <int kCount>
void attend_queries(const Attention& op, const float* q, const int64_t* places, int64_t count, float* scores, float* peaks,
                    float* sums, float* weighted) {
  const int64_t width = op.width;
  int64_t at = 0;
  for (; at + 4 <= count; at += 4) {
    const float* keys[4];
    for (int j = 0; j < 4; ++j) {
      keys[j] = op.keys + places[at + j];
      fetch_row(op.keys + places[std::min(at + j + kTokensAhead, count - 1)], width);
    }
    score_four<kCount>(q, keys, width, scores + at, count);
  }
  for (; at < count; ++at)
    for (int g = 0; g < kCount; ++g) scores[g * count + at] = dot(q + g * width, op.keys + places[at], width);
  for (int g = 0; g < kCount; ++g) {
    float* row = scores + g * count;
    for_each_vector(count, [&](auto read, auto write) { write(row, mul(read(row), set1(op.scale))); });
    const float peak = largest(row, count);
    for_each_vector(count, [&](auto read, auto write) { write(row, exp(sub(read(row), set1(peak)))); });
    peaks[g] = peak;
    sums[g] = total(row, count);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes)
    weigh<kCount, 4>(scores, op.values + d, places, count, width, weighted + d);
  for (; d + kLanes <= width; d += kLanes)
    weigh<kCount, 1>(scores, op.values + d, places, count, width, weighted + d);
  for (; d < width; ++d)
    for (int g = 0; g < kCount; ++g) {
      float total = 0.0f;
      for (int64_t i = 0; i < count; ++i) total = std::fma(scores[g * count + i], op.values[places[i] + d], total);
      weighted[g * width + d] = total;
    }
}

void attend(const Attention& op, int64_t token, int64_t kv_head, int64_t begin, int64_t end, float* peaks, float* sums,
            float* weighted) {
  const int64_t queries = op.heads / op.kv_heads, count = end - begin;
  const float* q = op.q + (token * op.heads + kv_head * queries) * op.width;
  const int32_t* table = op.tables + token * op.table_stride;
  thread_local std::vector<int64_t> places;
  thread_local std::vector<float> scores;
  places.resize(count);
  scores.resize(kQueries * count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = begin + i;
    places[i] = ((table[at / op.block_size] * op.block_size + at % op.block_size) * op.kv_heads + kv_head) * op.width;
  }
  int64_t g = 0;
  const auto some = [&]<int kCount>(std::integral_constant<int, kCount>) {
    for (; g + kCount <= queries; g += kCount)
      attend_queries<kCount>(op, q + g * op.width, places.data(), count, scores.data(), peaks + g, sums + g,
                             weighted + g * op.width);
  };
  some(std::integral_constant<int, kQueries>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
}
