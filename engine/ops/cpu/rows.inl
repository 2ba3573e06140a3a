// Products of rows, for one instruction set: included by avx2.cpp and avx512.cpp, in the namespace that has the vector
// type: `Vec`, kLanes, kTileRows, zero, load, load_bf16, load_half, load_int8, set1, add, sub, fma, store, sum; and `unpack_int4`,
// which widens 16 bytes to 32 values.

// Widens the weights [at, at + kStep) of a row to float vectors. One specialisation per storage.
template <Storage kStorage>
struct Widen;

template <>
struct Widen<Storage::kFloat32> {
  static constexpr int64_t kStep = 2 * kLanes;
  const float* row;
  Widen() = default;
  Widen(const Weight& w, int64_t n, int64_t inputs) : row(static_cast<const float*>(w.data) + n * inputs) {}
  void operator()(int64_t at, Vec* out) const {
    out[0] = load(row + at);
    out[1] = load(row + at + kLanes);
  }
  float scalar(int64_t at) const { return row[at]; }
  const void* address(int64_t at) const { return row + at; }
};

// Floats of 16 bits, each the rounding of some float32 that widening gives back.
template <Storage kStorage>
struct WidenHalf {
  static constexpr int64_t kStep = 2 * kLanes;
  const uint16_t* row;
  WidenHalf() = default;
  WidenHalf(const Weight& w, int64_t n, int64_t inputs) : row(static_cast<const uint16_t*>(w.data) + n * inputs) {}
  static Vec read(const uint16_t* from) {
    if constexpr (kStorage == Storage::kFloat16) return load_half(from);
    return load_bf16(from);
  }
  void operator()(int64_t at, Vec* out) const {
    out[0] = read(row + at);
    out[1] = read(row + at + kLanes);
  }
  float scalar(int64_t at) const {
    if constexpr (kStorage == Storage::kFloat16) return _cvtsh_ss(row[at]);
    const uint32_t bits = static_cast<uint32_t>(row[at]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
  const void* address(int64_t at) const { return row + at; }
};

template <>
struct Widen<Storage::kBfloat16> : WidenHalf<Storage::kBfloat16> {
  using WidenHalf::WidenHalf;
};

template <>
struct Widen<Storage::kFloat16> : WidenHalf<Storage::kFloat16> {
  using WidenHalf::WidenHalf;
};

// Where a row's scales, zero points and offsets lie.
struct Affine {
  const char* scales;
  const char* zeros;
  const char* offsets;
  bool half;
  Affine() = default;
  Affine(const Weight& w, int64_t n, int64_t inputs) : half(w.half_scales != 0) {
    const int64_t at = n * (inputs / w.group_size) * (half ? 2 : 4);
    const auto row = [at](const void* from) {
      return from == nullptr ? nullptr : static_cast<const char*>(from) + at;
    };
    scales = row(w.scales);
    zeros = row(w.zeros);
    offsets = row(w.offsets);
  }
  float one(const char* from, int64_t index) const {
    return half ? _cvtsh_ss(reinterpret_cast<const uint16_t*>(from)[index])
                : reinterpret_cast<const float*>(from)[index];
  }
};

// Those of one group, in registers. Without zero points, q * scale + offset is one rounding of the exact value.
template <bool kZeros>
struct Group {
  Vec scale, zero_point, offset;
  Group() = default;
  Group(const Affine& row, int64_t index)
      : scale(set1(row.one(row.scales, index))), zero_point(kZeros ? set1(row.one(row.zeros, index)) : zero()),
        offset(row.offsets == nullptr ? zero() : set1(row.one(row.offsets, index))) {}
  Vec value(Vec q) const { return fma(kZeros ? sub(q, zero_point) : q, scale, offset); }
};

struct NoGroup {
  NoGroup() = default;
  template <typename Row>
  NoGroup(const Row&, int64_t) {}
  Vec value(Vec w) const { return w; }
};

template <>
struct Widen<Storage::kInt8> : Affine {
  static constexpr int64_t kStep = 16;
  const int8_t* row;
  Widen() = default;
  Widen(const Weight& w, int64_t n, int64_t inputs)
      : Affine(w, n, inputs), row(static_cast<const int8_t*>(w.data) + n * inputs) {}
  void operator()(int64_t at, Vec* out) const {
    for (int i = 0; i < 16 / kLanes; ++i) out[i] = load_int8(row + at + i * kLanes);
  }
  const void* address(int64_t at) const { return row + at; }
};

template <>
struct Widen<Storage::kInt4> : Affine {
  static constexpr int64_t kStep = 32;
  const uint8_t* row;
  char shift;
  Widen() = default;
  Widen(const Weight& w, int64_t n, int64_t inputs)
      : Affine(w, n, inputs),
        row(static_cast<const uint8_t*>(w.data) + n * (inputs / 2)),
        shift(static_cast<char>(w.shift)) {}
  void operator()(int64_t at, Vec* out) const { unpack_int4(row + at / 2, shift, out); }
  const void* address(int64_t at) const { return row + at / 2; }
};

// Strips of W, of the rows that are multiplied together, between the one that is multiplied and the one that is fetched:
// what a core multiplies in the time that memory takes to answer. A hardware prefetcher stops at each page.
constexpr int64_t kStripsAhead = 2;

// kWeights rows of W times kRows rows of x. One sum of vectors for each pair, over k in order: whatever tile a pair is
// in, and whether its weights were widened before, its result is the same. `ahead`: how many weights further on to fetch;
// 0: nothing.
template <Storage kStorage, typename GroupOf, int kWeights, int kRows>
inline void tile(const Widen<kStorage>* rows_of, int64_t inputs, int64_t group_size, int64_t ahead, const float* x,
                 int64_t ldx, float* y, int64_t ldy) {
  constexpr int64_t kStep = Widen<kStorage>::kStep;
  constexpr int kVecs = kStep / kLanes;
  Widen<kStorage> widen[kWeights];
  for (int r = 0; r < kWeights; ++r) widen[r] = rows_of[r];
  Vec sums[kWeights][kRows];
  for (int r = 0; r < kWeights; ++r)
    for (int m = 0; m < kRows; ++m) sums[r][m] = zero();
  int64_t group = 0;
  for (int64_t start = 0; start < inputs; start += group_size, ++group) {
    GroupOf groups[kWeights];
    for (int r = 0; r < kWeights; ++r) groups[r] = GroupOf(widen[r], group);
    for (int64_t k = start; k < start + group_size; k += kStep) {
#pragma GCC unroll 8
      for (int r = 0; r < kWeights; ++r) {
        Vec w[kVecs];
        widen[r](k, w);
        if (ahead != 0) _mm_prefetch(static_cast<const char*>(widen[r].address(k + ahead)), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int i = 0; i < kVecs; ++i) {
          const Vec value = groups[r].value(w[i]);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) sums[r][m] = fma(value, load(x + m * ldx + k + i * kLanes), sums[r][m]);
        }
      }
    }
  }
  for (int r = 0; r < kWeights; ++r)
    for (int m = 0; m < kRows; ++m) y[m * ldy + r] = sum(sums[r][m]);
}

// kWeights rows of W, from n on, times all rows of x. The first tile fetches what the next strips need.
template <Storage kStorage, typename GroupOf, int kWeights>
void strip(const Weight& weight, int64_t inputs, int64_t whole, int64_t group_size, int64_t n, const float* x,
           int64_t ldx, int64_t rows, float* y, int64_t ldy) {
  Widen<kStorage> widen[kWeights];
  for (int r = 0; r < kWeights; ++r) widen[r] = Widen<kStorage>(weight, n + r, inputs);
  const int64_t next = kStripsAhead * kWeights;
  int64_t ahead = n + next < weight.rows ? next * inputs : 0, m = 0;
  const auto tiles = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; m + kRows <= rows; m += kRows, ahead = 0)
      tile<kStorage, GroupOf, kWeights, kRows>(widen, whole, group_size, ahead, x + m * ldx, ldx, y + m * ldy, ldy);
  };
  tiles(std::integral_constant<int, kTileRows>());
  tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
}

// Rows of 16-bit floats that are multiplied by one row of x together, enough that no sum waits for the product before;
// and bytes between what is multiplied and what is fetched.
constexpr int kStreamed = 2;
constexpr int64_t kStreamAhead = 4096;

// kStreamed rows of W, from n on, times one row of x: the sums of `tile`. What is fetched is one stream through all rows
// one after the other, as memory is fastest with; rows side by side would be several short ones.
template <Storage kStorage>
inline void stream(const Weight& weight, int64_t inputs, int64_t whole, int64_t n, const float* x, float* y) {
  using W = Widen<kStorage>;
  constexpr int kVecs = W::kStep / kLanes;
  W rows[kStreamed];
  Vec sums[kStreamed];
  for (int r = 0; r < kStreamed; ++r) rows[r] = W(weight, n + r, inputs), sums[r] = zero();
  const char* ahead = static_cast<const char*>(rows[kStreamed - 1].address(0)) + kStreamAhead;
  constexpr int64_t kBytesOfStep = kStreamed * W::kStep * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t k = 0; k < whole; k += W::kStep, ahead += kBytesOfStep) {
    for (int64_t line = 0; line < kBytesOfStep; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < kStreamed; ++r) {
      Vec w[kVecs];
      rows[r](k, w);
      for (int i = 0; i < kVecs; ++i) sums[r] = fma(w[i], load(x + k + i * kLanes), sums[r]);
    }
  }
  for (int r = 0; r < kStreamed; ++r) y[r] = sum(sums[r]);
}

template <Storage kStorage>
void multiply_floats(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                     int64_t rows, float* y, int64_t ldy) {
  using GroupOf = NoGroup;
  // Whole vectors are one group, and what is left of the row is added by hand.
  const int64_t whole = inputs / Widen<kStorage>::kStep * Widen<kStorage>::kStep;
  int64_t n = begin;
  if (rows == 1) {  // memory is all that counts
    if constexpr (kStorage == Storage::kFloat32) {
      // Hardware fetches one stream faster than software fetches several.
      for (; n < end; ++n) {
        const Widen<kStorage> widen(weight, n, inputs);
        tile<kStorage, GroupOf, 1, 1>(&widen, whole, whole, 0, x, ldx, y + n, ldy);
      }
    } else {
      for (; n + kStreamed <= end; n += kStreamed) stream<kStorage>(weight, inputs, whole, n, x, y + n);
    }
  }
  for (; n + 2 <= end; n += 2) strip<kStorage, GroupOf, 2>(weight, inputs, whole, whole, n, x, ldx, rows, y + n, ldy);
  for (; n < end; ++n) strip<kStorage, GroupOf, 1>(weight, inputs, whole, whole, n, x, ldx, rows, y + n, ldy);
  for (n = begin; whole < inputs && n < end; ++n) {
    const Widen<kStorage> widen(weight, n, inputs);
    for (int64_t k = whole; k < inputs; ++k)
      for (int64_t m = 0; m < rows; ++m) y[m * ldy + n] += widen.scalar(k) * x[m * ldx + k];
  }
}

constexpr int64_t kRowsAhead = 4;  // as kStripsAhead, for rows one by one

template <Storage kStorage, bool kZeros>
void widen_all(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  using W = Widen<kStorage>;
  for (int64_t n = begin; n < end; ++n, out += inputs) {
    const W widen(weight, n, inputs);
    for (int64_t start = 0, index = 0; start < inputs; start += weight.group_size, ++index) {
      const Group<kZeros> group(widen, index);
      for (int64_t k = start; k < start + weight.group_size; k += W::kStep) {
        Vec w[W::kStep / kLanes];
        widen(k, w);
        _mm_prefetch(static_cast<const char*>(widen.address(k + kRowsAhead * inputs)), _MM_HINT_T0);
        for (int i = 0; i < W::kStep / kLanes; ++i) store(out + k + i * kLanes, group.value(w[i]));
      }
    }
  }
}

template <Storage kStorage, bool kZeros>
void multiply_integers(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                       int64_t rows, float* y, int64_t ldy) {
  using GroupOf = Group<kZeros>;
  const int64_t group = weight.group_size;
  int64_t n = begin;
  if (rows == 1) {
    for (; n + 2 <= end; n += 2)
      strip<kStorage, GroupOf, 2>(weight, inputs, inputs, group, n, x, ldx, rows, y + n, ldy);
    for (; n < end; ++n) strip<kStorage, GroupOf, 1>(weight, inputs, inputs, group, n, x, ldx, rows, y + n, ldy);
    return;
  }
  // Two rows are widened once, into the nearest cache, and serve all tiles.
  thread_local std::vector<float> buffer;
  buffer.resize(2 * inputs);
  Weight wide{};
  wide.data = buffer.data();
  wide.storage = Storage::kFloat32;
  wide.rows = 2;
  for (; n < end; n += 2) {
    const int64_t count = std::min<int64_t>(2, end - n);
    widen_all<kStorage, kZeros>(weight, inputs, n, n + count, buffer.data());
    multiply_floats<Storage::kFloat32>(wide, inputs, 0, count, x, ldx, rows, y + n, ldy);
  }
}

template <Storage kStorage>
void widen_floats(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  for (int64_t n = begin; n < end; ++n, out += inputs) {
    const Widen<kStorage> widen(weight, n, inputs);
    int64_t k = 0;
    for (; k + Widen<kStorage>::kStep <= inputs; k += Widen<kStorage>::kStep) {
      Vec w[Widen<kStorage>::kStep / kLanes];
      widen(k, w);
      for (int i = 0; i < Widen<kStorage>::kStep / kLanes; ++i) store(out + k + i * kLanes, w[i]);
    }
    for (; k < inputs; ++k) out[k] = widen.scalar(k);
  }
}

void widen_rows(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, float* out) {
  const bool zeros = weight.zeros != nullptr;
  if (weight.storage == Storage::kInt8)
    return zeros ? widen_all<Storage::kInt8, true>(weight, inputs, begin, end, out)
                 : widen_all<Storage::kInt8, false>(weight, inputs, begin, end, out);
  if (weight.storage == Storage::kInt4)
    return zeros ? widen_all<Storage::kInt4, true>(weight, inputs, begin, end, out)
                 : widen_all<Storage::kInt4, false>(weight, inputs, begin, end, out);
  if (weight.storage == Storage::kBfloat16) return widen_floats<Storage::kBfloat16>(weight, inputs, begin, end, out);
  if (weight.storage == Storage::kFloat16) return widen_floats<Storage::kFloat16>(weight, inputs, begin, end, out);
  return widen_floats<Storage::kFloat32>(weight, inputs, begin, end, out);
}

void multiply_rows(const Weight& weight, int64_t inputs, int64_t begin, int64_t end, const float* x, int64_t ldx,
                   int64_t rows, float* y, int64_t ldy) {
  decltype(Kernels::multiply_rows) kernel = nullptr;
  const bool zeros = weight.zeros != nullptr;
  switch (weight.storage) {
    case Storage::kFloat32: kernel = multiply_floats<Storage::kFloat32>; break;
    case Storage::kBfloat16: kernel = multiply_floats<Storage::kBfloat16>; break;
    case Storage::kFloat16: kernel = multiply_floats<Storage::kFloat16>; break;
    case Storage::kInt8:
      kernel = zeros ? multiply_integers<Storage::kInt8, true> : multiply_integers<Storage::kInt8, false>;
      break;
    case Storage::kInt4:
      kernel = zeros ? multiply_integers<Storage::kInt4, true> : multiply_integers<Storage::kInt4, false>;
      break;
  }
  kernel(weight, inputs, begin, end, x, ldx, rows, y, ldy);
}
