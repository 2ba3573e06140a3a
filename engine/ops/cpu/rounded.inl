// Products of a few rows of x with weights of integers by integer arithmetic, for one instruction set. Two are multiplied
// together, so that weights are unpacked once for both.
//
// What is computed is that of gemm.h, without packing what is used once: x is rounded to int8, each group of 32 values
// with a scale of its own, and a group of a product is xs * scale * sum(u * xq) + offset * xs * sum(xq) for weights
// u * scale + offset, the zero point and the shift being in the offset. The sums of integers are exact; lanes add up
// floats, so the result is that of gemm.h but for the order in which they are rounded.

// Where value i of a group lies in vectors of nibbles' partners: those with even indices of some groups fill one vector,
// those with odd indices the next, as the lower and the upper halves of bytes come apart.
constexpr int64_t kNibbleGroups = kBytes / (kRounded / 2);
inline int8_t* split_place(int8_t* values, int64_t group) {
  return values + group / kNibbleGroups * 2 * kBytes + group % kNibbleGroups * (kRounded / 2);
}

// One row of x. With `split`, in the order that nibbles want.
void round_row(const float* x, int64_t inputs, bool split, int8_t* values, float* scales, float* sums) {
  for (int64_t group = 0; group < inputs / kRounded; ++group, x += kRounded) {
    int8_t* const first = split ? split_place(values, group) : values + group * kRounded;
    int8_t* const second = split ? first + kBytes : first + kRounded / 2;
    Vec peaks = zero(), checks = zero();
    for (int64_t i = 0; i < kRounded; i += kLanes) {
      const Vec v = load(x + i);
      peaks = max(peaks, max(v, sub(zero(), v)));
      checks = fma(v, zero(), checks);  // NaN if any value is not finite
    }
    float lanes[kLanes], peak = 0.0f;
    store(lanes, peaks);
    for (float lane : lanes) peak = std::max(peak, lane);
    if (const float check = sum(checks); !(check == 0.0f)) {  // NaN
      std::memset(first, 0, kRounded / 2);
      std::memset(second, 0, kRounded / 2);
      scales[group] = sums[group] = check;
      continue;
    }
    if (peak < 1e-30f) peak = 0.0f;  // 127 / peak would not be safely finite
    const Vec inverse = set1(peak == 0.0f ? 0.0f : 127.0f / peak);
    alignas(64) float rounded[kRounded];
    Vec total = zero();  // of integers: exact
    for (int64_t i = 0; i < kRounded; i += kLanes) {
      const Vec v = round(mul(load(x + i), inverse));
      total = add(total, v);
      store(rounded + i, v);
    }
    store_bytes(rounded, split, first, second);
    scales[group] = peak / 127.0f;
    sums[group] = scales[group] * sum(total);
  }
}

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

// What lies past a row's end meets zeros of x: it only has to be there.
template <bool kPlain>
inline Bytes load_before(const char* from, const char* end) {
  if (kPlain || from + kBytes <= end) return load_bytes(from);
  alignas(64) char buffer[kBytes] = {};
  std::memcpy(buffer, from, end - from);
  return load_bytes(buffer);
}

// How the values of a group lie in memory; the products of kLanes groups, or of the `count` that are left, each times its
// factor. What is added to stays in registers: only code without choices touches it.
struct Nibbles {
  static constexpr bool kShifted = true;
  static constexpr int64_t kGroupBytes = kRounded / 2;
  template <int kRows>
  static inline void add_block(const char* row, const int8_t* const* x, const Vec* factors, Vec* even, Vec*) {
    Bytes products[kRows][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Bytes w = load_bytes(row + i * kBytes);
#pragma GCC unroll 2
      for (int m = 0; m < kRows; ++m) products[m][i] = multiply_nibbles(w, x[m] + 2 * i * kBytes);
    }
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) even[m] = fma(sums_of_groups(products[m]), factors[m], even[m]);
  }
  template <bool kPlain>
  static inline Vec rest(const char* row, const int8_t* x, int64_t count, Vec factors, const char* end) {
    Vec total = zero();
    for (int64_t i = 0; i < count; i += kNibbleGroups) {
      const Bytes products = multiply_nibbles(load_before<kPlain>(row + i * kGroupBytes, end), x + i * kRounded);
      total = fma(sums_of_four(products), factors_of_nibbles(factors, i), total);
    }
    return total;
  }
};
struct SignedBytes {
  static constexpr bool kShifted = false;
  static constexpr int64_t kGroupBytes = kRounded;
  static constexpr int64_t kGroups = kBytes / kRounded;
  static inline Vec dot(Bytes w, const int8_t* x) { return dot_signed(w, load_bytes(reinterpret_cast<const char*>(x))); }
  template <int kRows>
  static inline void add_block(const char* row, const int8_t* const* x, const Vec* factors, Vec* even, Vec* odd) {
    alignas(64) float numbers[kRows][kLanes];
#pragma GCC unroll 2
    for (int m = 0; m < kRows; ++m) store(numbers[m], factors[m]);
    const float* each = numbers[0];
    asm("" : "+r"(each));  // one register: GCC would keep the address of each factor in one of its own, and lack some
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLanes; i += 2 * kGroups) {
      const int64_t j = i + kGroups;
      const Bytes first = load_bytes(row + i * kRounded), second = load_bytes(row + j * kRounded);
#pragma GCC unroll 2
      for (int m = 0; m < kRows; ++m) {
        const float* const factor = each + m * kLanes;
        even[m] = fma(dot(first, x[m] + i * kRounded), group_factors(factor + i), even[m]);
        odd[m] = fma(dot(second, x[m] + j * kRounded), group_factors(factor + j), odd[m]);
      }
    }
  }
  template <bool kPlain>
  static inline Vec rest(const char* row, const int8_t* x, int64_t count, Vec factors, const char* end) {
    alignas(64) float each[kLanes];
    store(each, factors);
    Vec total = zero();
    for (int64_t i = 0; i < count; i += kGroups)
      total = fma(dot(load_before<kPlain>(row + i * kRounded, end), x + i * kRounded), group_factors(each + i), total);
    return total;
  }
};

// Whether rows up to `end` have a half-precision scale for each of our groups, as GGUF files do, and what a vector reads
// beyond them is there: then reading takes no division and no choice.
inline bool is_plain(const Weight& w, int64_t groups, int64_t end) {
  const int64_t beyond = (groups + kLanes - 1) / kLanes * kLanes - groups;  // of values, no vector reads as many
  return w.half_scales != 0 && w.zeros == nullptr && w.group_size == kRounded &&
         end * groups + beyond <= w.rows * groups;
}

// Bytes between what is multiplied and what is fetched: what a core multiplies in the time that memory takes to answer.
// Rows are read one after the other, so that prefetchers of the hardware see one stream.
constexpr int64_t kBytesAhead = 4096;

// Row n of W times kRows rows of x, up to adding the lanes: totals[kRows]. What comes of a row of x does not depend on
// the other. kPlain: is_plain says so.
template <typename Values, bool kPlain, int kRows>
inline void multiply_row(const Weight& weight, int64_t groups, int64_t n, const Rounded* x, Vec* totals) {
  const char* row = static_cast<const char*>(weight.data) + n * groups * Values::kGroupBytes;
  const uint16_t* scales = static_cast<const uint16_t*>(weight.scales) + n * groups;
  const uint16_t* offsets = static_cast<const uint16_t*>(weight.offsets) + n * groups;
  const int32_t shift = Values::kShifted ? weight.shift : 0;
  const bool has_offsets = weight.offsets != nullptr, has_zeros = shift != 0 || weight.zeros != nullptr;
  const int8_t* values[kRows];
  Vec even[kRows], odd[kRows], correction[kRows], factors[kRows];
  for (int m = 0; m < kRows; ++m) {
    values[m] = x[m].values;
    even[m] = odd[m] = correction[m] = zero();
  }
  // Has the factors of the next groups ready, and their part of the correction added.
  const auto take_factors = [&](int64_t first, int64_t count) __attribute__((always_inline)) {
    const auto read = [&](const uint16_t* plain, const void* from) __attribute__((always_inline)) {
      if constexpr (!kPlain) return read_grouped(weight, from, n, groups, first, count);
      return count >= kLanes ? load_half(plain) : first_lanes(load_half(plain), static_cast<int>(count));
    };
    const Vec s = read(scales, weight.scales);
    if (has_zeros) {
      Vec zero_point = set1(static_cast<float>(shift));
      if (!kPlain && weight.zeros != nullptr) zero_point = add(zero_point, read(nullptr, weight.zeros));
      const Vec less = sub(zero(), mul(zero_point, s));
      for (int m = 0; m < kRows; ++m) correction[m] = fma(less, load(x[m].sums + first), correction[m]);
    }
    if (has_offsets) {
      const Vec offset = read(offsets, weight.offsets);
      for (int m = 0; m < kRows; ++m) correction[m] = fma(offset, load(x[m].sums + first), correction[m]);
    }
    for (int m = 0; m < kRows; ++m) factors[m] = mul(s, load(x[m].scales + first));
  };
  constexpr int64_t kBlock = kLanes * Values::kGroupBytes;
  int64_t first = 0;
  for (; first + kLanes <= groups; first += kLanes) {
    for (int64_t line = 0; line < kBlock; line += 64) _mm_prefetch(row + kBytesAhead + line, _MM_HINT_T0);
    take_factors(first, kLanes);
    Values::template add_block<kRows>(row, values, factors, even, odd);
    row += kBlock, scales += kLanes, offsets += kLanes;
    for (int m = 0; m < kRows; ++m) values[m] += kLanes * kRounded;
  }
  if (const int64_t count = groups - first; count > 0) {
    _mm_prefetch(row + kBytesAhead, _MM_HINT_T0);
    const char* const end = static_cast<const char*>(weight.data) + weight.rows * groups * Values::kGroupBytes;
    take_factors(first, count);
    for (int m = 0; m < kRows; ++m)
      odd[m] = add(odd[m], Values::template rest<kPlain>(row, values[m], count, factors[m], end));
  }
  for (int m = 0; m < kRows; ++m) totals[m] = add(add(even[m], odd[m]), correction[m]);
}

template <typename Values, bool kPlain, int kRows>
inline void multiply_four(const Weight& weight, int64_t groups, int64_t n, const Rounded* x, float* y, int64_t ldy) {
  Vec sums[kRows][4];
#pragma GCC unroll 1
  for (int r = 0; r < 4; ++r) {
    Vec totals[kRows];
    multiply_row<Values, kPlain, kRows>(weight, groups, n + r, x, totals);
    for (int m = 0; m < kRows; ++m) sums[m][r] = totals[m];
  }
  for (int m = 0; m < kRows; ++m) sum_of_four(sums[m], y + m * ldy + n);
}

template <typename Values, int kRows>
void multiply_rounded_by(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const Rounded* x, float* y,
                         int64_t ldy) {
  int64_t n = begin;
  const int64_t groups = inputs / kRounded;
  for (; n + 4 <= end && is_plain(weight, groups, n + 4); n += 4)
    multiply_four<Values, true, kRows>(weight, groups, n, x, y, ldy);
  for (; n + 4 <= end; n += 4) multiply_four<Values, false, kRows>(weight, groups, n, x, y, ldy);
  for (; n < end; ++n) {
    Vec totals[kRows];
    multiply_row<Values, false, kRows>(weight, groups, n, x, totals);
    for (int m = 0; m < kRows; ++m) y[m * ldy + n] = sum(totals[m]);
  }
}

void multiply_rounded(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const Rounded* x, int64_t rows,
                      float* y, int64_t ldy) {
  const auto by = [&](auto values) {
    using Values = decltype(values);
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) multiply_rounded_by<Values, 2>(weight, inputs, begin, end, x + m, y + m * ldy, ldy);
    if (m < rows) multiply_rounded_by<Values, 1>(weight, inputs, begin, end, x + m, y + m * ldy, ldy);
  };
  if (weight.storage == Storage::kInt4) return by(Nibbles{});
  by(SignedBytes{});
}
