// Gradients of the recurrent layers over whole sequences, for one instruction set; after sequence.inl, whose forms of the
// forward these are the gradients of. Nothing but what the forward was given is read: the rest is made again.

// Of channels [first, first + width), width at most kConvChannels, of one sequence. With d[t] = gradient[t] silu'(y[t]),
// the gradient of x[t] is sum_j weight[j] d[t + W - 1 - j]; d of the last W tokens is kept.
void convolve_gradient(const ConvGradient& op, int64_t sequence, int64_t first, int64_t width) {
  alignas(64) static constexpr float kNothing[kConvChannels] = {};
  alignas(64) float kept[kMaxTaps][kConvChannels];
  const int64_t begin = op.seq_starts[sequence], end = op.seq_starts[sequence + 1];
  for (int64_t t = end - 1; t >= begin; --t) {
    const float *rows[kMaxTaps], *later[kMaxTaps];
    for (int64_t j = 0; j < op.taps; ++j) {
      const int64_t at = t - (op.taps - 1) + j, after = t + (op.taps - 1) - j;
      rows[j] = at >= begin ? op.x + at * op.channels + first : kNothing;
      later[j] = after < end ? kept[after % op.taps] : kNothing;
    }
    const float* const gradient = op.gradient + t * op.channels + first;
    float *const here = kept[t % op.taps], *const out = op.d_x + t * op.channels + first;
    for_each_vector(width, [&](auto read, auto write) {
      Vec d = read(gradient);
      if (op.silu != 0) {
        Vec y = mul(read(op.weight + first), read(rows[0])), slope;
        for (int64_t j = 1; j < op.taps; ++j) y = fma(read(op.weight + j * op.channels + first), read(rows[j]), y);
        activation_and_slope<Activation::kSilu>(y, &slope);
        d = mul(d, slope);
      }
      write(here, d);
      Vec sum = mul(read(op.weight + (op.taps - 1) * op.channels + first), d);
      for (int64_t j = 0; j + 1 < op.taps; ++j)
        sum = fma(read(op.weight + j * op.channels + first), read(later[j]), sum);
      write(out, sum);
    });
  }
}

// -------------------------------------------------------------------------------------------------- the delta rule

// to [columns, to_stride] = from [rows, columns] transposed; both sizes in whole eights.
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 8) {
    const float* eight[8];
    for (int64_t i = 0; i < 8; ++i) eight[i] = from + (r + i) * columns;
    for (int64_t c = 0; c < columns; c += 8) transpose_eight(eight, c, to + c * to_stride + r, to_stride);
  }
}

// Memory of the gradient of a chunk, beside ChunkParts; names are those of engine/ops/delta_rule_gradient.py.
struct GradientParts {
  static int64_t numbers(int64_t width, int64_t columns) {
    return kChunkTokens * (5 * columns + 4 * kChunkTokens + 2 * width) + columns * (kChunkTokens + 2 * width) +
           width * columns;
  }
  GradientParts(float* buffer, int64_t width, int64_t columns)
      : incoming(buffer),
        found(incoming + 2 * kChunkTokens * columns),
        wanted(found + 2 * kChunkTokens * columns),
        pairs(wanted + kChunkTokens * columns),
        grams(pairs + 2 * kChunkTokens * kChunkTokens),
        both(grams + 2 * kChunkTokens * kChunkTokens),
        corrections_across(both + 2 * kChunkTokens * width),
        state_across(corrections_across + columns * kChunkTokens),
        d_state_across(state_across + columns * width),
        d_state(d_state_across + columns * width) {}

  float* const incoming;            // [2 kChunkTokens, V]: X, then dO
  float* const found;               // [2 kChunkTokens, V]: R, then Y
  float* const wanted;              // [kChunkTokens, V]: K dS'
  float* const pairs;               // [2 kChunkTokens, kChunkTokens]: X U^T, then dO U^T
  float* const grams;               // [2 kChunkTokens, kChunkTokens]: M, then Z
  float* const both;                // [2 kChunkTokens, K]: dK, then dQ
  float* const corrections_across;  // [V, kChunkTokens]: U^T
  float* const state_across;        // [V, K]: S^T
  float* const d_state_across;      // [V, K]: dS'^T
  float* const d_state;             // [K, V]: dS', then dS
};

// One chunk of one head: writes or, unless `is_first` of the heads that share a key head, adds the gradients of its
// tokens, and turns that of the state behind it into that of the state before.
void chunk_gradient(const DeltaChunkGradient& op, const float* state, int64_t head, int64_t start, int64_t count,
                    bool is_first, ChunkParts& parts, GradientParts& of) {
  constexpr int64_t kTokens = kChunkTokens;
  const DeltaChunk& forward = op.forward;
  const int64_t width = forward.key_width, columns = forward.value_width, heads = forward.value_heads;
  const int64_t key_head = head / (heads / forward.key_heads);
  solve_chunk(forward, state, head, start, count, true, parts);
  const int64_t padded = parts.padded;
  float *const x = of.incoming, *const d_out = of.incoming + padded * columns;
  float *const r = of.found, *const y = of.found + padded * columns;
  float *const system = parts.grams, *const weights = parts.grams + padded * kTokens;
  float d_sums[kTokens] = {}, d_beta[kTokens] = {}, left[kTokens];

  for (int64_t i = 0; i < count; ++i)
    std::copy_n(op.gradient + ((start + i) * heads + head) * columns, columns, d_out + i * columns);
  std::fill(d_out + count * columns, d_out + padded * columns, 0.0f);
  std::fill(parts.corrections + padded * columns, parts.corrections + kTokens * columns, 0.0f);

  // dU = P^T dO + l K dS', in the place of X; what l gives to the sums.
  small_product(parts.both, width, 1, of.d_state, columns, padded, width, columns, of.wanted, columns, 0.0f);
  small_product(weights, 1, kTokens, d_out, columns, padded, padded, columns, x, columns, 0.0f);
  float of_left = 0.0f;
  for (int64_t i = 0; i < padded; ++i) {
    left[i] = std::exp(parts.total - parts.sums[i]);
    float *const wanted = of.wanted + i * columns, *const row = x + i * columns;
    const float part = left[i] * dot(wanted, parts.corrections + i * columns, columns);
    d_sums[i] -= part;
    of_left += part;
    for_each_vector(columns, [&](auto get, auto put) { put(row, fma(set1(left[i]), get(wanted), get(row))); });
  }
  const float through = parts.grown[kTokens - 1];
  const float of_end = of_left + through * dot(state, of.d_state, width * columns);

  // (I + A)^T X = dU, four rows at a time from the last.
  for (int64_t i = padded - 4; i >= 0; i -= 4) {
    float* const four = x + i * columns;
    if (i + 4 < padded)
      small_product(system + (i + 4) * kTokens + i, 1, kTokens, x + (i + 4) * columns, columns, 4, padded - i - 4,
                    columns, four, columns, 1.0f);
    for_each_vector(columns, [&](auto get, auto put) {
      Vec rows[4];
      for (int a = 3; a >= 0; --a) {
        rows[a] = get(four + a * columns);
        for (int b = 3; b > a; --b) rows[a] = fma(set1(system[(i + b) * kTokens + i + a]), rows[b], rows[a]);
        put(four + a * columns, rows[a]);
      }
    });
  }

  // What each pair of tokens gives: M and Z for the products of keys and queries, and for the sums and beta.
  transpose(parts.corrections, kTokens, columns, of.corrections_across, kTokens);
  small_product(of.incoming, columns, 1, of.corrections_across, kTokens, 2 * padded, columns, kTokens, of.pairs, kTokens,
                0.0f);
  alignas(64) float by_column[kTokens] = {};
  for (int64_t i = 0; i < padded; ++i) {
    std::fill(system + i * kTokens + i, system + (i + 1) * kTokens, 0.0f);
    float *const m = of.grams + i * kTokens, *const z = of.grams + (padded + i) * kTokens;
    Vec of_system = zero(), of_weights = zero();
    for (int64_t j = 0; j < kTokens; j += kLanes) {
      const Vec decay = exp(min(set1(0.0f), sub(set1(parts.sums[i]), load(parts.sums + j))));
      const Vec first = load(of.pairs + i * kTokens + j), second = load(of.pairs + (padded + i) * kTokens + j);
      store(m + j, mul(first, mul(set1(-parts.beta[i]), decay)));
      store(z + j, mul(second, decay));
      const Vec e = mul(first, load(system + i * kTokens + j)), p = mul(second, load(weights + i * kTokens + j));
      of_system = add(of_system, e);
      of_weights = add(of_weights, p);
      store(by_column + j, add(load(by_column + j), add(e, p)));
    }
    std::fill(m + i, m + kTokens, 0.0f);
    std::fill(z + i + 1, z + kTokens, 0.0f);
    d_beta[i] += sum(of_system);
    d_sums[i] += sum(of_system) + sum(of_weights);
  }

  // R, Y and dV; then what the gates of each token get.
  for (int64_t i = 0; i < padded; ++i) {
    float *const r_row = r + i * columns, *const y_row = y + i * columns, *const x_row = x + i * columns;
    const float* const found = parts.read + i * columns;
    const Vec back = set1(-parts.beta[i] * parts.grown[i]), grown = set1(parts.grown[i]);
    for_each_vector(columns, [&](auto get, auto put) {
      put(r_row, mul(back, get(x_row)));
      put(y_row, mul(grown, get(d_out + i * columns)));
    });
    d_sums[i] += dot(r_row, found, columns) - by_column[i] +
                 dot(d_out + i * columns, parts.read + (padded + i) * columns, columns);
    if (i >= count) continue;
    const float* const v = forward.v + (start + i) * forward.v_stride + head * columns;
    float* const d_v = op.d_v + ((start + i) * heads + head) * columns;
    for_each_vector(columns, [&](auto get, auto put) { put(d_v, mul(set1(parts.beta[i]), get(x_row))); });
    // Times beta, which is a factor of the derivative of the sigmoid: nothing is divided by it.
    d_beta[i] += parts.beta[i] * dot(x_row, v, columns) + dot(r_row, found, columns);
  }
  const float rate = -std::exp(forward.a_log[head]);
  float later = of_end;
  for (int64_t i = count - 1; i >= 0; --i) {
    later += d_sums[i];
    const int64_t at = (start + i) * heads + head;
    op.d_a[at] = later * rate / (1.0f + std::exp(-forward.a[at] - forward.dt_bias[head]));
    op.d_b[at] = (1.0f - parts.beta[i]) * d_beta[i];
  }

  // dK = (M + M^T) K + Z^T Q + R S^T + l U dS'^T and dQ = Z K + Y S^T.
  const float *const keys = parts.both, *const queries = parts.both + padded * width;
  float *const m = of.grams, *const z = of.grams + padded * kTokens;
  small_product(m, kTokens, 1, keys, width, 2 * padded, padded, width, of.both, width, 0.0f);
  small_product(m, 1, kTokens, keys, width, padded, padded, width, of.both, width, 1.0f);
  small_product(z, 1, kTokens, queries, width, padded, padded, width, of.both, width, 1.0f);
  transpose(state, width, columns, of.state_across, width);
  small_product(of.found, columns, 1, of.state_across, width, 2 * padded, columns, width, of.both, width, 1.0f);
  transpose(of.d_state, width, columns, of.d_state_across, width);
  for (int64_t i = 0; i < padded; ++i) {
    float* const row = parts.corrections + i * columns;
    for_each_vector(columns, [&](auto get, auto put) { put(row, mul(set1(left[i]), get(row))); });
  }
  small_product(parts.corrections, columns, 1, of.d_state_across, width, padded, columns, width, of.both, width, 1.0f);

  // Through the normalisation: of y = f x with f = s / |x|, dx = f dy - y (dy . y) f / s^2.
  const float scale_squared = 1.0f / static_cast<float>(width);
  const auto through_norm = [&](const float* d, const float* normed, float factor, float squared, float* to) {
    const Vec along = set1(-dot(d, normed, width) * factor / squared), f = set1(factor);
    for_each_vector(width, [&](auto get, auto put) {
      const Vec value = fma(get(normed), along, mul(f, get(d)));
      put(to, is_first ? value : add(value, get(to)));
    });
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = ((start + i) * forward.key_heads + key_head) * width;
    through_norm(of.both + i * width, keys + i * width, parts.key_factors[i], 1.0f, op.d_k + at);
    through_norm(of.both + (padded + i) * width, queries + i * width, parts.query_factors[i], scale_squared, op.d_q + at);
  }

  // dS = e_C dS' + K^T R + Q^T Y.
  small_product(parts.both, 1, width, of.found, columns, width, 2 * padded, columns, of.d_state, columns, through);
}

// One sequence, from no state, for the value heads of one key head.
void advance_gradient(const DeltaChunkGradient& op, int64_t sequence, int64_t key_head) {
  const DeltaChunk& forward = op.forward;
  const int64_t width = forward.key_width, columns = forward.value_width, size = width * columns;
  const int64_t begin = op.seq_starts[sequence], end = op.seq_starts[sequence + 1];
  const int64_t chunks = (end - begin + kChunkTokens - 1) / kChunkTokens;
  const int64_t repeats = forward.value_heads / forward.key_heads, first = key_head * repeats;
  thread_local std::vector<float> buffer;
  buffer.resize(ChunkParts::numbers(width, columns) + GradientParts::numbers(width, columns) + chunks * size);
  ChunkParts parts(buffer.data(), width, columns);
  GradientParts of(buffer.data() + ChunkParts::numbers(width, columns), width, columns);
  float* const states = of.d_state + size;  // before each chunk
  const auto count = [&](int64_t start) { return std::min(kChunkTokens, end - start); };
  for (int64_t head = first; head < first + repeats; ++head) {
    std::fill(states, states + (chunks > 0 ? size : 0), 0.0f);
    for (int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {
      const int64_t start = begin + chunk * kChunkTokens;
      solve_chunk(forward, states + chunk * size, head, start, count(start), false, parts);
      std::copy_n(states + chunk * size, size, states + (chunk + 1) * size);
      leave_chunk(parts, width, columns, states + (chunk + 1) * size);
    }
    std::fill(of.d_state, of.d_state + size, 0.0f);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t start = begin + chunk * kChunkTokens;
      chunk_gradient(op, states + chunk * size, head, start, count(start), head == first, parts, of);
    }
  }
}
