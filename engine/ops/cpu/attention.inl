// Attention of one new token over the blocks of its sequence, for one instruction set.

void attend(const Attention& op, int64_t token, int64_t kv_head, int64_t begin, int64_t end, float* peaks, float* sums,
            float* weighted) {
  const int64_t width = op.width, queries = op.heads / op.kv_heads, count = end - begin;
  const float* q = op.q + (token * op.heads + kv_head * queries) * width;
  const int32_t* table = op.tables + token * op.table_stride;
  thread_local std::vector<int64_t> places;
  thread_local std::vector<float> scores;
  places.resize(count);
  scores.resize(queries * count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = begin + i;
    places[i] = ((table[at / op.block_size] * op.block_size + at % op.block_size) * op.kv_heads + kv_head) * width;
  }
  // Four tokens at a time, here and below: what they share is loaded, and sums are stored, a quarter as often.
  int64_t at = 0;
  for (; at + 4 <= count; at += 4) {
    const float* keys[4];
    for (int j = 0; j < 4; ++j) keys[j] = op.keys + places[at + j];
    for (int64_t g = 0; g < queries; ++g) {
      Vec products[4] = {zero(), zero(), zero(), zero()};
      for_each_vector(width, [&](auto read, auto) {
        const Vec query = read(q + g * width);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) products[j] = fma(query, read(keys[j]), products[j]);
      });
      sum_of_four(products, scores.data() + g * count + at);
    }
  }
  for (; at < count; ++at)
    for (int64_t g = 0; g < queries; ++g)
      scores[g * count + at] = dot(q + g * width, op.keys + places[at], width);
  for (int64_t g = 0; g < queries; ++g) {
    float* row = scores.data() + g * count;
    for_each_vector(count, [&](auto read, auto write) { write(row, mul(read(row), set1(op.scale))); });
    float peak = row[0];
    for (int64_t i = 1; i < count; ++i) peak = std::max(peak, row[i]);
    for_each_vector(count, [&](auto read, auto write) { write(row, exp(sub(read(row), set1(peak)))); });
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += row[i];
    peaks[g] = peak;
    sums[g] = total;
  }
  std::fill(weighted, weighted + queries * width, 0.0f);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* values[4];
    for (int j = 0; j < 4; ++j) values[j] = op.values + places[i + j];
    for (int64_t g = 0; g < queries; ++g) {
      const float* p = scores.data() + g * count + i;
      float* out = weighted + g * width;
      for_each_vector(width, [&](auto read, auto write) {
        Vec y = read(out);
        for (int j = 0; j < 4; ++j) y = fma(set1(p[j]), read(values[j]), y);
        write(out, y);
      });
    }
  }
  for (; i < count; ++i) {
    const float* value = op.values + places[i];
    for (int64_t g = 0; g < queries; ++g) {
      const Vec p = set1(scores[g * count + i]);
      float* out = weighted + g * width;
      for_each_vector(width, [&](auto read, auto write) { write(out, fma(p, read(value), read(out))); });
    }
  }
}
