// The kernel of one instruction set. Included by rows_avx2.cpp and rows_avx512.cpp, which define the vector type:
// `Vec`, kLanes, zero, load, load_bf16, load_int8, set1, add, sub, fma, store, sum; and `unpack_int4`, which widens 16 bytes to 32 values.

namespace {

// Widens the weights [at, at + kStep) of a row to float vectors. One specialisation per storage.
template <Storage kStorage>
struct Widen;

template <>
struct Widen<Storage::kFloat32> {
  static constexpr int64_t kStep = 2 * kLanes;
  const float* row;
  Widen(const Weight& w, int64_t n, int64_t inputs) : row(static_cast<const float*>(w.data) + n * inputs) {}
  void group(int64_t) {}
  void operator()(int64_t at, Vec* out) const {
    out[0] = load(row + at);
    out[1] = load(row + at + kLanes);
  }
  float scalar(int64_t at) const { return row[at]; }
};

template <>
struct Widen<Storage::kBfloat16> {
  static constexpr int64_t kStep = 2 * kLanes;
  const uint16_t* row;
  Widen(const Weight& w, int64_t n, int64_t inputs) : row(static_cast<const uint16_t*>(w.data) + n * inputs) {}
  void group(int64_t) {}
  void operator()(int64_t at, Vec* out) const {
    out[0] = load_bf16(row + at);
    out[1] = load_bf16(row + at + kLanes);
  }
  float scalar(int64_t at) const {
    const uint32_t bits = static_cast<uint32_t>(row[at]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

// Scale, zero point and offset of the present group.
struct Affine {
  const void* scales;
  const void* zeros;
  const void* offsets;
  bool half;
  Vec scale, zero_point, offset;
  Affine(const Weight& w, int64_t n, int64_t inputs) : half(w.half_scales != 0) {
    const int64_t at = n * (inputs / w.group_size) * (half ? 2 : 4);
    const auto row = [at](const void* from) { return from == nullptr ? from : static_cast<const char*>(from) + at; };
    scales = row(w.scales);
    zeros = row(w.zeros);
    offsets = row(w.offsets);
    offset = zero();
  }
  Vec one(const void* from, int64_t index) const {
    return set1(half ? _cvtsh_ss(static_cast<const uint16_t*>(from)[index]) : static_cast<const float*>(from)[index]);
  }
  void group(int64_t index) {
    scale = one(scales, index);
    if (zeros != nullptr) zero_point = one(zeros, index);
    if (offsets != nullptr) offset = one(offsets, index);
  }
  Vec value(Vec q) const {
    if (zeros != nullptr) q = sub(q, zero_point);
    return fma(q, scale, offset);
  }
};

template <>
struct Widen<Storage::kInt8> : Affine {
  static constexpr int64_t kStep = 16;
  const int8_t* row;
  Widen(const Weight& w, int64_t n, int64_t inputs)
      : Affine(w, n, inputs), row(static_cast<const int8_t*>(w.data) + n * inputs) {}
  void operator()(int64_t at, Vec* out) const {
    for (int i = 0; i < 16 / kLanes; ++i) out[i] = value(load_int8(row + at + i * kLanes));
  }
};

template <>
struct Widen<Storage::kInt4> : Affine {
  static constexpr int64_t kStep = 32;
  const uint8_t* row;
  Widen(const Weight& w, int64_t n, int64_t inputs)
      : Affine(w, n, inputs), row(static_cast<const uint8_t*>(w.data) + n * (inputs / 2)) {}
  void operator()(int64_t at, Vec* out) const {
    unpack_int4(row + at / 2, out);
    for (int i = 0; i < 32 / kLanes; ++i) out[i] = value(out[i]);
  }
};

// One row of W times kRows rows of x.
template <Storage kStorage, int kRows>
inline void dot(Widen<kStorage>& widen, int64_t inputs, int64_t group_size, const float* x, int64_t ldx, float* y,
                int64_t ldy) {
  using W = Widen<kStorage>;
  constexpr int kVecs = W::kStep / kLanes;
  // Two sums a row, so that one product need not wait for the one before it; however many rows there are, so that a
  // row's result does not depend on what it shares the call with.
  constexpr int kSums = kVecs >= 2 ? 2 : 1;
  Vec sums[kRows][kSums];
  for (int m = 0; m < kRows; ++m)
    for (int s = 0; s < kSums; ++s) sums[m][s] = zero();
  int64_t group = 0;
  for (int64_t start = 0; start < inputs; start += group_size, ++group) {
    widen.group(group);
    const int64_t end = start + group_size;
    int64_t k = start;
    for (; k + W::kStep <= end; k += W::kStep) {
      Vec w[kVecs];
      widen(k, w);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i)
          sums[m][i % kSums] = fma(w[i], load(x + m * ldx + k + i * kLanes), sums[m][i % kSums]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    Vec total = sums[m][0];
    for (int s = 1; s < kSums; ++s) total = add(total, sums[m][s]);
    y[m * ldy] = sum(total);
  }
}

template <Storage kStorage>
void multiply(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
              int64_t rows, float* y, int64_t ldy) {
  constexpr bool kFloats = kStorage == Storage::kFloat32 || kStorage == Storage::kBfloat16;
  // Floats have no groups: whole vectors are one group, and what is left of the row is added by hand.
  const int64_t whole = kFloats ? inputs / Widen<kStorage>::kStep * Widen<kStorage>::kStep : inputs;
  const int64_t group_size = kFloats ? (whole == 0 ? 1 : whole) : weight.group_size;
  for (int64_t n = begin; n < end; ++n) {
    Widen<kStorage> widen(weight, n, inputs);
    int64_t m = 0;
    for (; m + 8 <= rows && kWideTiles; m += 8)
      dot<kStorage, 8>(widen, whole, group_size, x + m * ldx, ldx, y + m * ldy + n, ldy);
    for (; m + 4 <= rows; m += 4)
      dot<kStorage, 4>(widen, whole, group_size, x + m * ldx, ldx, y + m * ldy + n, ldy);
    for (; m + 2 <= rows; m += 2)
      dot<kStorage, 2>(widen, whole, group_size, x + m * ldx, ldx, y + m * ldy + n, ldy);
    for (; m < rows; ++m) dot<kStorage, 1>(widen, whole, group_size, x + m * ldx, ldx, y + m * ldy + n, ldy);
    if constexpr (kFloats) {
      for (int64_t k = whole; k < inputs; ++k)
        for (int64_t r = 0; r < rows; ++r) y[r * ldy + n] += widen.scalar(k) * x[r * ldx + k];
    }
  }
}

template <Storage kStorage>
void widen_all(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  using W = Widen<kStorage>;
  for (int64_t n = begin; n < end; ++n, out += inputs) {
    W widen(weight, n, inputs);
    for (int64_t start = 0, group = 0; start < inputs; start += weight.group_size, ++group) {
      widen.group(group);
      for (int64_t k = start; k < start + weight.group_size; k += W::kStep) {
        Vec w[W::kStep / kLanes];
        widen(k, w);
        for (int i = 0; i < W::kStep / kLanes; ++i) store(out + k + i * kLanes, w[i]);
      }
    }
  }
}

}  // namespace

void widen_rows(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  if (weight.storage == Storage::kInt8) return widen_all<Storage::kInt8>(weight, inputs, begin, end, out);
  if (weight.storage == Storage::kInt4) return widen_all<Storage::kInt4>(weight, inputs, begin, end, out);
}

void multiply_rows(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                   int64_t rows, float* y, int64_t ldy) {
  switch (weight.storage) {
    case Storage::kFloat32: return multiply<Storage::kFloat32>(weight, inputs, begin, end, x, ldx, rows, y, ldy);
    case Storage::kBfloat16: return multiply<Storage::kBfloat16>(weight, inputs, begin, end, x, ldx, rows, y, ldy);
    case Storage::kInt8: return multiply<Storage::kInt8>(weight, inputs, begin, end, x, ldx, rows, y, ldy);
    case Storage::kInt4: return multiply<Storage::kInt4>(weight, inputs, begin, end, x, ldx, rows, y, ldy);
  }
}
