// Attention of short sequences that see all of themselves, for one instruction set; after panels.inl, whose products of
// packed rows and panels it is made of. All scores of some queries are there before their softmax is taken.

// Keys become panels [D][kPanel] of kPanel rows each; rows past the last repeat it.
inline void pack_keys(const float* k, int64_t stride, int64_t count, int64_t width, float* panels) {
  const float* rows[8];
  for (int64_t c = 0; c < ceil_to(count, kPanel); c += 8) {
    for (int j = 0; j < 8; ++j) rows[j] = k + std::min(c + j, count - 1) * stride;
    float* const out = panels + c / kPanel * width * kPanel + c % kPanel;
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) transpose_eight(rows, d, out + d * kPanel, kPanel);
    for (; d < width; ++d)
      for (int j = 0; j < 8; ++j) out[d * kPanel + j] = rows[j][d];
  }
}

// Values become panels [count][kPanel] of kPanel of their columns each; in a vector that has columns, those past the
// last are 0.
inline void pack_values(const float* v, int64_t stride, int64_t count, int64_t width, float* panels) {
  for (int64_t d = 0; d < width; d += kLanes) {
    float* const out = panels + d / kPanel * count * kPanel + d % kPanel;
    const int64_t there = std::min<int64_t>(kLanes, width - d);
    for (int64_t row = 0; row < count; ++row) {
      const float* const from = v + row * stride + d;
      store(out + row * kPanel, there == kLanes ? load(from) : load_part(from, there));
    }
  }
}

// The first `count` of `padded` scores become exp(scale * (score - largest)), the others, which repeat the last of them,
// 0. Returns their sum.
inline float soften_whole(float* scores, int64_t count, int64_t padded, float scale) {
  Vec peaks = load(scores), total = zero();
  for (int64_t c = kLanes; c < padded; c += kLanes) peaks = max(peaks, load(scores + c));
  float lanes[kLanes], peak = -std::numeric_limits<float>::infinity();
  store(lanes, peaks);
  for (float lane : lanes) peak = std::max(peak, lane);
  const Vec level = set1(peak), factor = set1(scale);
  for (int64_t c = 0; c < padded; c += kLanes) store(scores + c, exp(mul(sub(load(scores + c), level), factor)));
  std::fill(scores + count, scores + padded, 0.0f);
  for (int64_t c = 0; c < padded; c += kLanes) total = add(total, load(scores + c));
  return sum(total);
}

void attend_whole(const WholeAttention& op, int64_t start, int64_t count, int64_t head) {
  const int64_t width = op.width, stride = op.heads * width, at = start * stride + head * width;
  const int64_t keys = ceil_to(count, kPanel), columns = ceil_to(width, kPanel);
  // pack_rows stores some numbers past its end.
  const int64_t tile = ceil_to(std::max(count, width) * kPanelRows + 16, 16), block = kPanelRows * std::max(keys, columns);
  thread_local std::vector<float> memory;
  if (const size_t needed = keys * width + count * columns + tile + 2 * block + 16; memory.size() < needed)
    memory.resize(needed);
  float* const key_panels = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16) % 16;
  float* const value_panels = key_panels + ceil_to(keys * width, 16);
  float *const packed = value_panels + count * columns, *const scores = packed + tile, *const sums = scores + block;
  pack_keys(op.k + at, stride, count, width, key_panels);
  pack_values(op.v + at, stride, count, width, value_panels);
  for (int64_t first = 0; first < count; first += kPanelRows) {
    const int64_t rows = std::min<int64_t>(kPanelRows, count - first);
    const MultiplyPanel kernel = panel_kernel(rows, std::make_integer_sequence<int, kPanelRows>());
    pack_rows(op.q + at + first * stride, stride, rows, width, packed);
    for (int64_t c = 0; c < keys; c += kPanel)
      kernel(packed, key_panels + c * width, width, nullptr, 0, scores + c, keys);
    float inverses[kPanelRows];
    for (int64_t row = 0; row < rows; ++row)
      inverses[row] = 1.0f / soften_whole(scores + row * keys, count, keys, op.scale);
    pack_rows(scores, keys, rows, count, packed);
    for (int64_t c = 0; c < columns; c += kPanel)
      kernel(packed, value_panels + c * count, count, nullptr, 0, sums + c, columns);
    for (int64_t row = 0; row < rows; ++row) {
      const Vec inverse = set1(inverses[row]);
      const float* const from = sums + row * columns;
      float* const to = op.out + at + (first + row) * stride;
      for_each_vector(width, [&](auto read, auto write) { write(to, mul(read(from), inverse)); });
    }
  }
}
