// Products of one row of x with weights of integers by integer arithmetic, for one instruction set.
//
// What is computed is that of gemm.h, without packing what is used once: x is rounded to int8, each group of 32 values
// with a scale of its own, and a group of a product is xs * scale * sum(u * xq) + offset * xs * sum(xq) for weights
// u * scale + offset, the zero point and the shift being in the offset. The sums of integers are exact; lanes add up
// floats, so the result is that of gemm.h but for the order in which they are rounded.

// One row of x. With `split`, the values of a group with even indices come first, as the lower halves of bytes have them.
void round_row(const float* x, int64_t inputs, bool split, int8_t* values, float* scales, float* sums) {
  for (int64_t group = 0; group < inputs / kRounded; ++group, x += kRounded, values += kRounded) {
    Vec peaks = zero();
    float check = 0.0f;
    for (int64_t i = 0; i < kRounded; i += kLanes) {
      const Vec v = load(x + i);
      peaks = max(peaks, max(v, sub(zero(), v)));
      check += sum(mul(v, zero()));  // NaN if any value is not finite
    }
    float lanes[kLanes], peak = 0.0f;
    store(lanes, peaks);
    for (float lane : lanes) peak = std::max(peak, lane);
    if (!(check == 0.0f)) {  // NaN
      std::memset(values, 0, kRounded);
      scales[group] = sums[group] = check;
      continue;
    }
    if (peak < 1e-30f) peak = 0.0f;  // 127 / peak would not be safely finite
    const Vec inverse = set1(peak == 0.0f ? 0.0f : 127.0f / peak);
    float rounded[kRounded];
    for (int64_t i = 0; i < kRounded; i += kLanes) store(rounded + i, round(mul(load(x + i), inverse)));
    int32_t total = 0;
    for (int64_t i = 0; i < kRounded; ++i) {
      const auto value = static_cast<int32_t>(rounded[i]);
      total += value;
      values[split ? i / 2 + i % 2 * (kRounded / 2) : i] = static_cast<int8_t>(value);
    }
    scales[group] = peak / 127.0f;
    sums[group] = scales[group] * static_cast<float>(total);
  }
}

// Weights of kBytes values at a time, as a dot product with int8 takes them.
struct Nibbles {
  static constexpr bool kSigned = false;
  static constexpr int64_t kGroupBytes = kRounded / 2;
  template <bool kHalf>
  static Bytes read(const char* row, int64_t at) {
    return kHalf ? unpack_half_nibbles(row + at / 2) : unpack_nibbles(row + at / 2);
  }
  static const char* row(const Weight& w, int64_t n, int64_t inputs) {
    return static_cast<const char*>(w.data) + n * (inputs / 2);
  }
};
struct SignedBytes {
  static constexpr bool kSigned = true;
  static constexpr int64_t kGroupBytes = kRounded;
  template <bool kHalf>
  static Bytes read(const char* row, int64_t at) {
    return kHalf ? load_half_bytes(row + at) : load_bytes(row + at);
  }
  static const char* row(const Weight& w, int64_t n, int64_t inputs) {
    return static_cast<const char*>(w.data) + n * inputs;
  }
};

constexpr int kVecGroups = kBytes / kRounded;
constexpr int kBlockGroups = 64;  // groups whose scales are read together

// The scales (or zeros, or offsets) of our groups [at, at + kLanes) of row n, of which `count` exist; 0 for the others.
// A weight's group may hold several of ours.
inline Vec read_grouped(const Weight& w, const void* from, int64_t n, int64_t groups, int64_t at, int64_t count) {
  const int64_t wide = w.group_size / kRounded, start = wide == groups ? n : n * (groups / wide);
  const auto* halves = static_cast<const uint16_t*>(from) + start;
  const auto* floats = static_cast<const float*>(from) + start;
  // What lies past a row's end is of the next row; past the last row there is nothing to read.
  if (wide == 1 && start + at + kLanes <= w.rows * groups) {
    const Vec read = w.half_scales != 0 ? load_half(halves + at) : load(floats + at);
    return count >= kLanes ? read : first_lanes(read, static_cast<int>(count));
  }
  const auto value = [&](int64_t group) { return w.half_scales != 0 ? _cvtsh_ss(halves[group]) : floats[group]; };
  if (wide == groups) {  // one for the row
    const Vec same = set1(value(0));
    return count >= kLanes ? same : first_lanes(same, static_cast<int>(count));
  }
  // One division for all lanes: for each of them they would cost more than the products.
  int64_t group = at / wide, left = (group + 1) * wide - at;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i, --left) {
    if (left == 0) ++group, left = wide;
    lanes[i] = value(group);
  }
  return load(lanes);
}

// Groups from `group` on, as many as a vector of bytes has, or half of them. The sums must stay in registers: only code
// that is unrolled may touch them.
template <typename Values, bool kHalf, int kWeights>
inline void add_groups(const char* const* rows, const int8_t* x, int64_t group, const float (*factors)[kBlockGroups],
                       int64_t in_block, Vec (&sums)[kWeights]) {
  const Bytes values = SignedBytes::read<kHalf>(reinterpret_cast<const char*>(x), group * kRounded);
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) {
    const Bytes w = Values::template read<kHalf>(rows[r], group * kRounded);
    const Vec products = Values::kSigned ? dot_signed(w, values) : dot_unsigned(w, values);
    sums[r] = fma(products, group_factors(factors[r] + in_block), sums[r]);
  }
}

// Whether kWeights rows from n on have a half-precision scale for each of our groups, as GGUF files do, and what a vector
// reads beyond them is there: then reading takes no division and no choice.
inline bool is_plain(const Weight& w, int64_t groups, int64_t n, int64_t count) {
  const int64_t beyond = (groups + kLanes - 1) / kLanes * kLanes - groups;
  return w.half_scales != 0 && w.zeros == nullptr && w.group_size == kRounded &&
         (n + count) * groups + beyond <= w.rows * groups;
}

// kWeights rows of W, from n on. kPlain: is_plain says so.
template <typename Values, int kWeights, bool kPlain>
inline void rounded_strip(const Weight& weight, int64_t inputs, int64_t n, const Rounded& x, float* y) {
  constexpr int64_t kStepBytes = kWeights * kVecGroups * Values::kGroupBytes;  // of W, of one step of the loop below
  const int64_t groups = inputs / kRounded;
  const float shift = static_cast<float>(Values::kSigned ? 0 : weight.shift);
  const bool has_offset = shift != 0.0f || weight.zeros != nullptr || weight.offsets != nullptr;
  const char* rows[kWeights];
  for (int r = 0; r < kWeights; ++r) rows[r] = Values::row(weight, n + r, inputs);
  const char* ahead = rows[0] + kStripsAhead * kWeights * groups * Values::kGroupBytes;
  Vec corrections[kWeights], sums[kWeights];
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) sums[r] = corrections[r] = zero();
  for (int64_t first = 0; first < groups; first += kBlockGroups) {
    const int64_t count = std::min<int64_t>(kBlockGroups, groups - first);
    alignas(64) float factors[kWeights][kBlockGroups];
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec scales = load(x.scales + first + i), x_sums = load(x.sums + first + i);
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) {
        const auto read = [&](const void* from) {
          if constexpr (!kPlain) return read_grouped(weight, from, n + r, groups, first + i, count - i);
          const Vec lanes = load_half(static_cast<const uint16_t*>(from) + (n + r) * groups + first + i);
          return count - i >= kLanes ? lanes : first_lanes(lanes, static_cast<int>(count - i));
        };
        const Vec s = read(weight.scales);
        store(factors[r] + i, mul(s, scales));
        if (!has_offset) continue;
        Vec zero_point = set1(shift);
        if (!kPlain && weight.zeros != nullptr) zero_point = add(zero_point, read(weight.zeros));
        Vec more = sub(zero(), mul(zero_point, s));
        if (weight.offsets != nullptr) more = add(more, read(weight.offsets));
        corrections[r] = fma(more, x_sums, corrections[r]);
      }
    }
    int64_t i = 0;
    for (; i + kVecGroups <= count; i += kVecGroups, ahead += kStepBytes) {
      for (int64_t line = 0; line < kStepBytes; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
      add_groups<Values, false>(rows, x.values, first + i, factors, i, sums);
    }
    if (i < count) add_groups<Values, true>(rows, x.values, first + i, factors, i, sums);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r) sums[r] = add(sums[r], corrections[r]);
  if constexpr (kWeights == 4) {
    sum_of_four(sums, y + n);
  } else {
    for (int r = 0; r < kWeights; ++r) y[n + r] = sum(sums[r]);
  }
}

template <typename Values>
void multiply_rounded_by(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const Rounded& x, float* y) {
  int64_t n = begin;
  const int64_t groups = inputs / kRounded;
  for (; n + 4 <= end && is_plain(weight, groups, n, 4); n += 4) rounded_strip<Values, 4, true>(weight, inputs, n, x, y);
  for (; n + 4 <= end; n += 4) rounded_strip<Values, 4, false>(weight, inputs, n, x, y);
  for (; n < end; ++n) rounded_strip<Values, 1, false>(weight, inputs, n, x, y);
}

void multiply_rounded(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const Rounded& x, float* y) {
  if (weight.storage == Storage::kInt4) return multiply_rounded_by<Nibbles>(weight, inputs, begin, end, x, y);
  return multiply_rounded_by<SignedBytes>(weight, inputs, begin, end, x, y);
}
