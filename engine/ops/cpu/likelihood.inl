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
