// Attention of many new tokens, for one instruction set: the softmax of a tile of queries is taken tile of keys by tile of
// keys (Dao et al., "FlashAttention"; the running rescale is Milakov and Gimelshein's), so that scores never leave the
// caches.
//
// A tile of queries has the rows of some tokens for all query heads of one key head, which thus read its keys together.
// Tiles of keys begin at multiples of kKeys in the sequence: what a token gets depends neither on what other tokens come
// with it, nor on threads.

constexpr int64_t kKeys = 64;  // of a tile
constexpr int64_t kMaxWidth = 512;
constexpr int kBlockRows = kLanes == 16 ? 12 : 6;  // with two vectors each, they fill the registers
constexpr int kBlockVecs = 2;

// c[r, 0 : kVecs vectors] = c * factors[r] + sum_k a[r, k] b[k, same]; factors may be null: c is 0 before.
template <int kRows, int kVecs>
inline void add_product(const float* a, int64_t lda, const float* const* b, int64_t at, int64_t depth,
                        const float* factors, float* c, int64_t ldc) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      sums[r][v] = factors == nullptr ? zero() : mul(load(c + r * ldc + v * kLanes), set1(factors[r]));
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load(b[k] + at + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = set1(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(value, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
}

// out[d, c] = keys[c][d] * scale for d < width; for c from count to a whole number of blocks, 0.
inline void transpose_keys(const float* const* keys, int64_t count, int64_t width, float scale, float* out) {
  static constexpr float kNothing[4] = {};
  const __m128 factor = _mm_set1_ps(scale);
  constexpr int64_t kStep = kBlockVecs * kLanes;
  for (int64_t c = 0; c < (count + kStep - 1) / kStep * kStep; c += 4) {
    if (c >= count) {
      for (int64_t d = 0; d < width; ++d) _mm_storeu_ps(out + d * kKeys + c, _mm_setzero_ps());
      continue;
    }
    int64_t d = 0;
    for (; d + 4 <= width; d += 4) {
      __m128 r[4];
      for (int j = 0; j < 4; ++j) r[j] = _mm_mul_ps(_mm_loadu_ps(c + j < count ? keys[c + j] + d : kNothing), factor);
      _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
      for (int j = 0; j < 4; ++j) _mm_storeu_ps(out + (d + j) * kKeys + c, r[j]);
    }
    for (; d < width; ++d)
      for (int j = 0; j < 4; ++j) out[d * kKeys + c + j] = c + j < count ? keys[c + j][d] * scale : 0.0f;
  }
}

// Scores [begin, end) of one row become exp(score - peak), the others of `limit` 0; peak and sum go on from those of the
// tiles before. Returns what the row's weighted values are to be multiplied by.
inline float soften(float* scores, int64_t begin, int64_t end, int64_t limit, float* peak, float* sum_of_row) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  if (begin >= end) {
    std::fill(scores, scores + limit, 0.0f);
    return 1.0f;
  }
  std::fill(scores, scores + begin, kLowest);
  std::fill(scores + end, scores + limit, kLowest);
  Vec peaks = load(scores), total = zero();
  for (int64_t c = kLanes; c < limit; c += kLanes) peaks = max(peaks, load(scores + c));
  float lanes[kLanes], now = *peak;
  store(lanes, peaks);
  for (float lane : lanes) now = std::max(now, lane);
  const Vec level = set1(now);
  for (int64_t c = 0; c < limit; c += kLanes) store(scores + c, exp(sub(load(scores + c), level)));
  // exp of -inf is the least number that it knows.
  std::fill(scores, scores + begin, 0.0f);
  std::fill(scores + end, scores + limit, 0.0f);
  for (int64_t c = 0; c < limit; c += kLanes) total = add(total, load(scores + c));
  const float factor = *peak == kLowest ? 0.0f : *peak == now ? 1.0f : std::exp(*peak - now);
  *peak = now;
  *sum_of_row = *sum_of_row * factor + sum(total);
  return factor;
}

void attend_tile(const TiledAttention& op, int64_t sequence, int64_t first, int64_t tokens, int64_t kv_head) {
  const int64_t width = op.width, queries = op.heads / op.kv_heads, rows = tokens * queries;
  const int64_t padded = (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  const int64_t start = op.seq_starts[sequence], kv_len = op.kv_lens[sequence];
  const int64_t before = kv_len - (op.seq_starts[sequence + 1] - start);  // tokens of earlier steps
  thread_local std::vector<float> buffer;
  buffer.resize(padded * (2 * width + kKeys + 3) + width * kKeys);
  float *const q = buffer.data(), *const out = q + padded * width, *const scores = out + padded * width;
  float *const peaks = scores + padded * kKeys, *const sums = peaks + padded, *const factors = sums + padded;
  float* const transposed = factors + padded;
  std::fill(q, q + padded * width, 0.0f);
  std::fill(out, out + padded * width, 0.0f);
  std::fill(peaks, peaks + padded, -std::numeric_limits<float>::infinity());
  std::fill(sums, sums + padded, 0.0f);
  for (int64_t t = 0; t < tokens; ++t)
    std::memcpy(q + t * queries * width,
                op.q + (start + first + t) * op.q_stride + kv_head * queries * width, queries * width * sizeof(float));
  // The keys that a row sees.
  const auto seen = [&](int64_t row, int64_t* begin, int64_t* end) {
    const int64_t position = before + first + row / queries;
    *end = op.causal != 0 ? position + 1 : op.window > 0 ? std::min(kv_len, position + op.window) : kv_len;
    *begin = op.window > 0 ? std::max<int64_t>(0, position + 1 - op.window) : 0;
  };
  int64_t least, most, unused;
  seen(0, &least, &unused);
  seen(rows - 1, &unused, &most);
  for (int64_t tile = least / kKeys * kKeys; tile < most; tile += kKeys) {
    const int64_t count = std::min(kKeys, most - tile);
    const float *keys[kKeys], *values[kKeys], *depth[kMaxWidth];
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = tile + c;
      const int64_t row = op.tables == nullptr ? start + at
                                               : op.tables[sequence * op.table_stride + at / op.block_size] * op.block_size +
                                                     at % op.block_size;
      keys[c] = op.keys + row * op.key_stride + kv_head * width;
      values[c] = op.values + row * op.value_stride + kv_head * width;
    }
    transpose_keys(keys, count, width, op.scale, transposed);
    for (int64_t d = 0; d < width; ++d) depth[d] = transposed + d * kKeys;
    for (int64_t block = 0; block < padded; block += kBlockRows) {
      int64_t begin, end, last_end = 0;
      for (int64_t r = block; r < std::min(block + kBlockRows, rows); ++r) {
        seen(r, &begin, &end);
        last_end = std::max(last_end, std::min(kKeys, end - tile));
      }
      if (last_end <= 0) continue;
      const int64_t limit = (last_end + kLanes - 1) / kLanes * kLanes;
      float* const of_block = scores + block * kKeys;
      for (int64_t c = 0; c < last_end; c += kBlockVecs * kLanes)
        add_product<kBlockRows, kBlockVecs>(q + block * width, width, depth, c, width, nullptr, of_block + c, kKeys);
      for (int64_t r = block; r < block + kBlockRows; ++r) {
        begin = end = 0;
        if (r < rows) seen(r, &begin, &end);
        factors[r] = soften(scores + r * kKeys, std::max<int64_t>(0, begin - tile), std::min(kKeys, end - tile),
                            limit, peaks + r, sums + r);
      }
      float* const y = out + block * width;
      int64_t d = 0;
      for (; d + kBlockVecs * kLanes <= width; d += kBlockVecs * kLanes)
        add_product<kBlockRows, kBlockVecs>(of_block, kKeys, values, d, last_end, factors + block, y + d, width);
      for (; d + kLanes <= width; d += kLanes)
        add_product<kBlockRows, 1>(of_block, kKeys, values, d, last_end, factors + block, y + d, width);
      for (; d < width; ++d)
        for (int r = 0; r < kBlockRows; ++r) {
          float total = y[r * width + d] * factors[block + r];
          for (int64_t c = 0; c < last_end; ++c) total = std::fma(of_block[r * kKeys + c], values[c][d], total);
          y[r * width + d] = total;
        }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = out + row * width;
    float* to = op.out + ((start + first + row / queries) * op.heads + kv_head * queries + row % queries) * width;
    const Vec inverse = set1(1.0f / sums[row]);
    if (op.log_sums != nullptr) op.log_sums[(to - op.out) / width] = peaks[row] + std::log(sums[row]);
    for_each_vector(width, [&](auto read, auto write) { write(to, mul(read(from), inverse)); });
  }
}
