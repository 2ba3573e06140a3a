// The recurrent layers over many tokens of one sequence, for one instruction set: what a prompt needs.

// Channels that are taken through all tokens at once: their rows and taps stay in the first cache.
constexpr int64_t kConvChannels = 512;

void convolve_rows(const Conv& op, int64_t begin, int64_t end) {
  alignas(64) static constexpr float kNothing[kConvChannels] = {};
  for (int64_t first = 0; first < op.channels; first += kConvChannels) {
    const int64_t width = std::min(kConvChannels, op.channels - first);
    for (int64_t t = begin; t < end; ++t) {
      const float* rows[kMaxTaps];
      for (int64_t j = 0; j < op.taps; ++j) {
        const int64_t at = t - (op.taps - 1) + j;
        rows[j] = at >= 0                ? op.x + at * op.x_stride + first
                  : op.window != nullptr ? op.window + (op.taps - 1 + at) * op.channels + first
                                         : kNothing;
      }
      float* const out = op.out + t * op.channels + first;
      for_each_vector(width, [&](auto read, auto write) {
        Vec y = mul(read(op.weight + first), read(rows[0]));
        for (int64_t j = 1; j < op.taps; ++j) y = fma(read(op.weight + j * op.channels + first), read(rows[j]), y);
        write(out, op.silu ? mul(y, sigmoid(y)) : y);
      });
    }
  }
}

// -------------------------------------------------------------------------------------------------- the delta rule

// c = scale c + a b over rows [0, 4) and kVectors vectors of columns; where the scale is 0, c is not read. a's element
// (m, k) lies at m * rows_apart + k * columns_apart.
template <int kVectors>
inline void small_tile(const float* a, int64_t rows_apart, int64_t columns_apart, const float* b, int64_t ldb,
                       int64_t depth, float* c, int64_t ldc, float scale) {
  Vec sums[4][kVectors];
  const Vec scales = set1(scale);
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sums[m][v] = scale == 0.0f ? zero() : mul(scales, load(c + m * ldc + v * kLanes));
  for (int64_t k = 0; k < depth; ++k, a += columns_apart, b += ldb) {
    Vec columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      const Vec value = set1(a[m * rows_apart]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[m][v] = fma(columns[v], value, sums[m][v]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

// The same over `rows`, a multiple of 4, and `columns`, a multiple of kLanes.
void small_product(const float* a, int64_t rows_apart, int64_t columns_apart, const float* b, int64_t ldb, int64_t rows,
                   int64_t depth, int64_t columns, float* c, int64_t ldc, float scale) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    for (int64_t m = 0; m < rows; m += 4)
      small_tile<2>(a + m * rows_apart, rows_apart, columns_apart, b + n, ldb, depth, c + m * ldc + n, ldc, scale);
  for (; n < columns; n += kLanes)
    for (int64_t m = 0; m < rows; m += 4)
      small_tile<1>(a + m * rows_apart, rows_apart, columns_apart, b + n, ldb, depth, c + m * ldc + n, ldc, scale);
}

// `count` tokens of one head: the form of engine/ops/delta_rule.py (chunk_gated_delta_rule), whose names these are.
void advance_chunk(const DeltaChunk& op, int64_t head, int64_t start, int64_t count, float* buffer) {
  constexpr int64_t kTokens = kChunkTokens;
  const int64_t width = op.key_width, columns = op.value_width, key_head = head / (op.value_heads / op.key_heads);
  const int64_t padded = (count + 3) / 4 * 4;  // tokens of which k, beta and g are 0 change nothing
  float* const both = buffer;                  // [2 kTokens, K]: keys, then queries
  float* const across = both + 2 * kTokens * width;     // [K, kTokens]: the keys transposed
  float* const grams = across + width * kTokens;        // [2 kTokens, kTokens]: system and weights
  float* const read = grams + 2 * kTokens * kTokens;    // [2 kTokens, V]: what keys and queries find in the state
  float* const corrections = read + 2 * kTokens * columns;  // [kTokens, V]
  float* const queries = both + padded * width;
  float grown[kTokens], sums[kTokens], beta[kTokens];
  float* const state = op.state + head * width * columns;

  const auto normalized = [&](const float* from, float scale, float* to) {
    const Vec factor = set1(scale / std::sqrt(dot(from, from, width) + op.eps));
    for_each_vector(width, [&](auto get, auto put) { put(to, mul(get(from), factor)); });
  };
  const float rate = -std::exp(op.a_log[head]), query_scale = 1.0f / std::sqrt(static_cast<float>(width));
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = start + i;
    normalized(op.k + token * op.k_stride + key_head * width, 1.0f, both + i * width);
    normalized(op.q + token * op.q_stride + key_head * width, query_scale, queries + i * width);
    const float a = op.a[token * op.value_heads + head] + op.dt_bias[head];
    total += rate * (a > 20.0f ? a : std::log1p(std::exp(a)));
    sums[i] = total;
    beta[i] = 1.0f / (1.0f + std::exp(-op.b[token * op.value_heads + head]));
  }
  for (int64_t i = count; i < kTokens; ++i) sums[i] = total, beta[i] = 0.0f;
  std::fill(both + count * width, both + padded * width, 0.0f);
  std::fill(queries + count * width, queries + padded * width, 0.0f);
  for (int64_t i = 0; i < kTokens; i += kLanes) {
    float decays[kLanes];
    store(decays, exp(load(sums + i)));
    std::copy(decays, decays + kLanes, grown + i);
  }
  for (int64_t k = 0; k < width; ++k)
    for (int64_t i = 0; i < kTokens; ++i) across[k * kTokens + i] = i < padded ? both[i * width + k] : 0.0f;

  small_product(both, width, 1, across, kTokens, 2 * padded, width, kTokens, grams, kTokens, 0.0f);
  for (int64_t i = 0; i < padded; ++i) {
    float *const system = grams + i * kTokens, *const weights = grams + (padded + i) * kTokens;
    for (int64_t j = 0; j < kTokens; j += kLanes) {
      // Later tokens, whose decay would overflow, are left out below.
      const Vec decay = exp(min(set1(0.0f), sub(set1(sums[i]), load(sums + j))));
      store(system + j, mul(load(system + j), mul(set1(-beta[i]), decay)));
      store(weights + j, mul(load(weights + j), decay));
    }
    std::fill(weights + i + 1, weights + kTokens, 0.0f);
  }

  small_product(both, width, 1, state, columns, 2 * padded, width, columns, read, columns, 0.0f);
  for (int64_t i = 0; i < padded; ++i) {
    const float* const v = op.v + (start + std::min(i, count - 1)) * op.v_stride + head * columns;
    float *const found = read + i * columns, *const out = read + (padded + i) * columns;
    for_each_vector(columns, [&](auto get, auto put) {
      put(corrections + i * columns, mul(set1(beta[i]), sub(get(v), mul(set1(grown[i]), get(found)))));
      put(out, mul(set1(grown[i]), get(out)));
    });
  }
  // The unit triangular system, four rows at a time: what earlier rows give by a product, then each other.
  for (int64_t i = 0; i < padded; i += 4) {
    float* const four = corrections + i * columns;
    if (i > 0) small_product(grams + i * kTokens, kTokens, 1, corrections, columns, 4, i, columns, four, columns, 1.0f);
    for_each_vector(columns, [&](auto get, auto put) {
      Vec rows[4];
      for (int r = 0; r < 4; ++r) {
        rows[r] = get(four + r * columns);
        for (int s = 0; s < r; ++s) rows[r] = fma(set1(grams[(i + r) * kTokens + i + s]), rows[s], rows[r]);
        put(four + r * columns, rows[r]);
      }
    });
  }
  for (int64_t i = 0; i < padded; i += 4)
    small_product(grams + (padded + i) * kTokens, kTokens, 1, corrections, columns, 4, i + 4, columns,
                  read + (padded + i) * columns, columns, 1.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float* const from = read + (padded + i) * columns;
    std::copy(from, from + columns, op.out + ((start + i) * op.value_heads + head) * columns);
  }
  for (int64_t i = 0; i < padded; ++i) {
    const Vec left = set1(std::exp(total - sums[i]));
    float* const row = corrections + i * columns;
    for_each_vector(columns, [&](auto get, auto put) { put(row, mul(left, get(row))); });
  }
  const float through = grown[kTokens - 1];
  small_product(both, 1, width, corrections, columns, width, padded, columns, state, columns, through);
}

void advance_chunks(const DeltaChunk& op, int64_t head) {
  thread_local std::vector<float> buffer;
  const int64_t width = op.key_width, columns = op.value_width;
  buffer.resize(kChunkTokens * (3 * width + 2 * kChunkTokens + 3 * columns));
  for (int64_t start = 0; start < op.tokens; start += kChunkTokens)
    advance_chunk(op, head, start, std::min(kChunkTokens, op.tokens - start), buffer.data());
}
