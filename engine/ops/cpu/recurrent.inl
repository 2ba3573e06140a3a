// One step of the recurrent layers, for one instruction set.

void convolve(const ConvStep& op, int64_t token, int64_t begin, int64_t end) {
  const int64_t carried = op.taps - 1;
  const float* x = op.x + token * op.channels;
  float* window = op.windows + op.slots[token] * carried * op.channels;
  float* out = op.out + token * op.channels;
  for (int64_t c = begin; c < end; ++c) {
    const float* taps = op.weight + c * op.taps;
    float y = x[c] * taps[carried];
    for (int64_t j = 0; j < carried; ++j) y += window[j * op.channels + c] * taps[j];
    out[c] = y;
  }
  for (int64_t j = 0; j < carried; ++j) {
    const float* next = j + 1 < carried ? window + (j + 1) * op.channels : x;
    std::copy(next + begin, next + end, window + j * op.channels + begin);
  }
  for_each_vector(end - begin, [&](auto read, auto write) {
    const Vec y = read(out + begin);
    write(out + begin, mul(y, sigmoid(y)));
  });
}

// Columns of the state that are taken through both passes at once: with a width of 128 rows they stay in the first cache.
constexpr int kStateVectors = 4;

// read(at) and write(at, v) over kVectors vectors of columns from `at`, or over a last part of one.
template <int kVectors, typename Read, typename Write>
inline void advance_columns(const DeltaStep& op, float* state, const float* q, const float* k, const float* v, float* out,
                            float decay, float beta, float along, Read read, Write write) {
  const int64_t stride = op.value_width;
  Vec predicted[kVectors], read_out[kVectors];
  for (int i = 0; i < kVectors; ++i) predicted[i] = read_out[i] = zero();
  for (int64_t row = 0; row < op.key_width; ++row) {
    const Vec k_ = set1(k[row]), q_ = set1(q[row]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Vec s = read(state + row * stride + i * kLanes);
      predicted[i] = fma(s, k_, predicted[i]);
      read_out[i] = fma(s, q_, read_out[i]);
    }
  }
  const Vec decays = set1(decay);
  for (int i = 0; i < kVectors; ++i) {
    const Vec correction = mul(set1(beta), sub(read(v + i * kLanes), mul(decays, predicted[i])));
    write(out + i * kLanes, fma(set1(along), correction, mul(decays, read_out[i])));
    predicted[i] = correction;
  }
  for (int64_t row = 0; row < op.key_width; ++row) {
    const Vec k_ = set1(k[row]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* at = state + row * stride + i * kLanes;
      write(at, fma(k_, predicted[i], mul(decays, read(at))));
    }
  }
}

void advance(const DeltaStep& op, int64_t token, int64_t head) {
  const int64_t width = op.key_width, columns = op.value_width, key_head = head / (op.value_heads / op.key_heads);
  thread_local std::vector<float> buffer;
  buffer.resize(2 * width);
  float *q = buffer.data(), *k = q + width;
  const auto normalized = [&](const float* from, float scale, float* to) {
    const Vec factor = set1(scale / std::sqrt(dot(from, from, width) + op.eps));
    for_each_vector(width, [&](auto read, auto write) { write(to, mul(read(from), factor)); });
  };
  normalized(op.q + token * op.q_stride + key_head * width, 1.0f / std::sqrt(static_cast<float>(width)), q);
  normalized(op.k + token * op.k_stride + key_head * width, 1.0f, k);
  const float a = op.a[token * op.value_heads + head] + op.dt_bias[head];
  const float softplus = a > 20.0f ? a : std::log1p(std::exp(a));
  const float decay = std::exp(-std::exp(op.a_log[head]) * softplus);
  const float beta = 1.0f / (1.0f + std::exp(-op.b[token * op.value_heads + head]));
  const float along = dot(q, k, width);
  const float* v = op.v + token * op.v_stride + head * columns;
  float* out = op.out + (token * op.value_heads + head) * columns;
  float* state = op.states + (op.slots[token] * op.value_heads + head) * width * columns;
  const auto read = [&](const float* from) { return load(from); };
  const auto write = [&](float* to, Vec value) { store(to, value); };
  int64_t at = 0;
  for (; at + kStateVectors * kLanes <= columns; at += kStateVectors * kLanes)
    advance_columns<kStateVectors>(op, state + at, q, k, v + at, out + at, decay, beta, along, read, write);
  for (; at + kLanes <= columns; at += kLanes)
    advance_columns<1>(op, state + at, q, k, v + at, out + at, decay, beta, along, read, write);
  if (const int64_t left = columns - at; left > 0)
    advance_columns<1>(
        op, state + at, q, k, v + at, out + at, decay, beta, along,
        [left](const float* from) { return load_part(from, left); },
        [left](float* to, Vec value) { store_part(to, value, left); });
}
