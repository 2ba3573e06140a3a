// How likely rows of logits find some tokens, for one instruction set.

// Vectors whose exponentials are summed in float before the sum enters that of the row.
constexpr int64_t kSummed = 64;

// log(sum(exp(logits))) - logits[target]. In one pass over a row that the caches hold and nothing is written.
void score_rows(const TokenLikelihood& op, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* const logits = op.logits + row * op.stride;
    const int64_t whole = op.width / kLanes * kLanes;
    float peak = -std::numeric_limits<float>::infinity(), lanes[kLanes];
    Vec peaks = set1(peak);
    for (int64_t i = 0; i < whole; i += kLanes) peaks = max(peaks, load(logits + i));
    store(lanes, peaks);
    for (float lane : lanes) peak = std::max(peak, lane);
    for (int64_t i = whole; i < op.width; ++i) peak = std::max(peak, logits[i]);
    // The largest may have been passed over where there is a NaN; the sum is NaN then.
    const Vec level = set1(peak);
    double total = 0.0;
    for (int64_t first = 0; first < whole; first += kSummed * kLanes) {
      Vec part = zero();
      for (int64_t i = first; i < std::min(whole, first + kSummed * kLanes); i += kLanes)
        part = add(part, exp(sub(load(logits + i), level)));
      total += sum(part);
    }
    for (int64_t i = whole; i < op.width; ++i) total += std::exp(logits[i] - peak);
    op.out[row] = std::log(total) + (static_cast<double>(peak) - logits[op.targets[row]]);
  }
}

// Numbers of a row that are looked at together; that which is the largest is looked for in the part that has it alone.
constexpr int64_t kSearched = 32 * kLanes;

void find_largest(const float* x, int64_t count, int64_t* place, float* value) {
  const float most = std::numeric_limits<float>::max();
  float peak = x[0];
  int64_t part = 0;
  Vec checks = zero();
  for (int64_t begin = 0; begin < count; begin += kSearched) {
    const float* const from = x + begin;
    Vec peaks = set1(from[0]);
    float lanes[kLanes];
    const int64_t some = std::min(kSearched, count - begin), whole = some / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec v = load(from + i);
      peaks = max(v, peaks);
      checks = fma(max(set1(-most), min(set1(most), v)), zero(), checks);  // NaN if there is one, and not if infinite
    }
    store(lanes, peaks);
    float here = from[0];
    for (const float lane : lanes) here = std::max(here, lane);
    for (int64_t i = whole; i < some; ++i) {
      here = std::max(here, from[i]);
      if (std::isnan(from[i])) checks = set1(from[i]);
    }
    if (here > peak) peak = here, part = begin;
  }
  *value = std::isnan(sum(checks)) ? std::numeric_limits<float>::quiet_NaN() : peak;
  *place = part;
  while (*place < count - 1 && x[*place] != peak) ++*place;
}
