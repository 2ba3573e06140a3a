// Packing and multiplication of one instruction set. Included by gemm_avx2.cpp and its like, which define: the vectors
// `Ints` and `Floats` of kLanes, kTileRows, kInt8Format; load_ints, broadcast, load, store, set1, mul, fma, to_floats;
// and the sums `Int8Sum` and `Int4Sum` of one group, each with kUnit (values a unit), start, add and total.

namespace {

constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kLanes;

// Bytes of a part of a strip: with a tile of x and the scales it stays in the 32 KiB of a first-level cache.
constexpr int64_t kPartBytes = 20480;

// A part of kColumns rows of W: units [inputs / unit][kColumns], and [P][kColumns] of the rest.
struct Strip {
  alignas(64) char values[kPartBytes];
  alignas(64) float scales[kPartBytes / 16];
  alignas(64) float offsets[kPartBytes / 16];
  alignas(64) int32_t corrections[kPartBytes / 16];  // -128 * sum(q), for x in Format::kBiased
};

// ------------------------------------------------------------------------------------------------------- packing of W

// Rows of eight 32-bit values become columns.
inline void transpose(__m256i* r) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

inline void store_units(char* out, const __m256i* units, int count) {
  for (int u = 0; u < count; ++u) _mm256_store_si256(reinterpret_cast<__m256i*>(out + u * kColumns * 4), units[u]);
}

inline __m128i load_16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

// Eight rows of int8, as words.
void pack_words(const int8_t* const* rows, int64_t inputs, char* out) {
  for (int64_t k = 0; k < inputs; k += 16, out += 8 * kColumns * 4) {
    __m256i units[8];
    for (int j = 0; j < 8; ++j) units[j] = _mm256_cvtepi8_epi16(load_16(rows[j] + k));
    transpose(units);
    store_units(out, units, 8);
  }
}

// -128 times the sums of eight rows' values in `count` units.
inline __m256i correction(const __m256i* units, int count) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i pairs = _mm256_setzero_si256();
  for (int u = 0; u < count; ++u) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(ones, units[u]));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(-128));
}

// Eight rows of int8, as they are, with the corrections of their groups.
void pack_bytes(const int8_t* const* rows, int64_t inputs, int64_t group, char* out, int32_t* corrections) {
  const auto next = [&](const __m256i* units, int count) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(corrections), correction(units, count));
    corrections += kColumns;
  };
  for (int64_t k = 0; k < inputs; k += 32, out += 8 * kColumns * 4) {
    const bool whole = k + 32 <= inputs;
    __m256i units[8];
    for (int j = 0; j < 8; ++j) {
      const __m128i high = whole ? load_16(rows[j] + k + 16) : _mm_setzero_si128();
      units[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(rows[j] + k)), high, 1);
    }
    transpose(units);
    store_units(out, units, whole ? 8 : 4);
    if (group == 32) {
      next(units, 8);
    } else {
      next(units, 4);
      if (whole) next(units + 4, 4);
    }
  }
}

// Eight rows of halves of bytes, as bytes of [0, 16): four bytes of a row make a unit of their lower halves and one of
// their upper ones, the order of Format::kHalves.
void pack_halves(const uint8_t* const* rows, int64_t inputs, char* out) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < inputs; k += 64, out += 16 * kColumns * 4) {
    const bool whole = k + 64 <= inputs;
    __m256i bytes[8], units[2];
    for (int j = 0; j < 8; ++j)
      bytes[j] = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[j] + k / 2))
                       : _mm256_zextsi128_si256(load_16(rows[j] + k / 2));
    transpose(bytes);
    for (int i = 0; i < (whole ? 8 : 4); ++i) {
      units[0] = _mm256_and_si256(bytes[i], mask);
      units[1] = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), mask);
      store_units(out + i * 2 * kColumns * 4, units, 2);
    }
  }
}

// Eight of a row's scales, zeros or offsets, one for each group of x from `first` on; past `count` of them, anything.
inline __m256 load_grouped(const void* from, bool half, int64_t row_at, int64_t first, int64_t count, int64_t repeat) {
  if (repeat == 1 && count >= 8)
    return half ? _mm256_cvtph_ps(load_16(static_cast<const uint16_t*>(from) + row_at + first))
                : _mm256_loadu_ps(static_cast<const float*>(from) + row_at + first);
  const auto value = [&](int64_t at) {
    return half ? _cvtsh_ss(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
  };
  // One division for all lanes, which is dear; what lies past `count` is never stored, so one value may fill them.
  const int64_t lanes = std::min<int64_t>(count, 8);
  int64_t at = first / repeat, left = (at + 1) * repeat - first;
  at += row_at;
  if (left >= lanes) return _mm256_set1_ps(value(at));
  alignas(32) float values[8] = {};
  for (int64_t i = 0; i < lanes; ++i, --left) {
    if (left == 0) ++at, left = repeat;
    values[i] = value(at);
  }
  return _mm256_load_ps(values);
}

inline void store_grouped(float* out, __m256* rows, int64_t count) {
  __m256i units[8];
  for (int j = 0; j < 8; ++j) units[j] = _mm256_castps_si256(rows[j]);
  transpose(units);
  for (int i = 0; i < std::min<int64_t>(count, 8); ++i)
    _mm256_store_ps(out + i * kColumns, _mm256_castsi256_ps(units[i]));
}

// Scales and offsets of eight rows for `count` groups of x from `first` on.
void pack_grouped(const Weight& weight, int64_t inputs, const int64_t* rows, int64_t group, int64_t first,
                  int64_t count, bool offsets, float* out_scales, float* out_offsets) {
  const int64_t stride = inputs / weight.group_size, repeat = weight.group_size / group;
  const bool half = weight.half_scales != 0;
  const __m256 shift = _mm256_set1_ps(weight.storage == Storage::kInt4 ? static_cast<float>(weight.shift) : 0.0f);
  for (int64_t g = 0; g < count; g += 8) {
    __m256 scale[8], offset[8];
    for (int j = 0; j < 8; ++j) {
      const int64_t at = rows[j] * stride;
      const auto read = [&](const void* from) { return load_grouped(from, half, at, first + g, count - g, repeat); };
      scale[j] = read(weight.scales);
      if (!offsets) continue;
      const __m256 zero = weight.zeros == nullptr ? shift : _mm256_add_ps(shift, read(weight.zeros));
      const __m256 added = weight.offsets == nullptr ? _mm256_setzero_ps() : read(weight.offsets);
      offset[j] = _mm256_fnmadd_ps(zero, scale[j], added);
    }
    store_grouped(out_scales + g * kColumns, scale, count - g);
    if (offsets) store_grouped(out_offsets + g * kColumns, offset, count - g);
  }
}

// The one scale of each of eight rows.
void pack_row_scales(const Weight& weight, const int64_t* rows, float* out) {
  for (int j = 0; j < 8; ++j)
    out[j] = weight.half_scales != 0 ? _cvtsh_ss(static_cast<const uint16_t*>(weight.scales)[rows[j]])
                                     : static_cast<const float*>(weight.scales)[rows[j]];
}

// What a weight has beside its integers: a scale for each group; an offset as well; or one scale for all of a row, with
// which the sum over the groups is multiplied.
enum class Scales { kGrouped, kWithOffsets, kOfRow };

Scales scales_of(const Weight& weight, int64_t inputs) {
  const bool shifts = weight.storage == Storage::kInt4 && weight.shift != 0;
  if (weight.offsets != nullptr || weight.zeros != nullptr || shifts) return Scales::kWithOffsets;
  return weight.group_size == inputs ? Scales::kOfRow : Scales::kGrouped;
}

// Inputs [start, start + count) of rows n and on; columns past the last row repeat it.
void pack_strip(const Weight& weight, int64_t inputs, int64_t n, int64_t group, int64_t start, int64_t count,
                Strip& strip) {
  for (int c = 0; c < kColumns; c += 8) {
    int64_t rows[8];
    for (int j = 0; j < 8; ++j) rows[j] = std::min(n + c + j, weight.rows - 1);
    char* const out = strip.values + c * 4;
    // The strip after this one, whose rows no hardware prefetcher expects: one row of x is bound by reading W.
    const int64_t row_bytes = weight.storage == Storage::kInt4 ? inputs / 2 : inputs;
    const int64_t part_bytes = row_bytes * count / inputs, at = row_bytes * start / inputs;
    for (int64_t row = n + kColumns + c; row < std::min(n + kColumns + c + 8, weight.rows); ++row)
      for (int64_t i = 0; i < part_bytes; i += 64)
        _mm_prefetch(static_cast<const char*>(weight.data) + row * row_bytes + at + i, _MM_HINT_T1);
    if (weight.storage == Storage::kInt4) {
      const uint8_t* data[8];
      for (int j = 0; j < 8; ++j)
        data[j] = static_cast<const uint8_t*>(weight.data) + (rows[j] * inputs + start) / 2;
      pack_halves(data, count, out);
    } else {
      const int8_t* data[8];
      for (int j = 0; j < 8; ++j) data[j] = static_cast<const int8_t*>(weight.data) + rows[j] * inputs + start;
      if (kInt8Format == Format::kWords)
        pack_words(data, count, out);
      else
        pack_bytes(data, count, group, out, strip.corrections + c);
    }
    if (const Scales scales = scales_of(weight, inputs); scales == Scales::kOfRow)
      pack_row_scales(weight, rows, strip.scales + c);
    else
      pack_grouped(weight, inputs, rows, group, start / group, count / group, scales == Scales::kWithOffsets,
                   strip.scales + c, strip.offsets + c);
  }
}

// ------------------------------------------------------------------------------------------------------- packing of x

inline __m256i narrow_words(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); }
inline __m256i narrow_bytes(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); }

// Below this, 127 / magnitude is not safely finite; such a group counts as zeros.
constexpr float kLeastMagnitude = 1e-30f;

// The largest of each of four vectors of integers.
inline __m128i largest_of_four(const __m256i* v) {
  __m128i halves[4];
  for (int j = 0; j < 4; ++j)
    halves[j] = _mm_max_epi32(_mm256_castsi256_si128(v[j]), _mm256_extracti128_si256(v[j], 1));
  const __m128i a = _mm_max_epi32(_mm_unpacklo_epi32(halves[0], halves[1]), _mm_unpackhi_epi32(halves[0], halves[1]));
  const __m128i b = _mm_max_epi32(_mm_unpacklo_epi32(halves[2], halves[3]), _mm_unpackhi_epi32(halves[2], halves[3]));
  return _mm_max_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}

inline __m128i sums_of_four(const __m256i* v) {
  const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

// Rounds one group of four rows, into `out` as words or bytes, and gives their scales, and the sums of their integers
// times these. Four at once, as a row alone would wait for its largest value and for two divisions.
template <int kGroup>
inline void quantize_groups(const float* const* x, Format format, char (*out)[64], float* scales, float* sums) {
  constexpr int kParts = kGroup / 8;
  __m256i largest[4], totals[4];
  for (int j = 0; j < 4; ++j) {
    largest[j] = _mm256_setzero_si256();
    for (int i = 0; i < kParts; ++i) {
      // Bits of magnitudes order as the magnitudes do, infinity and NaN last.
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x[j] + 8 * i));
      largest[j] = _mm256_max_epi32(largest[j], _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
  }
  const __m128i bits = largest_of_four(largest);
  const __m128 magnitudes = _mm_castsi128_ps(bits), most = _mm_set1_ps(127.0f);
  const __m128 finite = _mm_castsi128_ps(_mm_cmplt_epi32(bits, _mm_set1_epi32(0x7f800000)));
  const __m128 counts = _mm_and_ps(finite, _mm_cmpge_ps(magnitudes, _mm_set1_ps(kLeastMagnitude)));
  const __m128 inverses = _mm_and_ps(counts, _mm_div_ps(most, magnitudes));
  const __m128 finite_scales = _mm_and_ps(counts, _mm_div_ps(magnitudes, most));
  const __m128 of_rows = _mm_blendv_ps(_mm_set1_ps(__builtin_nanf("")), finite_scales, finite);
  alignas(16) float inverse[4];
  alignas(16) int32_t kept[4];
  _mm_store_ps(inverse, inverses);
  _mm_store_ps(reinterpret_cast<float*>(kept), counts);
  for (int j = 0; j < 4; ++j) {
    __m256i q[kParts], words[kParts / 2];
    for (int i = 0; i < kParts; ++i) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x[j] + 8 * i), _mm256_set1_ps(inverse[j]));
      q[i] = _mm256_and_si256(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(kept[j]));
    }
    totals[j] = _mm256_setzero_si256();
    for (int i = 0; i < kParts / 2; ++i) {
      words[i] = narrow_words(q[2 * i], q[2 * i + 1]);
      totals[j] = _mm256_add_epi32(totals[j], _mm256_madd_epi16(words[i], _mm256_set1_epi16(1)));
    }
    if (format == Format::kWords) {
      for (int i = 0; i < kParts / 2; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(out[j]) + i, words[i]);
      continue;
    }
    __m256i bytes = narrow_bytes(words[0], words[kParts / 2 - 1]);  // of 16 values: all of them, twice
    if (format == Format::kBiased) bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(static_cast<char>(128)));
    if (format == Format::kHalves) {
      const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(order));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(out[j]), bytes);
  }
  _mm_storeu_ps(scales, of_rows);
  _mm_storeu_ps(sums, _mm_mul_ps(of_rows, _mm_cvtepi32_ps(sums_of_four(totals))));
}

template <int kGroup, Format kFormat>
void pack_groups(const float* x, int64_t ldx, int64_t rows, int64_t inputs, Tile tile) {
  constexpr int64_t kUnits = kGroup * (kFormat == Format::kWords ? 2 : 1) / 4;
  alignas(64) static constexpr float kNothing[kGroup] = {};
  char* out = tile.values;
  for (int64_t g = 0; g < inputs / kGroup; ++g, out += kUnits * kTileRows * 4) {
    for (int m = 0; m < kTileRows; m += 4) {
      alignas(64) char values[4][64];
      const float* from[4];
      for (int j = 0; j < 4; ++j) from[j] = m + j < rows ? x + (m + j) * ldx + g * kGroup : kNothing;
      const int64_t at = g * kTileRows + m;
      quantize_groups<kGroup>(from, kFormat, values, tile.scales + at, tile.sums + at);
      for (int64_t u = 0; u < kUnits; u += 4) {
        __m128 r[4];
        for (int j = 0; j < 4; ++j) r[j] = _mm_load_ps(reinterpret_cast<const float*>(values[j]) + u);
        _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
        for (int j = 0; j < 4; ++j) _mm_store_ps(reinterpret_cast<float*>(out) + (u + j) * kTileRows + m, r[j]);
      }
    }
  }
}

template <int kGroup>
void pack_groups(const float* x, int64_t ldx, int64_t rows, int64_t inputs, Format format, Tile tile) {
  switch (format) {
    case Format::kWords: return pack_groups<kGroup, Format::kWords>(x, ldx, rows, inputs, tile);
    case Format::kHalves: return pack_groups<kGroup, Format::kHalves>(x, ldx, rows, inputs, tile);
    case Format::kBiased: return pack_groups<kGroup, Format::kBiased>(x, ldx, rows, inputs, tile);
  }
}

void pack_tile(const float* x, int64_t ldx, int64_t rows, int64_t inputs, int64_t group, Format format, Tile tile) {
  if (group == 32)
    pack_groups<32>(x, ldx, rows, inputs, format, tile);
  else
    pack_groups<16>(x, ldx, rows, inputs, format, tile);
}

// ------------------------------------------------------------------------------------------------------ multiplication

// Has the sums of one row done before those of the next begin. Without it the compiler loads all of x first, runs out of
// registers and keeps a sum in memory, whose delay then sets the pace.
inline void in_registers(Ints& a, Ints& b) {
#if !defined(WHET_EMULATED)
  asm volatile("" : "+v"(a), "+v"(b));
#else  // by a library of intrinsics (tests/unit/emulated_kernels.py)
  static_cast<void>(a), static_cast<void>(b);
#endif
}

// A part of K.
struct Part {
  int64_t groups;
  bool is_first, is_last;
};

// y[m, c] (+)= the first kRows rows of a tile of x times a strip, over a part of K. The sums of floats go over the groups
// in order, from what y held, so that cutting K into parts changes nothing.
template <typename Sum, int kGroup, Scales kScales, int kRows>
void multiply_tile(const Strip& strip, const Tile& tile, const Part& part, float* y, int64_t ldy) {
  constexpr int kUnits = kGroup / Sum::kUnit;
  Floats sums[kRows][kVectors];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) sums[m][v] = part.is_first ? set1(0.0f) : load(y + m * ldy + v * kLanes);
  const char* w = strip.values;
  const char* x = tile.values;
  for (int64_t g = 0; g < part.groups; ++g) {
    Ints dots[kRows][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) dots[m][v] = Sum::start(strip.corrections + g * kColumns + v * kLanes);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u, w += kColumns * 4, x += kTileRows * 4) {
      Ints weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = load_ints(w + v * kLanes * 4);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Ints value = broadcast(x + m * 4);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dots[m][v] = Sum::add(dots[m][v], weights[v], value);
        in_registers(dots[m][0], dots[m][1]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Floats scale = set1(tile.scales[g * kTileRows + m]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = g * kColumns + v * kLanes;
        const Floats factor = kScales == Scales::kOfRow ? scale : mul(load(strip.scales + at), scale);
        sums[m][v] = fma(to_floats(Sum::total(dots[m][v])), factor, sums[m][v]);
        if (kScales == Scales::kWithOffsets)
          sums[m][v] = fma(load(strip.offsets + at), set1(tile.sums[g * kTileRows + m]), sums[m][v]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) {
      if (kScales == Scales::kOfRow && part.is_last) sums[m][v] = mul(load(strip.scales + v * kLanes), sums[m][v]);
      store(y + m * ldy + v * kLanes, sums[m][v]);
    }
}

using MultiplyTile = void (*)(const Strip&, const Tile&, const Part&, float*, int64_t);

template <typename Sum, int kGroup, int kRows>
MultiplyTile tile_kernel(Scales scales) {
  switch (scales) {
    case Scales::kGrouped: return multiply_tile<Sum, kGroup, Scales::kGrouped, kRows>;
    case Scales::kWithOffsets: return multiply_tile<Sum, kGroup, Scales::kWithOffsets, kRows>;
    case Scales::kOfRow: return multiply_tile<Sum, kGroup, Scales::kOfRow, kRows>;
  }
  return nullptr;
}

template <int kRows>
MultiplyTile tile_kernel(const Weight& weight, int64_t group, Scales scales) {
  if (weight.storage == Storage::kInt4) return tile_kernel<Int4Sum, 32, kRows>(scales);
  return group == 32 ? tile_kernel<Int8Sum, 32, kRows>(scales) : tile_kernel<Int8Sum, 16, kRows>(scales);
}

// The kernel of a tile with that many rows, or of a few more where none has just so many.
MultiplyTile tile_kernel(const Weight& weight, int64_t group, Scales scales, int64_t rows) {
  if (rows == 1) return tile_kernel<1>(weight, group, scales);
  if (rows == 2) return tile_kernel<2>(weight, group, scales);
  if (rows <= 4) return tile_kernel<4>(weight, group, scales);
  return tile_kernel<kTileRows>(weight, group, scales);
}

void multiply_strip(const Product& product, int64_t n) {
  const Weight& weight = *product.weight;
  const int64_t inputs = product.inputs, group = product.group;
  const Format format = weight.storage == Storage::kInt4 ? Format::kHalves : kInt8Format;
  const int64_t bytes = value_bytes(format);
  const Scales scales = scales_of(weight, inputs);
  const MultiplyTile kernel = tile_kernel(weight, group, scales, kTileRows);
  const MultiplyTile last = tile_kernel(weight, group, scales, (product.rows - 1) % kTileRows + 1);
  const int64_t count = std::min<int64_t>(kColumns, weight.rows - n);
  // Equal parts of whole groups.
  const int64_t groups = inputs / group, most = kPartBytes / (kColumns * bytes * group);
  const int64_t parts = (groups + most - 1) / most, per_part = (groups + parts - 1) / parts;
  Strip strip;
  for (int64_t start = 0; start < groups; start += per_part) {
    const int64_t now = std::min(per_part, groups - start);
    const Part part{now, start == 0, start + now == groups};
    pack_strip(weight, inputs, n, group, start * group, now * group, strip);
    for (int64_t m = 0; m < product.rows; m += kTileRows) {
      Tile tile = tile_at(const_cast<char*>(product.tiles) + m / kTileRows * product.tile_bytes, kTileRows, inputs,
                          group, format);
      tile.values += start * group * bytes * kTileRows;
      tile.scales += start * kTileRows;
      tile.sums += start * kTileRows;
      float* const y = product.y + m * product.ldy + n;
      const int64_t rows = std::min<int64_t>(kTileRows, product.rows - m);
      if (rows == kTileRows && count == kColumns) {
        kernel(strip, tile, part, y, product.ldy);
        continue;
      }
      // An edge of y: by way of a whole tile.
      alignas(64) float whole[kTileRows * kColumns] = {};
      for (int64_t i = 0; start > 0 && i < rows; ++i) std::copy_n(y + i * product.ldy, count, whole + i * kColumns);
      (rows == kTileRows ? kernel : last)(strip, tile, part, whole, kColumns);
      for (int64_t i = 0; i < rows; ++i) std::copy_n(whole + i * kColumns, count, y + i * product.ldy);
    }
  }
}

}  // namespace

const Level kLevel{kTileRows, kColumns, kInt8Format, Format::kHalves, pack_tile, multiply_strip};
