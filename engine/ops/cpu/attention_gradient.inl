// The gradient of causal attention, for one instruction set: the scores of a tile of keys and a block of queries are made
// again from the logarithms of the sums, and used for all three gradients while they are in the nearest cache (Dao et al.,
// "FlashAttention"). Blocks of queries that see none of a tile's keys are left out.
//
// For the queries of one key head, R of them in the order of tokens (those of a token side by side), everything that has
// queries as columns is transposed once, so that each product runs over whole vectors:
//
//     P^T = exp(K Q^T scale - log_sums), dS^T = P^T (V dO^T - sum(dO O)),
//     dV = P^T dO, dK = dS^T Q scale, dQ^T = K^T dS^T scale.

constexpr int64_t kGradientKeys = 48;     // of a tile: a multiple of kBlockRows
constexpr int64_t kGradientQueries = 64;  // of a block: a multiple of kBlockVecs vectors

// c [rows, columns] = a [rows, depth] b [depth, columns], or c + that where `adds`; rows in whole blocks, columns in whole
// pairs of vectors, from column `at` of b.
inline void block_product(const float* a, int64_t lda, int64_t rows, const float* const* b, int64_t at, int64_t columns,
                          int64_t depth, bool adds, float* c, int64_t ldc) {
  float ones[kBlockRows];
  std::fill(ones, ones + kBlockRows, 1.0f);
  for (int64_t r = 0; r < rows; r += kBlockRows)
    for (int64_t j = 0; j < columns; j += kBlockVecs * kLanes)
      add_product<kBlockRows, kBlockVecs>(a + r * lda, lda, b, at + j, depth, adds ? ones : nullptr, c + r * ldc + j, ldc);
}

// Of a long sequence no thread keeps the memory for the next: 64 MiB.
constexpr size_t kKeptNumbers = 16 << 20;

void attend_gradient(const AttentionGradient& op, int64_t sequence, int64_t kv_head) {
  const int64_t start = op.seq_starts[sequence], tokens = op.seq_starts[sequence + 1] - start, width = op.width;
  const int64_t group = op.heads / op.kv_heads, rows = tokens * group;
  // Whole blocks, and one line of the cache more: rows that lie an odd number of lines apart share its sets evenly.
  const int64_t padded = (rows + kGradientQueries - 1) / kGradientQueries * kGradientQueries + 16;
  const int64_t deep = (width + kBlockRows - 1) / kBlockRows * kBlockRows;
  thread_local std::vector<float> buffer;
  thread_local std::vector<const float*> pointers;
  buffer.assign(padded * (2 * width + deep + 2) + kGradientKeys * (4 * width + deep + 2 * kGradientQueries), 0.0f);
  pointers.resize(2 * rows + 2 * width + kGradientKeys);
  float *const q_t = buffer.data(), *const gradient_t = q_t + width * padded, *const d_q_t = gradient_t + width * padded;
  float *const log_sums = d_q_t + deep * padded, *const along = log_sums + padded;
  float *const k = along + padded, *const v = k + kGradientKeys * width, *const d_k = v + kGradientKeys * width;
  float *const d_v = d_k + kGradientKeys * width, *const k_t = d_v + kGradientKeys * width;
  float *const p = k_t + deep * kGradientKeys, *const d_s = p + kGradientKeys * kGradientQueries;
  const float **const q_rows = pointers.data(), **const gradient_rows = q_rows + rows;
  const float **const q_columns = gradient_rows + rows, **const gradient_columns = q_columns + width;
  const float** const d_s_rows = gradient_columns + width;
  const auto head_of = [&](int64_t row) { return (start + row / group) * op.heads + kv_head * group + row % group; };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = head_of(row);
    q_rows[row] = op.q + head * width;
    gradient_rows[row] = op.gradient + head * width;
    for (int64_t d = 0; d < width; ++d) {
      q_t[d * padded + row] = q_rows[row][d];
      gradient_t[d * padded + row] = gradient_rows[row][d];
    }
    log_sums[row] = op.log_sums[head];
    along[row] = dot(gradient_rows[row], op.out + head * width, width);
  }
  for (int64_t d = 0; d < width; ++d) {
    q_columns[d] = q_t + d * padded;
    gradient_columns[d] = gradient_t + d * padded;
  }
  for (int64_t c = 0; c < kGradientKeys; ++c) d_s_rows[c] = d_s + c * kGradientQueries;
  const Vec scale = set1(op.scale);
  for (int64_t tile = 0; tile < tokens; tile += kGradientKeys) {
    const int64_t count = std::min(kGradientKeys, tokens - tile);
    const auto key_row = [&](int64_t c) { return ((start + tile + c) * op.kv_heads + kv_head) * width; };
    std::fill(d_k, d_v + kGradientKeys * width, 0.0f);
    for (int64_t c = 0; c < kGradientKeys; ++c) {
      // Keys behind the last one are zeros.
      for (int64_t d = 0; d < width; ++d) {
        k[c * width + d] = c < count ? op.k[key_row(c) + d] * op.scale : 0.0f;
        v[c * width + d] = c < count ? op.v[key_row(c) + d] : 0.0f;
        k_t[d * kGradientKeys + c] = k[c * width + d];
      }
    }
    for (int64_t block = tile * group / kGradientQueries * kGradientQueries; block < rows; block += kGradientQueries) {
      block_product(k, width, kGradientKeys, q_columns, block, kGradientQueries, width, false, p, kGradientQueries);
      block_product(v, width, kGradientKeys, gradient_columns, block, kGradientQueries, width, false, d_s, kGradientQueries);
      for (int64_t c = 0; c < kGradientKeys; ++c) {
        // The first query that sees the key.
        const int64_t first = c < count ? std::clamp<int64_t>((tile + c) * group - block, 0, kGradientQueries)
                                        : kGradientQueries;
        float *const p_row = p + c * kGradientQueries, *const d_s_row = d_s + c * kGradientQueries;
        for (int64_t j = first / kLanes * kLanes; j < kGradientQueries; j += kLanes) {
          const Vec probability = exp(sub(load(p_row + j), load(log_sums + block + j)));
          store(p_row + j, probability);
          store(d_s_row + j, mul(probability, sub(load(d_s_row + j), load(along + block + j))));
        }
        std::fill(p_row, p_row + first, 0.0f);
        std::fill(d_s_row, d_s_row + first, 0.0f);
      }
      const int64_t depth = std::min(kGradientQueries, rows - block);
      block_product(p, kGradientQueries, kGradientKeys, gradient_rows + block, 0, width, depth, true, d_v, width);
      block_product(d_s, kGradientQueries, kGradientKeys, q_rows + block, 0, width, depth, true, d_k, width);
      block_product(k_t, kGradientKeys, deep, d_s_rows, 0, kGradientQueries, count, true, d_q_t + block, padded);
    }
    for (int64_t c = 0; c < count; ++c) {
      std::copy_n(d_v + c * width, width, op.d_v + key_row(c));
      for (int64_t d = 0; d < width; d += kLanes)
        store(op.d_k + key_row(c) + d, mul(load(d_k + c * width + d), scale));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* const out = op.d_q + head_of(row) * width;
    for (int64_t d = 0; d < width; ++d) out[d] = d_q_t[d * padded + row];
  }
  if (buffer.size() > kKeptNumbers) std::vector<float>().swap(buffer);
}
