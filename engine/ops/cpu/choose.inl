// Scores of logits, for one instruction set (choose.cpp).

inline Vec score(const Scores& scores, Vec logits) {
  return scores.plain ? logits : div(sub(logits, set1(scores.peak)), set1(scores.temperature));
}

inline float score(const Scores& scores, float logit) {
  return scores.plain ? logit : (logit - scores.peak) / scores.temperature;
}

void weigh(const Scores& scores, const float* logits, int64_t count, float* largest, double* sums) {
  // Few sums each, so that little is lost in float; those of a block then enter sums in double.
  constexpr int kParts = 4;
  const Vec top = set1(scores.top());
  for (int64_t begin = 0; begin < count; begin += kScoreBlock, ++largest, ++sums) {
    const int64_t end = std::min(count, begin + kScoreBlock);
    Vec peaks = set1(-std::numeric_limits<float>::infinity()), parts[kParts];
    for (Vec& part : parts) part = zero();
    const auto take = [&](int64_t i, Vec& part) {
      const Vec s = score(scores, load(logits + i));
      peaks = max(s, peaks);
      part = add(part, exp(sub(s, top)));
    };
    int64_t i = begin;
    for (; i + kParts * kLanes <= end; i += kParts * kLanes)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) take(i + part * kLanes, parts[part]);
    for (; i + kLanes <= end; i += kLanes) take(i, parts[0]);
    float lanes[kLanes];
    store(lanes, peaks);
    float peak = *std::max_element(lanes, lanes + kLanes);
    double total = 0.0;
    for (const Vec& part : parts) total += sum(part);
    for (; i < end; ++i) {
      const float s = score(scores, logits[i]);
      peak = std::max(peak, s);
      total += std::exp(s - scores.top());
    }
    *largest = peak;
    *sums = total;
  }
}

int64_t collect(const Scores& scores, const float* logits, int64_t count, float lowest, int32_t first, float* found,
                int32_t* places) {
  int64_t kept = 0, i = 0;
  const Vec bound = set1(lowest);
  for (; i + kLanes <= count; i += kLanes) {
    const Vec s = score(scores, load(logits + i));
    unsigned lanes_kept = at_least(s, bound);
    if (lanes_kept == 0) continue;
    float lanes[kLanes];
    store(lanes, s);
    for (; lanes_kept != 0; lanes_kept &= lanes_kept - 1, ++kept) {
      const int lane = __builtin_ctz(lanes_kept);
      found[kept] = lanes[lane];
      places[kept] = first + static_cast<int32_t>(i) + lane;
    }
  }
  for (; i < count; ++i) {
    const float s = score(scores, logits[i]);
    if (!(s >= lowest)) continue;
    found[kept] = s;
    places[kept++] = first + static_cast<int32_t>(i);
  }
  return kept;
}

void exp_less(const float* x, int64_t count, float less, float* out) {
  for_each_vector(count, [&](auto read, auto write) { write(out, exp(sub(read(x), set1(less)))); });
}
