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

// A chunk of one head in the form of engine/ops/delta_rule.py (chunk_gated_delta_rule), whose names these are.
struct ChunkParts {
  static int64_t numbers(int64_t width, int64_t columns) {
    return kChunkTokens * (3 * width + 2 * kChunkTokens + 3 * columns);
  }
  // In memory for so many numbers.
  ChunkParts(float* buffer, int64_t width, int64_t columns)
      : both(buffer),
        across(both + 2 * kChunkTokens * width),
        grams(across + width * kChunkTokens),
        read(grams + 2 * kChunkTokens * kChunkTokens),
        corrections(read + 2 * kChunkTokens * columns) {}

  float* const both;         // [2 kChunkTokens, K]: keys, then queries
  float* const across;       // [K, kChunkTokens]: the keys transposed
  float* const grams;        // [2 kChunkTokens, kChunkTokens]: minus the system, whose diagonal is not set, and weights
  float* const read;         // [2 kChunkTokens, V]: what keys find in the state, and queries, times grown
  float* const corrections;  // [kChunkTokens, V]
  float grown[kChunkTokens], sums[kChunkTokens], beta[kChunkTokens];
  float key_factors[kChunkTokens], query_factors[kChunkTokens];  // by which keys and queries were normalised
  float total;     // of the logarithms of the decays
  int64_t padded;  // tokens, in whole fours: those of which k, beta and g are 0 change nothing
};

// Of `count` tokens behind a state [K, V]; with their queries if `queries` are wanted.
void solve_chunk(const DeltaChunk& op, const float* state, int64_t head, int64_t start, int64_t count, bool queries,
                 ChunkParts& parts) {
  constexpr int64_t kTokens = kChunkTokens;
  const int64_t width = op.key_width, columns = op.value_width, key_head = head / (op.value_heads / op.key_heads);
  const int64_t padded = parts.padded = (count + 3) / 4 * 4;
  const int64_t rows = queries ? 2 * padded : padded;
  float *const both = parts.both, *const across = parts.across, *const grams = parts.grams, *const read = parts.read;
  float *const corrections = parts.corrections, *const grown = parts.grown, *const sums = parts.sums;
  float* const beta = parts.beta;

  const auto normalized = [&](const float* from, float scale, float* to) {
    const float number = scale / std::sqrt(dot(from, from, width) + op.eps);
    const Vec factor = set1(number);
    for_each_vector(width, [&](auto get, auto put) { put(to, mul(get(from), factor)); });
    return number;
  };
  const float rate = -std::exp(op.a_log[head]), query_scale = 1.0f / std::sqrt(static_cast<float>(width));
  float total = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = start + i, at = key_head * width;
    parts.key_factors[i] = normalized(op.k + token * op.k_stride + at, 1.0f, both + i * width);
    if (queries)
      parts.query_factors[i] = normalized(op.q + token * op.q_stride + at, query_scale, both + (padded + i) * width);
    const float a = op.a[token * op.value_heads + head] + op.dt_bias[head];
    total += rate * (a > 20.0f ? a : std::log1p(std::exp(a)));
    sums[i] = total;
    beta[i] = 1.0f / (1.0f + std::exp(-op.b[token * op.value_heads + head]));
  }
  parts.total = total;
  for (int64_t i = count; i < kTokens; ++i) sums[i] = total, beta[i] = 0.0f;
  std::fill(both + count * width, both + padded * width, 0.0f);
  std::fill(both + (padded + count) * width, both + 2 * padded * width, 0.0f);
  for (int64_t i = 0; i < kTokens; i += kLanes) {
    float decays[kLanes];
    store(decays, exp(load(sums + i)));
    std::copy(decays, decays + kLanes, grown + i);
  }
  for (int64_t k = 0; k < width; ++k)
    for (int64_t i = 0; i < kTokens; ++i) across[k * kTokens + i] = i < padded ? both[i * width + k] : 0.0f;

  small_product(both, width, 1, across, kTokens, rows, width, kTokens, grams, kTokens, 0.0f);
  for (int64_t i = 0; i < padded; ++i) {
    float *const system = grams + i * kTokens, *const weights = grams + (padded + i) * kTokens;
    for (int64_t j = 0; j < kTokens; j += kLanes) {
      // Later tokens, whose decay would overflow, are left out below.
      const Vec decay = exp(min(set1(0.0f), sub(set1(sums[i]), load(sums + j))));
      store(system + j, mul(load(system + j), mul(set1(-beta[i]), decay)));
      if (queries) store(weights + j, mul(load(weights + j), decay));
    }
    if (queries) std::fill(weights + i + 1, weights + kTokens, 0.0f);
  }

  small_product(both, width, 1, state, columns, rows, width, columns, read, columns, 0.0f);
  for (int64_t i = 0; i < padded; ++i) {
    const float* const v = op.v + (start + std::min(i, count - 1)) * op.v_stride + head * columns;
    float *const found = read + i * columns, *const out = read + (padded + i) * columns;
    for_each_vector(columns, [&](auto get, auto put) {
      put(corrections + i * columns, mul(set1(beta[i]), sub(get(v), mul(set1(grown[i]), get(found)))));
      if (queries) put(out, mul(set1(grown[i]), get(out)));
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
}

// The state after a solved chunk; the corrections are then those times their decay to its end.
void leave_chunk(const ChunkParts& parts, int64_t width, int64_t columns, float* state) {
  for (int64_t i = 0; i < parts.padded; ++i) {
    const Vec left = set1(std::exp(parts.total - parts.sums[i]));
    float* const row = parts.corrections + i * columns;
    for_each_vector(columns, [&](auto get, auto put) { put(row, mul(left, get(row))); });
  }
  const float through = parts.grown[kChunkTokens - 1];
  small_product(parts.both, 1, width, parts.corrections, columns, width, parts.padded, columns, state, columns, through);
}

void advance_chunks(const DeltaChunk& op, int64_t head) {
  thread_local std::vector<float> buffer;
  const int64_t width = op.key_width, columns = op.value_width;
  buffer.resize(ChunkParts::numbers(width, columns));
  ChunkParts parts(buffer.data(), width, columns);
  float* const state = op.state + head * width * columns;
  for (int64_t start = 0; start < op.tokens; start += kChunkTokens) {
    const int64_t count = std::min(kChunkTokens, op.tokens - start);
    solve_chunk(op, state, head, start, count, true, parts);
    const int64_t padded = parts.padded;
    for (int64_t i = 0; i < padded; i += 4)
      small_product(parts.grams + (padded + i) * kChunkTokens, kChunkTokens, 1, parts.corrections, columns, 4, i + 4,
                    columns, parts.read + (padded + i) * columns, columns, 1.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float* const from = parts.read + (padded + i) * columns;
      std::copy(from, from + columns, op.out + ((start + i) * op.value_heads + head) * columns);
    }
    leave_chunk(parts, width, columns, state);
  }
}
