// Attention of one new token over the blocks of its sequence, for one instruction set.

// Queries of one key head that are taken together: four tokens for each fill twelve of the sixteen registers of AVX2.
constexpr int kQueries = 3;
// Tokens whose values are weighed for one head before the next head: their rows stay in the nearest cache.
constexpr int64_t kWeighed = 8;
// Bytes between the rows that are read and those that are fetched.
constexpr int64_t kCacheBytesAhead = 6144;

// Fetches rows one after the other, a little at a time, as they are read: a burst would wait for memory. In a block the
// heads of a token lie side by side, and tokens too, so that this is one stream until the next block.
class Fetcher {
 public:
  Fetcher(const float* const* rows, int64_t count, int64_t width)
      : row_(rows), end_(rows + count), bytes_(width * static_cast<int64_t>(sizeof(float))) {
    numbers(kCacheBytesAhead / static_cast<int64_t>(sizeof(float)));
  }
  void numbers(int64_t count) {
    for (int64_t left = count * static_cast<int64_t>(sizeof(float)); left > 0 && row_ != end_;) {
      const char* from = reinterpret_cast<const char*>(*row_) + at_;
      const int64_t some = std::min(left, bytes_ - at_);
      for (int64_t i = 0; i < some; i += 64) _mm_prefetch(from + i, _MM_HINT_T0);
      left -= some;
      if ((at_ += some) == bytes_) at_ = 0, ++row_;
    }
  }

 private:
  const float* const* row_;
  const float* const* end_;
  int64_t bytes_, at_ = 0;
};

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

// out[g, d] += sum_i p[g, i] values[i][d] for kCount queries and kVecs vectors from d = 0 on; rows of p are `stride`
// apart, those of out `width`.
template <int kCount, int kVecs>
inline void weigh(const float* p, int64_t stride, const float* const* values, int64_t offset, int64_t count,
                  int64_t width, float* out) {
  Vec sums[kCount][kVecs];
#pragma GCC unroll 4
  for (int g = 0; g < kCount; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[g][v] = load(out + g * width + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float* value = values[i] + offset;
    Vec weights[kCount];
#pragma GCC unroll 4
    for (int g = 0; g < kCount; ++g) weights[g] = set1(p[g * stride + i]);
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

// The scores of kCount queries of one head for `count` tokens, at most four; rows of scores are `stride` apart.
template <int kCount>
inline void score(const float* q, const float* const* rows, int64_t offset, int64_t count, int64_t width, float* scores,
                  int64_t stride) {
  if (count == 4) {
    const float* const keys[4] = {rows[0] + offset, rows[1] + offset, rows[2] + offset, rows[3] + offset};
    return score_four<kCount>(q, keys, width, scores, stride);
  }
  for (int64_t j = 0; j < count; ++j)
    for (int g = 0; g < kCount; ++g) scores[g * stride + j] = dot(q + g * width, rows[j] + offset, width);
}

// body.operator()<kCount>(g) for the queries [g, g + kCount) of one head, of `count`.
template <typename Body>
inline void for_queries(int64_t count, Body body) {
  int64_t g = 0;
  for (; g + kQueries <= count; g += kQueries) body.template operator()<kQueries>(g);
  if (count - g == 2) body.template operator()<2>(g);
  if (count - g == 1) body.template operator()<1>(g);
}

// Heads are taken in turn for a few tokens at a time, not one after the other: so memory is read in order.
void attend(const Attention& op, int64_t token, int64_t kv_head, int64_t heads, int64_t begin, int64_t end,
            float* peaks, float* sums, float* weighted) {
  const int64_t queries = op.heads / op.kv_heads, width = op.width, count = end - begin;
  const float* q = op.q + (token * op.heads + kv_head * queries) * width;
  const int32_t* table = op.tables + token * op.table_stride;
  thread_local std::vector<const float*> rows;
  thread_local std::vector<float> scores;
  rows.resize(2 * count);
  scores.resize(heads * queries * count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = begin + i;
    const int64_t place =
        ((table[at / op.block_size] * op.block_size + at % op.block_size) * op.kv_heads + kv_head) * width;
    rows[i] = op.keys + place;
    rows[count + i] = op.values + place;
  }
  Fetcher fetch(rows.data(), 2 * count, heads * width);
  for (int64_t at = 0; at < count; at += 4) {
    const int64_t tokens = std::min<int64_t>(4, count - at);
    for (int64_t head = 0; head < heads; ++head) {
      fetch.numbers(tokens * width);
      for_queries(queries, [&]<int kCount>(int64_t g) {
        const int64_t row = head * queries + g;
        score<kCount>(q + row * width, rows.data() + at, head * width, tokens, width, scores.data() + row * count + at,
                      count);
      });
    }
  }
  for (int64_t g = 0; g < heads * queries; ++g) {
    float* row = scores.data() + g * count;
    for_each_vector(count, [&](auto read, auto write) { write(row, mul(read(row), set1(op.scale))); });
    const float peak = largest(row, count);
    for_each_vector(count, [&](auto read, auto write) { write(row, exp(sub(read(row), set1(peak)))); });
    peaks[g] = peak;
    sums[g] = total(row, count);
  }
  std::fill(weighted, weighted + heads * queries * width, 0.0f);
  for (int64_t at = 0; at < count; at += kWeighed) {
    const int64_t tokens = std::min(kWeighed, count - at);
    const float* const* values = rows.data() + count + at;
    for (int64_t head = 0; head < heads; ++head) {
      const auto weigh_some = [&]<int kVecs>(int64_t d) {
        fetch.numbers(tokens * kVecs * kLanes);
        for_queries(queries, [&]<int kCount>(int64_t g) {
          const int64_t row = head * queries + g;
          weigh<kCount, kVecs>(scores.data() + row * count + at, count, values, head * width + d, tokens, width,
                               weighted + row * width + d);
        });
      };
      int64_t d = 0;
      for (; d + 4 * kLanes <= width; d += 4 * kLanes) weigh_some.template operator()<4>(d);
      for (; d + kLanes <= width; d += kLanes) weigh_some.template operator()<1>(d);
      for (; d < width; ++d)
        for (int64_t row = head * queries; row < (head + 1) * queries; ++row) {
          float& sum = weighted[row * width + d];
          for (int64_t i = 0; i < tokens; ++i)
            sum = std::fma(scores[row * count + at + i], values[i][head * width + d], sum);
        }
    }
  }
}
